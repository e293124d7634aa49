"""Concepts: exemplars of one image, decoded in others, joined, saved, and refused."""

import dataclasses

import golden_model
import jax
import numpy as np
import pytest
import training_model
from safetensors.numpy import save_file
from support import assert_close, quick

from sam3_jax import Concept, Prompt, Sam3, Tokenizer
from sam3_jax.inference import predictor, sharding
from sam3_jax.inputs.prompts import BOX_SIZES, exemplar_slots
from sam3_jax.utils.identity import Origin
from sam3_jax.utils.param_tree import nest

BOXES = [[2, 3, 14, 16], [8, 4, 25, 18]]
TWO = Prompt("ear", boxes=BOXES, box_labels=[1, 0])
FIELDS = ("scores", "boxes", "mask_logits", "semantic_logits")
CLOSE = 1e-5


@pytest.fixture(scope="module")
def model(tokenizer_path):
  params, tokenizer = nest(training_model.parameters()), Tokenizer(tokenizer_path, context=8)
  info = {"name": "toy"}
  return quick(Sam3(training_model.CONFIG, params, tokenizer, info=info, dtype="float32"))


@pytest.fixture(scope="module")
def embedding(model):
  rng = np.random.default_rng(0)
  return model.encode([rng.integers(0, 256, (h, w, 3), np.uint8) for h, w in ((20, 30), (24, 24))])


@pytest.fixture(scope="module")
def concept(model, embedding):
  return model.concept(embedding, TWO, 0)


def refused(message):
  return pytest.raises(ValueError, match=message)


def assert_same(got, want, rel=0.0):
  for name in FIELDS:
    assert_close(getattr(got, name), getattr(want, name), rel=rel, what=name)
  np.testing.assert_allclose(got.presence_logit, want.presence_logit, rtol=0, atol=rel)


def test_equals_the_boxes_in_their_own_image(model, embedding, concept):
  assert len(concept) == 2
  assert concept.positive.tolist() == [True, False]
  assert (concept.text, concept.phrase) == ("ear", "ear")
  assert concept.origin == model.origin
  got, want = model.decode(embedding, concept, 0), model.decode(embedding, TWO, 0)
  assert_same(got, want, rel=CLOSE)  # measured 0
  other = model.decode(embedding, concept, 1)
  assert abs(np.asarray(other.scores - want.scores)).max() > 1e-4


def test_save_and_load(model, embedding, concept, tmp_path):
  for number, one in enumerate((concept, dataclasses.replace(concept, text=None))):
    one.save(path := tmp_path / str(number))
    loaded = Concept.load(path)
    assert (loaded.text, loaded.origin, loaded.origin.name) == (one.text, model.origin, "toy")
    np.testing.assert_array_equal(loaded.tokens, one.tokens)
    np.testing.assert_array_equal(loaded.positive, one.positive)
  got, want = (model.decode(embedding, one, 0) for one in (Concept.load(tmp_path / "0"), concept))
  assert_same(got, want)
  embedding.save(tmp_path / "image")
  with refused("but Concept has"):
    Concept.load(tmp_path / "image")
  with pytest.raises(FileNotFoundError):
    Concept.load(tmp_path / "none")


def test_join(model, embedding, concept):
  first = model.concept(embedding, Prompt(boxes=BOXES[:1]), 0)
  second = model.concept(embedding, Prompt("ear", boxes=BOXES[1:], box_labels=[0]), 1)
  joined = Concept.join([first, second])
  together = model.concept(
    embedding, [Prompt(boxes=BOXES[:1]), Prompt("ear", BOXES[1:], [0])], [0, 1]
  )
  assert joined.text == together.text == "ear"
  np.testing.assert_array_equal(joined.tokens, together.tokens)
  np.testing.assert_array_equal(joined.positive, together.positive)
  np.testing.assert_array_equal(joined[:1].tokens, concept[:1].tokens)
  assert Concept.join([first]).text is None


def test_impossible_joins(concept):
  with refused("no concept given"):
    Concept.join([])
  with refused("single phrase; got 'ear' and 'eye'"):
    Concept.join([concept, dataclasses.replace(concept, text="eye")])
  with refused(r"two checkpoints, toy \(.*\) and x \(abc\)"):
    Concept.join([concept, dataclasses.replace(concept, origin=Origin("abc", "x"))])
  with refused("at most 128 exemplars; got 130"):
    Concept.join([concept] * 65)


