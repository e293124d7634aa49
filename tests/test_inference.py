"""Sam3 on the tiny model: batching, invariances, identities, compilations, errors."""

import functools
import io
import os
import subprocess
import sys
import textwrap

import golden_model
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from support import QUICK, assert_close, quick

from sam3_jax import ImageEmbedding, Prompt, Sam3, Tokenizer
from sam3_jax.inference import output_buffer, predictor, sharding
from sam3_jax.inference.concepts import ConceptDecoder
from sam3_jax.model.sam3 import Detector
from sam3_jax.outputs.detections import Detections
from sam3_jax.types import Prompts, TextEmbedding

QUERIES = golden_model.CONFIG.queries
# Sizes of batches change the order of sums: scores and boxes differ by 3e-7, masks by 2e-6 of their
# largest value.
CLOSE = 1e-5


@pytest.fixture(scope="module")
def model(tokenizer_path):
  return made(tokenizer_path)


def made(tokenizer_path, dtype="float32"):
  return quick(
    Sam3(golden_model.CONFIG, golden_model.parameters(), Tokenizer(tokenizer_path), dtype=dtype)
  )


@pytest.fixture(autouse=True)
def batches(monkeypatch):
  """Uses the batch sizes of an accelerator."""
  monkeypatch.setattr(predictor, "prompts_at_once", lambda platform: (4, 1))


@pytest.fixture(scope="module")
def images():
  sizes = [(40, 60), (33, 20), (1, 1), (100, 100), (64, 48)]
  rng = np.random.default_rng(0)
  return [rng.integers(0, 256, (h, w, 3), np.uint8) for h, w in sizes]


@pytest.fixture(scope="module")
def embedding(model, images):
  return model.encode(images)


PROMPTS = [
  "yellow school bus",
  Prompt(boxes=[[3, 4, 20, 30]]),
  Prompt("ear", boxes=[[0, 0, 10, 10], [5, 5, 15, 20]], box_labels=[1, 0]),
  "cat",
  Prompt("dog", boxes=[[1, 1, 9, 9]] * 9),
  "ear",
]
INDEX = [0, 0, 3, 3, 0, 4]


def assert_same(got: Detections, want: Detections):
  for name in ("scores", "boxes", "mask_logits", "semantic_logits"):
    assert_close(getattr(got, name), getattr(want, name), rel=CLOSE)
  np.testing.assert_allclose(got.presence_logit, want.presence_logit, atol=CLOSE)  # measured 3.9e-6
  for name in ("image_index", "sizes", "ids"):
    np.testing.assert_array_equal(getattr(got, name), getattr(want, name))


@pytest.mark.slow
def test_shapes_and_dtypes(model, embedding):
  found = model.decode(embedding, PROMPTS, INDEX)
  size = golden_model.CONFIG.mask_size
  assert found.scores.shape == (6, QUERIES)
  assert found.mask_logits.shape == (6, QUERIES, size, size)
  assert found.semantic_logits.shape == (6, size, size)
  assert found.image_index.tolist() == INDEX
  assert found.sizes.tolist()[2] == [100, 100]
  assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype("float32"), jnp.dtype("int32")}
  assert ((found.scores >= 0) & (found.scores <= 1)).all()


@pytest.mark.slow
def test_equals_the_module(model, embedding):
  """Compares with one call of the module."""
  found = model.decode(embedding, Prompt("ear", [[6, 4, 30, 20]]), 0)
  text = model.encode_text("ear")
  box = jnp.array([[[18 / 60, 12 / 40, 24 / 60, 16 / 40]]])
  true, zero = jnp.ones((1, 1), bool), jnp.zeros(1, jnp.int32)
  prompts = Prompts(zero, zero, text, box, true, true)
  detect = functools.partial(Detector(golden_model.CONFIG).apply, method=Detector.detect)
  detect = jax.jit(detect, compiler_options=QUICK)
  want = detect({"params": model.params}, embedding[:1], prompts)
  assert_same(found, want.replace(ids=want.ids + 1))


@pytest.mark.slow
def test_one_call_equals_one_by_one(model, embedding):
  together = model.decode(embedding, PROMPTS, INDEX)
  for i, (prompt, image) in enumerate(zip(PROMPTS, INDEX, strict=True)):
    alone = model.decode(embedding[image : image + 1], prompt)
    first = sum(other == image for other in INDEX[:i]) * QUERIES
    alone = alone.replace(ids=alone.ids + first, image_index=jnp.array([image]))
    assert_same(together[i : i + 1], alone)


@pytest.mark.slow
def test_order_of_prompts_does_not_matter(model, embedding):
  order = np.array([4, 2, 0, 5, 3, 1])
  want = model.decode(embedding, PROMPTS, INDEX)
  got = model.decode(embedding, [PROMPTS[i] for i in order], [INDEX[i] for i in order])
  back = got[np.argsort(order)]
  assert_same(back.replace(ids=want.ids), want)


