"""The engine on several devices equals `Sam3` on one, whatever the batch; and `Segmenter`."""

import dataclasses
import json

import golden_model
import jax
import numpy as np
import pytest
from PIL import Image
from support import assert_close, visual_model

from sam3_jax import Prompt, Sam3, Tokenizer, VisualPrompt
from sam3_jax.batch import engine as engines
from sam3_jax.batch import segmenter
from sam3_jax.batch.engine import Engine, Slot
from sam3_jax.inference import sharding
from sam3_jax.inputs.concept import ConceptFile
from sam3_jax.inputs.preprocess import resize

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

THRESHOLD = 0.002  # two fifths of the best six of each prompt are below it
CLOSE = 1e-5
PROMPTS = [
  ["cat", "dog", "ear", Prompt(boxes=[[1, 1, 9, 9]])], ["cat"], [Prompt("dog", [[2, 3, 9, 9]])], [],
  ["cat", "ear", "dog"],
]  # fmt: skip
BOX = [1, 1, 9, 9]
VISUAL_PROMPTS = [
  [VisualPrompt([[5, 6]]), "cat", VisualPrompt([[5, 6], [9, 3]], [1, 0]), VisualPrompt([[60, 40]])],
  [VisualPrompt(box=BOX), "cat"], [VisualPrompt([[1, 1], *[[7, 7]] * 3]), VisualPrompt([[7, 7]])],
  [], ["cat", VisualPrompt([[3, 3]], box=BOX), "ear", "dog"],
]  # fmt: skip


@pytest.fixture(scope="module")
def images():
  rng = np.random.default_rng(0)
  sizes = ((40, 60), (33, 20), (64, 48), (9, 9), (30, 30))
  return [rng.integers(0, 256, (*size, 3), np.uint8) for size in sizes]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_path):
  return Tokenizer(tokenizer_path)


@pytest.fixture(scope="module")
def model(tokenizer):
  mesh = sharding.make_mesh(jax.devices()[:4])
  params = golden_model.parameters() | {"visual": golden_model.visual_parameters()}
  return Sam3(golden_model.CONFIG, params, tokenizer, dtype="float32", mesh=mesh)


@pytest.fixture(scope="module")
def engine(model):
  """Two images per device, so that the third device has one and the fourth none."""
  return Engine(model, threshold=THRESHOLD, images=2, prompts=2, max_detections=6, visual=True)


def slots(images, prompts=PROMPTS):
  return [
    Slot(
      resize(image, golden_model.CONFIG.image_size),
      image.shape[:2],
      [Prompt(prompt) if isinstance(prompt, str) else prompt for prompt in own],
    )
    for image, own in zip(images, prompts, strict=True)
  ]


@pytest.fixture(scope="module")
def found(engine, images):
  pending = engine.start(slots(images))
  results = pending.instances()
  assert pending.ready > pending.started
  return results


@pytest.mark.slow
def test_equals_one_device(found, tokenizer, images):
  alone = Sam3(golden_model.CONFIG, golden_model.parameters(), tokenizer, dtype="float32")
  embedding = alone.encode(images)
  count = 0
  for i, (prompts, got) in enumerate(zip(PROMPTS, found, strict=True)):
    assert len(prompts) == len(got)
    if not prompts:
      continue
    want = alone.decode(embedding, prompts, i, max_detections=6).instances(THRESHOLD)
    for ours, theirs in zip(got, want, strict=True):
      count += len(theirs)
      np.testing.assert_array_equal(ours.ids, theirs.ids)
      np.testing.assert_allclose(ours.scores, theirs.scores, atol=CLOSE)  # measured 6e-7
      assert_close(ours.boxes, theirs.boxes, rel=CLOSE)
      if len(theirs):
        assert_close(ours.masks.logits, theirs.masks.logits, rel=CLOSE)  # measured 2e-6
      assert ours.masks.size == theirs.masks.size
  assert count > 10


@pytest.mark.slow
def test_results_do_not_depend_on_other_images(engine, found, images):
  """Bit for bit, so that a resumed job has the bytes of an undisturbed one."""
  some = slots(images)
  some[1] = None
  got = engine.start(some).instances()
  assert got[1] == []
  for i in (0, 2, 4):
    assert_same(got[i], found[i])


def assert_same(got, wanted, but=()):
  for ours, theirs in zip(got, wanted, strict=True):
    for field in dataclasses.fields(ours):
      if field.name not in ("masks", *but):
        np.testing.assert_array_equal(getattr(ours, field.name), getattr(theirs, field.name))
    np.testing.assert_array_equal(ours.masks.logits, theirs.masks.logits)


@pytest.fixture(scope="module")
def pointed(engine, images):
  return engine.start(slots(images, VISUAL_PROMPTS)).instances()


