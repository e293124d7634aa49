"""Mismatched inputs are refused: embeddings, phrases, masks, thresholds, rows."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from support import quick

from sam3_jax import ImageEmbedding, Prompt, Sam3, Tokenizer, VisualPrompt
from sam3_jax.checkpoint import bundle
from sam3_jax.compat.keras_hub import SAM3PromptableConceptImageSegmenter
from sam3_jax.inference.provenance import own_embedding
from sam3_jax.inference.refine import add_instance, refine_by_clicks, refine_instance
from sam3_jax.outputs.detections import Detections
from sam3_jax.outputs.instances import Instances, instances
from sam3_jax.types import TextEmbedding
from sam3_jax.utils.identity import Origin

IMAGE = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return training_model.save(tmp_path_factory.mktemp("bundles") / "toy", visual=True)


@pytest.fixture(scope="module")
def model(folder):
  return quick(Sam3.from_checkpoint(folder, dtype="float32"))


@pytest.fixture(scope="module")
def other(folder, tmp_path_factory, model):
  """A model with other parameters, of which nothing is compiled."""
  params = jax.tree.map(lambda x: np.asarray(x) * np.float32(1.01), model.params)
  path, info = tmp_path_factory.mktemp("bundles") / "other", {"name": "other"}
  bundle.save(path, params, model.config, model.tokenizer.model, info=info)
  return Sam3.from_checkpoint(path, dtype="float32")


@pytest.fixture(scope="module")
def embedding(model):
  return model.encode([IMAGE, IMAGE[:, :25]], visual=True)


def refused(message):
  return pytest.raises(ValueError, match=message)


# Checkpoints.


@pytest.mark.slow
def test_embedding_of_another_checkpoint(model, other, embedding, tmp_path):
  embedding.save(tmp_path / "image")
  for found in (embedding, ImageEmbedding.load(tmp_path / "image"), embedding[1:], embedding[:0]):
    assert (found.origin.identity, found.origin.name) == (model.identity, "toy")
    for decode, prompt in (
      (other.decode, "ear"),
      (other.decode_visual, VisualPrompt(points=[[1, 1]])),
    ):
      with refused(
        rf"toy \({model.identity[:12]}\), than this model's, other \({other.identity[:12]}\)"
      ):
        decode(found, prompt, 0)
  theirs = dataclasses.replace(embedding, origin=other.origin)
  with pytest.raises(ValueError, match="metadata"):
    jax.tree.map(lambda *x: jnp.concatenate(x), embedding, theirs)
  assert len(jax.tree.map(lambda *x: jnp.concatenate(x), embedding, embedding)) == 4


@pytest.mark.slow
def test_loaded_embedding_decodes_the_same(model, embedding, tmp_path):
  embedding.save(tmp_path / "image")
  before = model.compilations
  want, got = (
    model.decode(x, "ear", 1) for x in (embedding, ImageEmbedding.load(tmp_path / "image"))
  )
  assert model.compilations - before <= 1
  for one, two in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_array_equal(one, two)


@pytest.mark.slow
def test_text_of_another_checkpoint_or_other_prompts(model, other, embedding, tmp_path):
  model.encode_text(["ear", "Dog "]).save(tmp_path / "text")
  text = TextEmbedding.load(tmp_path / "text")
  theirs = dataclasses.replace(embedding, origin=other.origin)
  with refused(r"the phrases was made by another checkpoint, toy \("):
    other.decode(theirs, ["ear", "dog"], 0, text=text)
  for prompts, row in (
    (["dog", "ear"], 0),
    (["ear", "cat"], 1),
    (["ear", Prompt(boxes=[[1, 1, 9, 9]])], 1),
  ):
    with refused(f"row {row} of text is of another phrase than prompt {row}"):
      model.decode(embedding, prompts, 0, text=text)
  assert model.decode(embedding, "dog", 0, text=text[1:]).scores.shape == (1, 6)  # cleaned alike


def test_old_files_are_loaded_with_a_warning(model, embedding, tmp_path):
  arrays = {name: np.asarray(x) for name, x in vars(embedding).items() if isinstance(x, jax.Array)}
  save_file(arrays, tmp_path / "image")
  with pytest.warns(UserWarning, match="image does not name the checkpoint that made it"):
    old = ImageEmbedding.load(tmp_path / "image")
  assert old.origin == Origin()
  assert model.decode(old, "ear", 1).scores.shape == (1, 6)
  save_file(
    {"features": np.zeros((1, 8, 32), np.float32), "valid": np.ones((1, 8), bool)},
    tmp_path / "text",
  )
  with pytest.warns(UserWarning, match="text does not name the checkpoint"):
    assert TextEmbedding.load(tmp_path / "text").tokens is None


def test_files_of_a_later_version_are_refused(tmp_path):
  save_file({"features": np.zeros(1)}, tmp_path / "text", {"format_version": "4"})
  with refused("text has format version '4', and this sam3-jax reads versions up to 3"):
    TextEmbedding.load(tmp_path / "text")


def test_identity_depends_on_the_content(model, other, tokenizer_path):
  tokenizer = Tokenizer(tokenizer_path, context=training_model.CONFIG.text.context)
  raw = Sam3(training_model.CONFIG, model.params, tokenizer, dtype="float32")
  assert raw.identity == model.identity != other.identity
  raw.params = other.params
  assert raw.identity == other.identity
  raw.params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), model.params)
  assert raw.identity == ""


def test_embedding_of_another_size_or_dtype(model, embedding):
  unknown = dataclasses.replace(embedding, origin=Origin())
  small = dataclasses.replace(unknown, coarse=unknown.coarse[:, :2])
  with refused(
    r"of another size: its map coarse is \[2, 4, 32\], and this model's images are 32 x"
  ):
    model.decode(small, "ear", 0)
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, embedding)
  got = own_embedding(half, model.origin, model.config, model.dtype)
  assert {x.dtype.name for x in jax.tree.leaves(got)} == {"float32", "int32"}


# Masks.


def detections(scores, limits=None, fill=1.0):
  rows, kept = np.shape(scores)
  masks = np.full((rows, kept, 4, 4), fill, np.float32)
  semantic = np.full((rows, 4, 4), fill, np.float32)
  if limits is not None:
    without = np.asarray(limits) > 0
    masks[without], semantic[without], limits = 0, 0, jnp.float32(limits)
  zeros = jnp.zeros(rows)
  return Detections(
    jnp.float32(scores), jnp.zeros((rows, kept, 4)), jnp.asarray(masks), zeros,
    jnp.asarray(semantic), jnp.zeros(rows, int), jnp.full((rows, 2), 8),
    jnp.arange(rows * kept).reshape(rows, kept), limits,
  )  # fmt: skip


@pytest.mark.slow
def test_threshold_below_min_score(model, embedding, tmp_path):
  found = model.decode(embedding, ["ear", "dog"], [0, 1], min_score=1.0)
  best = float(np.asarray(found.scores).max())
  assert not np.asarray(found.mask_logits).any()
  found.save(tmp_path / "found")
  for one in (found, Detections.load(tmp_path / "found"), found[1:], found[np.array([1, 0])]):
    with refused(
      r"above the threshold 0, but no masks: decode computed none for scores up to min_sc"
    ):
      one.instances(0)
    assert [len(x) for x in one.instances(best)] == [0] * len(one)
  with refused("the mask of a prompt is 0 everywhere, like the masks that decode"):
    model.decode_visual(embedding, VisualPrompt(mask=found.mask_logits[0, 0]), 0)
  made = model.decode(embedding, ["ear", "dog"], [0, 1], min_score=1e-9)
  assert made.mask_min_score.tolist() == [0, 0]
  assert [len(x) for x in made.instances(0)] == [6, 6]
  with pytest.raises(ValueError, match="min_score=1"):
    jax.tree.map(lambda *x: jnp.concatenate(x), made, found).instances([0, 0, 1, 0])


def test_old_files_mark_rows_without_masks(tmp_path):
  arrays = vars(detections([[0.2, 0.3], [0.1, 0.4]], [0, 0.5]))
  save_file(
    {k: np.asarray(x) for k, x in arrays.items() if k != "mask_min_score"}, tmp_path / "old"
  )
  old = Detections.load(tmp_path / "old")
  assert old.mask_min_score.tolist() == pytest.approx([0, 0.4])
  with refused("prompt 1 has a score of 0.4, above the threshold 0.2, .*min_score=0.4"):
    old.instances(0.2)
  assert len(old.instances([0.2, 0.4])[0]) == 1


share = st.floats(0, 1, width=32)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(share, share), min_size=1, max_size=4), share, st.data())
def test_every_instance_has_its_mask(scores, min_score, data):
  """At any threshold, with rows as `decode` marks them."""
  rows = np.float32(scores)
  limits = np.where(rows.max(axis=1) > np.float32(min_score), 0, np.float32(min_score))
  threshold = data.draw(st.one_of(share, st.lists(share, min_size=len(rows), max_size=len(rows))))
  above = rows > np.float32(threshold).reshape(-1, 1)
  if (above.any(axis=1) & (limits > 0)).any():
    with refused(r"above the threshold .* but no masks: decode computed none"):
      instances(detections(rows, limits), threshold)
    return
  found = instances(detections(rows, limits), threshold)
  assert [len(one) for one in found] == above.sum(axis=1).tolist()
  assert all(one.masks[i].all() for one in found for i in range(len(one)))


# Other arguments.


@pytest.mark.parametrize("value", [True, "0.5", None, [True], {"a": 1}], ids=str)
def test_thresholds_are_numbers(value):
  with refused("threshold must be a number in"):
    detections([[0.9]]).instances(value)


@pytest.mark.parametrize("index", [True, [True], 1.0, -1, 2, np.nan, "0", [[0]]], ids=str)
def test_image_index_is_a_row(model, embedding, index):
  with refused("image_index"):
    model.decode(embedding, "ear", index)
  with refused("image_index"):
    model.decode_visual(embedding, VisualPrompt(points=[[1, 1]]), index)


@pytest.mark.parametrize("label", [2, -1, 0.5, "1", None, [1]], ids=str)
def test_labels_are_0_or_1(label):
  with refused("box labels are 1"):
    Prompt("ear", [[1, 1, 9, 9]], [label])


def test_swapped_arguments(model, embedding):
  with pytest.raises(TypeError, match="instances takes what decode returns, then thresholds"):
    instances(0.5, detections([[0.9]]))
  with pytest.raises(TypeError, match="decode takes what encode returns, then prompts"):
    model.decode("ear", embedding)
  with pytest.raises(TypeError, match="decode_visual takes what encode"):
    model.decode_visual(VisualPrompt(points=[[1, 1]]), embedding)


def test_scores_that_are_nan():
  with refused("scores of prompt 1 are NaN: the embedding of its image or its phrase"):
    detections([[0.9], [np.nan]]).instances()


def test_no_instances_and_no_prompts():
  assert [len(one) for one in detections([[0.2, 0.3]]).instances()] == [0]
  assert detections([[0.2]])[:0].instances() == []


@pytest.mark.parametrize("index", [[2], [-3], [0, 5]], ids=str)
def test_row_out_of_range(index):
  """JAX itself would return the last row."""
  for given_as in (index, np.array(index), jnp.array(index)):
    with pytest.raises(IndexError, match=r"there is no row .*: there are 2"):
      detections([[0.1], [0.2]])[given_as]


@pytest.mark.slow
def test_rows_by_lists_and_bools():
  two = detections([[0.1], [0.2]])
  assert two[[-1, 0]].scores.tolist() == two[np.array([1, 0])].scores.tolist()
  assert len(two[[]]) == 0
  assert len(two[np.array([True, False])]) == 1
  with pytest.raises(IndexError, match=r"there are 2 rows; got bools of shape \[3\]"):
    two[np.array([True, False, True])]
  assert jax.jit(lambda x, i: x[i])(two, jnp.array([1])).scores.tolist() == two[1:].scores.tolist()


@pytest.mark.slow
def test_refine_instances_of_another_image(model, embedding):
  found = model.decode(embedding, "ear", 0).instances(0)[0]
  prompt = VisualPrompt(points=[[3, 3]])
  for refine in (
    lambda **row: refine_instance(model, embedding, found, found.ids[0], prompt, **row),
    lambda **row: add_instance(model, embedding, found, prompt, **row),
    lambda **row: refine_by_clicks(model, embedding, found, [[3, 3]], [1], **row),
  ):
    with refused("the embedding has 2 images: give the image of each prompt"):
      refine()
    with refused(r"of an image of 20 x 30 \(height x width\), and the prompt is about .* 20 x 25"):
      refine(image_index=1)
  assert isinstance(add_instance(model, embedding, found, prompt, 0), Instances)
  with refused("identity must be an integer; got 1.5"):
    add_instance(model, embedding, found, prompt, 0, identity=1.5)


def test_images_on_another_scale(model):
  segmenter = SAM3PromptableConceptImageSegmenter(model)
  for images in (IMAGE / 255, np.stack([IMAGE, IMAGE / 255])):
    with refused(r"image \d has values from .* almost black .*: multiply by 255"):
      segmenter.predict({"images": images, "prompts": ["ear"] * (images.ndim - 2)})
  with refused("images must be"):
    segmenter.predict({"images": [IMAGE, IMAGE[:3]], "prompts": ["a", "b"]})


def test_no_spurious_warning(model, embedding, tmp_path):
  embedding.save(tmp_path / "image")
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    ImageEmbedding.load(tmp_path / "image")


def test_sizes_of_compile_are_integers(model):
  with refused("images, prompts, boxes and exemplars must be integers"):
    model.compile(1.5)