def test_images_in_one_call_equal_images_one_by_one(model, images, embedding):
  for i, image in enumerate(images):
    alone = model.encode(image)
    for name in ("fine", "middle", "coarse", "attended"):
      assert_close(getattr(alone, name), getattr(embedding[i : i + 1], name), rel=CLOSE)
    assert alone.sizes.tolist() == [list(image.shape[:2])]


def test_image_sources_give_the_same(model, images, tmp_path):
  image = images[0]
  source_image = Image.fromarray(image)
  source_image.save(tmp_path / "a.png")
  file = io.BytesIO()
  source_image.save(file, "png")
  sources = [image, source_image, tmp_path / "a.png", str(tmp_path / "a.png"), file.getvalue()]
  found = [model.encode(source).coarse for source in sources]
  for other in found[1:]:
    np.testing.assert_array_equal(other, found[0])


def test_saved_embedding_equals_direct_call(model, embedding, tmp_path):
  embedding[3:4].save(tmp_path / "image")
  model.encode_text(PROMPTS).save(tmp_path / "text")
  cached, text = ImageEmbedding.load(tmp_path / "image"), TextEmbedding.load(tmp_path / "text")
  prompt = Prompt("ear", boxes=[[0, 0, 10, 10], [5, 5, 15, 20]], box_labels=[1, 0])
  want = model.decode(embedding, prompt, 3)
  got = model.decode(cached, prompt, text=text[2:3])
  assert_same(got.replace(image_index=want.image_index), want)


@pytest.mark.slow
def test_max_detections(model, embedding):
  every = model.decode(embedding, PROMPTS, INDEX)
  some = model.decode(embedding, PROMPTS, INDEX, max_detections=4)
  order = np.argsort(-np.asarray(every.scores), axis=1, kind="stable")[:, :4]
  rows = np.arange(len(PROMPTS))[:, None]
  np.testing.assert_array_equal(some.ids, np.asarray(every.ids)[rows, order])
  assert_close(some.scores, every.scores[rows, order], rel=CLOSE)
  assert_close(some.boxes, every.boxes[rows, order], rel=CLOSE)
  assert_close(some.mask_logits, every.mask_logits[rows, order], rel=CLOSE)
  assert (np.diff(some.scores, axis=1) <= 0).all()
  assert model.decode(embedding, "a", 0, max_detections=999).scores.shape == (1, QUERIES)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("index", "left_out"), [(INDEX, 0), (INDEX, 4), (INDEX, 6), (0, 3)], ids=str
)
def test_prompts_below_min_score_have_no_masks(model, embedding, index, left_out):
  every = model.decode(embedding, PROMPTS, index)
  best = np.asarray(every.scores).max(axis=1)
  between = np.append(np.sort(best), 1)[left_out - 1 : left_out + 1]
  limit = float(between.mean()) if left_out else 1e-9
  some = model.decode(embedding, PROMPTS, index, min_score=limit)
  some, every = jax.device_get((some, every))
  masked = best > limit
  assert masked.sum() == 6 - left_out
  assert_same(some[masked], every[masked])
  blank = every.replace(
    mask_logits=np.zeros_like(every.mask_logits),
    semantic_logits=np.zeros_like(every.semantic_logits),
  )
  assert_same(some[~masked], blank[~masked])


@pytest.mark.parametrize("min_score", [0.0, 0.5])
@pytest.mark.slow
def test_masks_beyond_the_budget_are_on_the_host(model, embedding, min_score):
  want = model.decode(embedding, PROMPTS, INDEX, min_score=min_score)
  size = want.mask_logits.nbytes + want.semantic_logits.nbytes
  fits = model.decode(embedding, PROMPTS, INDEX, min_score=min_score, memory_budget=size)
  got = model.decode(embedding, PROMPTS, INDEX, min_score=min_score, memory_budget=size - 1)
  assert isinstance(fits.mask_logits, jax.Array)
  assert isinstance(got.mask_logits, np.ndarray)
  assert isinstance(got.semantic_logits, np.ndarray)
  assert_same(got, want)
  for one, other in zip(got.instances(0.5), want.instances(0.5), strict=True):
    assert [one.masks[i].sum() for i in range(len(one))] == [
      other.masks[i].sum() for i in range(len(other))
    ]