@pytest.mark.slow
def test_visual_prompts_equal_the_direct_call(pointed, images, tokenizer_path):
  alone = visual_model(tokenizer_path)
  embedding = alone.encode(images, visual=True)
  count = 0
  for i, (prompts, got) in enumerate(zip(VISUAL_PROMPTS, pointed, strict=True)):
    for number, (prompt, ours) in enumerate(zip(prompts, got, strict=True)):
      if isinstance(prompt, VisualPrompt):
        masks = alone.decode_visual(embedding, prompt, i, multimask=prompt.is_ambiguous)
        [theirs] = masks.instances()
        count += len(theirs)
        assert ours.ids.tolist() == [1 + golden_model.CONFIG.queries * number] * len(theirs)
        np.testing.assert_allclose(ours.scores, theirs.scores, atol=CLOSE)
        np.testing.assert_array_equal(ours.boxes, theirs.boxes)
        assert_close(ours.masks.logits, theirs.masks.logits, rel=CLOSE)
  assert count > 4


@pytest.mark.slow
def test_phrases_are_independent_of_visual_prompts(model, found, pointed, images):
  """Bit for bit, with and without visual prompts, except ids, which count the prompts."""
  plain = Engine(model, threshold=THRESHOLD, images=2, prompts=2, max_detections=6)
  for ours, theirs in zip(plain.start(slots(images)).instances(), found, strict=True):
    assert_same(ours, theirs)
  assert_same([pointed[4][i] for i in (0, 2, 3)], found[4], but=["ids"])


@pytest.mark.slow
def test_visual_prompts_do_not_depend_on_other_images(engine, pointed, images):
  some = slots(images, VISUAL_PROMPTS)
  some[1] = some[2] = None
  got = engine.start(some).instances()
  for i in (0, 4):
    assert_same(got[i], pointed[i])


@pytest.fixture(scope="module")
def concepts(model, images):
  """A concept of two exemplars and one of ten, as prompts of three images."""
  embedding = model.encode(images[:2])
  few = model.concept(embedding, Prompt("ear", [[1, 1, 9, 9], [3, 3, 20, 20]], [1, 0]), 1)
  many = model.concept(embedding, Prompt(boxes=[[1, 1, 9, 9], [2, 3, 30, 20]] * 5), 0)
  few, many = ConceptFile("few", "0", few), ConceptFile("many", "1", many)
  return [["cat", few, "dog", "ear", many, few], [few], [Prompt("dog", [[2, 3, 9, 9]])], [], [many]]


@pytest.fixture(scope="module")
def decoded(engine, images, concepts):
  return engine.start(slots(images, concepts)).instances()


@pytest.mark.slow
def test_concepts_equal_one_device(engine, concepts, decoded, found, images, tokenizer):
  """And do not change phrases, bit for bit."""
  assert_same([decoded[0][i] for i in (0, 2, 3)], found[0][:3], but=["ids"])
  assert_same(decoded[2], found[2])
  some = slots(images, concepts)
  some[1] = some[4] = None
  assert_same(engine.start(some).instances()[0], decoded[0])
  alone = Sam3(golden_model.CONFIG, golden_model.parameters(), tokenizer, dtype="float32")
  embedding = alone.encode(images)
  count = 0
  for i, (prompts, got) in enumerate(zip(concepts, decoded, strict=True)):
    own = [dataclasses.replace(one.concept, origin=alone.origin) if isinstance(one, ConceptFile)
           else one for one in prompts]  # fmt: skip
    want = alone.decode(embedding, own, i, max_detections=6).instances(THRESHOLD) if own else []
    for ours, theirs in zip(got, want, strict=True):
      count += len(theirs)
      np.testing.assert_array_equal(ours.ids, theirs.ids)
      np.testing.assert_allclose(ours.scores, theirs.scores, atol=CLOSE)
      if len(theirs):
        assert_close(ours.masks.logits, theirs.masks.logits, rel=CLOSE)
  assert count > 4


@pytest.mark.slow
def test_number_of_compiled_programs(engine, pointed, decoded):
  """One for images and one for prompts of up to eight boxes; for visual prompts one for the second
  neck, and one for each of two numbers of points; for concepts, one for up to eight exemplars and
  one for more."""
  assert engine._encode._cache_size() == 1
  assert engine._detect._cache_size() == 3
  assert (engine._encode_visual._cache_size(), engine._answer._cache_size()) == (1, 2)


def test_fetches_only_as_many_masks_as_needed(engine, images, monkeypatch):
  counts = []
  monkeypatch.setattr(
    engines, "_first", lambda masks, count: counts.append(count) or masks[:, :count]
  )
  monkeypatch.setattr(engine, "_threshold", 1.0)
  [results] = engine.start(slots(images)[:1]).instances()
  assert [len(instances) for instances in results] == [0] * 4
  assert counts == [1, 1]


def test_empty_batches(engine):
  assert engine.start([None, None]).instances() == [[], []]
  assert engine.start([]).instances() == []