def test_prompts_without_a_concept(model, embedding):
  with refused("the prompt 'ear' has none; add boxes"):
    model.concept(embedding, "ear", 0)
  with refused("single phrase"):
    model.concept(embedding, [TWO, Prompt("eye", BOXES)], [0, 0])
  with refused("completely outside"):
    model.concept(embedding, Prompt(boxes=[[50, 50, 60, 60]]), 0)
  with refused("the image of each prompt"):
    model.concept(embedding, TWO)
  with refused("at most 128 exemplars; got 130"):
    model.concept(embedding, [Prompt(boxes=BOXES[:1] * 65)] * 2, 0)
  with pytest.raises(TypeError, match="concept takes what encode returns"):
    model.concept(TWO, embedding)


def test_concepts_of_another_model(model, embedding, concept, tmp_path):
  other = dataclasses.replace(concept, origin=Origin("0123456789abcdef", "other"))
  with refused(r"the concept was made by another checkpoint, other \(0123456789ab\), than .* toy"):
    model.decode(embedding, other, 0)
  for wrong in (concept[:0], dataclasses.replace(concept, tokens=concept.tokens[:, :9])):
    with refused("a concept of this model has at least one row of 32 channels"):
      model.decode(embedding, ["ear", wrong], 0)
  with refused("at most 128 exemplars"):
    model.decode(embedding, concept[[0] * 129], 0)
  with refused("the concept has values that are not finite"):
    model.decode(embedding, dataclasses.replace(concept, tokens=concept.tokens * np.nan), 0)
  save_file({"tokens": np.zeros((1, 32), np.float32)}, tmp_path / "cut")
  with refused("Concept has"):
    Concept.load(tmp_path / "cut")


def test_slots(concept):
  assert exemplar_slots(TWO) == 0
  assert [exemplar_slots(concept[[0] * n]) for n in (1, 8, 9, 128)] == [8, 8, *BOX_SIZES[1:] * 2]


@pytest.fixture(scope="module")
def golden(tokenizer_path):
  return golden_pair(tokenizer_path)


def golden_pair(tokenizer_path, mesh=None):
  params, tokenizer = golden_model.parameters(), Tokenizer(tokenizer_path)
  model = Sam3(golden_model.CONFIG, params, tokenizer, dtype="float32", mesh=mesh)
  rng = np.random.default_rng(1)
  images = [rng.integers(0, 256, (40, 60, 3), np.uint8) for _ in range(3)]
  return quick(model), model.encode(images)


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [(1,), (4, 1)], ids=str)
def test_mixed_lists(golden, monkeypatch, at_once):
  """Prompts have the bits that they have without concepts; concepts equal those alone."""
  monkeypatch.setattr(predictor, "prompts_at_once", lambda platform: at_once)
  model, embedding = golden
  few, many = model.concept(embedding, TWO, 1), model.concept(embedding, Prompt(boxes=BOXES * 5), 2)
  assert (len(few), len(many)) == (2, 10)
  prompts, index = [few, "cat", TWO, many, few, "dog"], [0, 0, 1, 2, 2, 0]
  text = model.encode_text(prompts)  # its bits depend on the number of phrases
  found = model.decode(embedding, prompts, index, text=text)
  assert found.image_index.tolist() == index
  queries = golden_model.CONFIG.queries
  assert found.ids[:, 0].tolist() == [1, 1 + queries, 1, 1, 1 + queries, 1 + 2 * queries]
  ordinary = model.decode(embedding, ["cat", TWO, "dog"], [0, 1, 0], text=text[[1, 2, 5]])
  assert_same(found[[1, 2, 5]], ordinary)
  for row, (prompt, image) in enumerate(zip(prompts, index, strict=True)):
    alone = model.decode(embedding[image : image + 1], prompt)
    assert_same(found[row : row + 1], alone, rel=CLOSE)  # measured 2e-6
  scored = model.decode(embedding, prompts, index, max_detections=3, min_score=0.999)
  assert not scored.mask_logits.any()


@pytest.mark.slow
def test_on_a_mesh(golden, tokenizer_path):
  model, embedding = golden
  sharded, sharded_embedding = golden_pair(tokenizer_path, sharding.make_mesh(jax.devices()[:4]))
  prompts = [TWO, Prompt(boxes=BOXES * 3), Prompt("ear", [[1, 1, 9, 9]])]
  want, got = model.concept(embedding, prompts, [0, 1, 2]), None
  got = sharded.concept(sharded_embedding, prompts, [0, 1, 2])
  assert_close(got.tokens, want.tokens, rel=CLOSE)
  np.testing.assert_array_equal(got.positive, want.positive)
  queries, index = [got, "cat", got[:2], got[2:4]], [0, 1, 2, 2]
  found = sharded.decode(sharded_embedding, queries, index)
  assert_same(found, model.decode(embedding, [want, "cat", want[:2], want[2:4]], index), rel=CLOSE)