@pytest.mark.parametrize(("min_score", "decodings"), [(0.0, 0), (1e-9, 1)])
def test_too_little_memory_for_masks(model, embedding, monkeypatch, min_score, decodings):
  """Raises before any computation, or after the scores if the masks depend on them."""
  runs, run = [], ConceptDecoder._run
  monkeypatch.setattr(ConceptDecoder, "_run", lambda *args: runs.append(args) or run(*args))
  monkeypatch.setattr(output_buffer, "free_memory", lambda: 0)
  with pytest.raises(ValueError, match=r"the masks of .* take 0.0 GB, .*max_detections"):
    model.decode(embedding, PROMPTS[:2], 0, min_score=min_score, memory_budget=0)
  assert len(runs) == decodings
  assert model.decode(embedding, PROMPTS[:2], 0).scores.shape == (2, QUERIES)


def test_ids_are_unique_in_an_image(model, embedding):
  found = model.decode(embedding, PROMPTS, INDEX)
  for image in set(INDEX):
    ids = np.concatenate([found.ids[i] for i, other in enumerate(INDEX) if other == image])
    assert len(set(ids.tolist())) == len(ids)
    assert ids.min() == 1


def test_instances_have_source_pixels(model, embedding):
  found = model.decode(embedding, ["cat", "dog"], [0, 3])
  cats, dogs = found.instances(threshold=[0.0, 0.0])
  assert len(cats) == len(dogs) == QUERIES
  assert cats.masks[0].shape == (40, 60)
  assert dogs.masks[0].shape == (100, 100)
  best = int(np.argmax(found.scores[0]))
  np.testing.assert_allclose(
    cats.boxes[0], found.boxes[0, best] * np.array([60, 40, 60, 40]), rtol=1e-6
  )
  assert len(found.instances(threshold=1.0)[0]) == 0


def test_batch_sizes_of_a_cpu(model, embedding, monkeypatch):
  together = model.decode(embedding, PROMPTS, INDEX)
  monkeypatch.undo()
  assert predictor.prompts_at_once("cpu") == (1,)
  assert_same(model.decode(embedding, PROMPTS, INDEX), together)


@pytest.mark.parametrize("place", [{"device": "cpu"}, {"mesh": True}, {}])
def test_defaults_follow_the_devices_of_the_model(model, monkeypatch, place):
  """JAX's default backend may be another one, such as a GPU beside this CPU."""
  place = {"mesh": sharding.make_mesh(jax.devices("cpu")[:1])} if "mesh" in place else place
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  own = predictor.Sam3(model.config, jax.device_get(model.params), model.tokenizer, **place)
  assert own.platform == "cpu"
  assert own.dtype == "float32"


@pytest.mark.slow
def test_few_compilations(model, images, monkeypatch):
  """Any mix of prompts, boxes and images takes at most 6 programs. The program computes nothing, as
  only shapes matter."""

  def nothing(params, embedding, prompts, max_detections):
    rows, side = len(prompts.image), golden_model.CONFIG.mask_size
    seen, found = prompts.image, jnp.zeros((rows, QUERIES))
    masks = jnp.zeros((*found.shape, side, side))
    boxes, sizes = jnp.zeros((*found.shape, 4)), embedding.sizes[seen]
    ids = jnp.zeros(found.shape, jnp.int32)
    return Detections(found, boxes, masks, jnp.zeros(rows), masks[:, 0], seen, sizes, ids)

  detect = jax.jit(nothing, static_argnames="max_detections")
  monkeypatch.setattr(model.programs.prompts, "detect", detect)
  before = model.compilations
  rng = np.random.default_rng(1)
  for count in (1, 2, 3, 4, 5, 7, 11):
    embedding = model.encode([images[3]] * int(rng.integers(1, 6)))
    boxes = [int(rng.choice([0, 1, 8, 9, 100])) for _ in range(count)]
    prompts = [Prompt("a", [[1, 1, 9, 9]] * n) for n in boxes]
    model.decode(embedding, prompts, rng.integers(0, len(embedding), count))
  assert 0 < model.compilations - before <= 6


@pytest.mark.slow
def test_bfloat16_stays_close(model, embedding, images, tokenizer_path):
  half = made(tokenizer_path, "bfloat16")
  got = half.decode(half.encode(images[3]), "ear")
  want = model.decode(embedding, "ear", 3)
  assert got.scores.dtype == got.boxes.dtype == got.presence_logit.dtype == jnp.float32
  assert got.mask_logits.dtype == jnp.bfloat16
  assert_close(got.boxes, want.boxes, rel=0.02)  # measured 3.8e-3
  assert_close(got.scores, want.scores, rel=0.1)  # measured 3.8e-2


@pytest.mark.slow
def test_save_and_load(model, embedding, tmp_path):
  model.save(tmp_path / "bundle")
  again = quick(Sam3.from_checkpoint(tmp_path / "bundle", verify=True))
  assert again.config == model.config
  assert_same(again.decode(embedding, "ear", 3), model.decode(embedding, "ear", 3))