def test_model_without_a_mesh_is_refused(tokenizer):
  alone = Sam3(golden_model.CONFIG, golden_model.parameters(), tokenizer, dtype="float32")
  with pytest.raises(ValueError, match=r"the model needs a mesh"):
    Engine(alone, threshold=0.5)


class TestSegmenter:
  @pytest.fixture
  def worker(self, model, engine, monkeypatch):
    """A Segmenter that uses the model and the compiled programs of this module."""
    monkeypatch.setattr(segmenter.Sam3, "from_checkpoint", lambda *_, **__: model)
    monkeypatch.setattr(segmenter, "Engine", lambda *_, **__: engine)
    return segmenter.Segmenter(["cat", "ear"], threshold=THRESHOLD)

  def test_batch_larger_than_that_of_the_engine(self, worker, found, images):
    """Twelve rows for an engine of eight; two are faulty, and one has its own prompts."""
    column = np.empty(12, object)
    column[:] = [images[i % 5] for i in range(12)]
    column[7] = np.zeros((2, 2), np.float32)
    own = [None] * 12
    own[11] = json.dumps([{"text": "dog", "boxes": [[2, 3, 9, 9]]}])
    own[10] = json.dumps([{"boxes": [[900, 900, 950, 950]]}])
    paths = np.array([f"{i}.png" for i in range(12)])
    got = worker({"image": column, "path": paths, "prompts": own, "label": list(range(12))})
    assert set(got) == {"path", "prompts", "label", "record", "error"}
    assert {len(values) for values in got.values()} == {12}
    assert "must be uint8" in got["error"][7]
    assert "completely outside" in got["error"][10]
    assert [i for i, error in enumerate(got["error"]) if error] == [7, 10]
    assert [i for i, record in enumerate(got["record"]) if not record] == [7, 10]
    for i, line in enumerate(got["record"]):
      if line:
        record = json.loads(line)
        assert record["image"] == f"{i}.png"
        assert (record["height"], record["width"]) == images[i % 5].shape[:2]
        assert len(record["prompts"]) == (1 if i == 11 else 2)
    cat = json.loads(got["record"][5])["prompts"][0]["instances"]
    assert [one["id"] for one in cat] == found[0][0].ids.tolist()
    np.testing.assert_allclose([one["score"] for one in cat], found[0][0].scores, atol=CLOSE)

  def test_visual_prompts(self, worker, images, tokenizer, model, monkeypatch):
    own = [json.dumps([{"points": [point]}, "cat"]) for point in ([5, 6], [5, 41])]
    got = worker({"image": images[:1] * 2, "prompts": own})
    click, cat = json.loads(got["record"][0])["prompts"]
    assert click["points"] == [[5, 6]]
    assert [one["id"] for one in click["instances"]] == [1]
    assert cat["text"] == "cat"
    assert "point [5, 41] is outside the 60 x 40 image" in got["error"][1]
    bare = Sam3(
      golden_model.CONFIG, golden_model.parameters(), tokenizer, dtype="float32", mesh=model.mesh
    )
    monkeypatch.setattr(segmenter.Sam3, "from_checkpoint", lambda *_, **__: bare)
    got = segmenter.Segmenter()({"image": images[:1], "prompts": own[:1]})
    assert "this checkpoint has no head for visual prompts" in got["error"][0]

  def test_too_long_phrases(self, worker, images):
    own = [json.dumps(["cat " * 40]), json.dumps(["cat"])]
    got = worker({"image": images[:1] * 2, "prompts": own})
    assert "tokens, and at most" in got["error"][0]
    assert [bool(one) for one in got["error"]] == [True, False]
    with pytest.raises(ValueError, match="tokens, and at most"):
      segmenter.Segmenter(["cat " * 40])

  def test_column_of_file_bytes(self, worker, images, tmp_path):
    Image.fromarray(images[0]).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    by_file = worker({"bytes": [data, b"broken", b""]})
    by_pixels = worker({"image": [images[0]]})
    assert by_file["record"][0] == by_pixels["record"][0]
    assert [bool(one) for one in by_file["error"]] == [False, True, True]

  def test_faulty_batches(self, worker, model, monkeypatch):
    with pytest.raises(ValueError, match=r"a column image or bytes; got \['pixels'\]"):
      worker({"pixels": []})
    bare = segmenter.Segmenter()
    got = bare({"image": [np.zeros((3, 3, 3), np.uint8)]})
    assert "it has no prompts" in got["error"][0]
    pixels, faults = np.zeros((3, 3, 3), np.uint8), ["{", "[]", '["cat", 3]', 5]
    errors = worker({"image": [pixels] * len(faults), "prompts": faults})["error"]
    assert errors[0].startswith("prompts must be a JSON list; '{' is not valid JSON: Expecting")
    assert all("prompt" in error for error in errors)
    assert worker({"image": []})["record"].shape == (0,)