@pytest.mark.parametrize(
  ("prompts", "index", "settings", "message"),
  [
    ([], None, {}, "no prompt given"),
    ("a", None, {}, "the embedding has 5 images"),
    ("a", 5, {}, "image_index 5 is not in the embedding"),
    ("a", -1, {}, "image_index -1 is not in the embedding"),
    (["a", "b"], [0], {}, "for each of 2 prompts"),
    ("a", [0.5], {}, "for each of 1 prompts"),
    (Prompt(boxes=[[90, 0, 95, 5]]), 0, {}, "completely outside the 60 x 40 image"),
    (["a", "b"], [[0], [0, 1]], {}, "for each of 2 prompts"),
    ("a", 0, {"min_score": "a"}, r"min_score must be in \[0, 1\]; got 'a'"),
    ("a", 0, {"max_detections": 0}, "max_detections must be 1, 2, .. or None"),
    ("a", 0, {"max_detections": True}, "max_detections must be 1, 2, .. or None"),
    ("a", 0, {"min_score": 1.5}, r"min_score must be in \[0, 1\]; got 1.5"),
    ("a", 0, {"min_score": float("nan")}, r"min_score must be in \[0, 1\]; got nan"),
    ("a", 0, {"memory_budget": -1}, "memory_budget must be a number of bytes; got -1"),
  ],
)
def test_errors_are_one_line(model, embedding, prompts, index, settings, message):
  with pytest.raises(ValueError, match=message) as caught:
    model.decode(embedding, prompts, index, **settings)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [1.5, -1, "3"])
def test_max_detections_is_a_positive_integer(model, embedding, value):
  with pytest.raises(ValueError, match="max_detections must be 1, 2"):
    model.decode(embedding, "a", 0, max_detections=value)


def test_wrong_types(model, embedding):
  with pytest.raises(TypeError, match="decode takes what encode returns"):
    model.decode("a.jpg", "cat")
  with pytest.raises(TypeError, match="text must be what encode_text returns"):
    model.decode(embedding, "cat", 0, text="cat")


@pytest.mark.parametrize("dtype", ["int8", "float16", "bogus"])
def test_unknown_dtypes(model, dtype):
  with pytest.raises(ValueError, match=f"float32 or bfloat16; got .*{dtype}"):
    Sam3(model.config, model.params, model.tokenizer, dtype=dtype)


def test_text_needs_one_row_per_prompt(model, embedding):
  with pytest.raises(ValueError, match="text has 1 rows for 2 prompts"):
    model.decode(embedding, ["a", "b"], 0, text=model.encode_text("a"))


def test_no_image(model):
  with pytest.raises(ValueError, match="no image given"):
    model.encode([])


@pytest.mark.slow
def test_three_hundred_phrases(model, images):
  """On four images in one call; compares every tenth phrase with a call of its own."""
  embedding = model.encode(images[:4])
  phrases = [f"{color} thing {i}" for i, color in enumerate(["red", "blue", "old"] * 100)]
  index = np.arange(300) % 4
  together, tenth = model.decode(embedding, phrases, index), slice(0, 300, 10)
  alone = []
  for phrase, image in zip(phrases[tenth], index[tenth].tolist(), strict=True):
    found = model.decode(embedding, phrase, image)
    alone.append([np.array(x) for x in (found.scores, found.boxes, found.mask_logits[:, 0])])
  together = together.scores, together.boxes, together.mask_logits[:, 0]
  for got, parts in zip(together, zip(*alone, strict=True), strict=True):
    assert_close(got[tenth], np.concatenate(parts), rel=CLOSE)


@pytest.mark.slow
def test_memory_stays_flat():
  """Compares the minimum of resident memory after calls 6 to 10 and 296 to 300, in a subprocess."""
  script = """
    import ctypes, resource, numpy as np, sam3_jax
    model = sam3_jax.Sam3.from_checkpoint(sam3_jax.find_checkpoint("sam3_tiny"))
    embedding = model.encode([np.full((50, 60, 3), i, np.uint8) for i in range(4)])
    seen = {}
    for call in range(1, 301):
      model.decode(embedding, f"thing {call}", call % 4).scores.block_until_ready()
      if call in range(6, 11) or call > 295:
        ctypes.CDLL(None).malloc_trim(0)  # what the heap keeps in its gaps is no leak
        seen[call] = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
    print(min(seen[n] for n in range(6, 11)), min(seen[n] for n in range(296, 301)))
  """
  # One arena: glibc's others fill up in their own time and hide the rest.
  run = subprocess.run(
    [sys.executable, "-c", textwrap.dedent(script)],
    env=os.environ | {"MALLOC_ARENA_MAX": "1"},
    capture_output=True, text=True, check=True,
  )  # fmt: skip
  early, late = map(int, run.stdout.split())
  assert late <= 1.003 * early  # measured 1.0003
