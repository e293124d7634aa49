"""Checkpoints by name, and the model card's call."""

import sys
from pathlib import Path

import numpy as np
import pytest

import sam3_jax
from sam3_jax import hub


@pytest.fixture(scope="module")
def segmenter():
  return sam3_jax.SAM3PromptableConceptImageSegmenter.from_preset("sam3_tiny")


def card(batch=2, size=128):
  """The input of the card's example."""
  return {
    "images": np.ones((batch, size, size, 3), dtype="float32"),
    "prompts": ["ear", "head"],
    "boxes": np.ones((batch, 1, 4), dtype="float32"),
    "box_labels": np.ones((batch, 1), dtype="int32"),
  }


def test_the_card_as_printed(segmenter):
  outputs = segmenter.predict(card())
  config = segmenter.model.config
  queries, size = config.queries, config.mask_size
  assert outputs["scores"].shape == (2, queries)
  assert outputs["boxes"].shape == (2, queries, 4)
  assert outputs["masks"].shape == (2, queries, size, size)
  assert all(type(x) is np.ndarray and np.isfinite(x).all() for x in outputs.values())
  assert ((outputs["masks"] >= 0) & (outputs["masks"] <= 1)).all()


def test_equals_decode(segmenter):
  """The adapter against the API that it adapts."""
  inputs = card() | {"boxes": np.array([[[5, 6, 50, 60]], [[0, 0, 128, 64]]], np.float32)}
  inputs["images"] = np.random.default_rng(0).uniform(0, 255, (2, 128, 128, 3)).astype("float32")
  outputs = segmenter.predict(inputs)
  model = segmenter.model
  embedding = model.encode(list(np.rint(inputs["images"]).astype(np.uint8)))
  prompts = [
    sam3_jax.Prompt(text, boxes)
    for text, boxes in zip(inputs["prompts"], inputs["boxes"], strict=True)
  ]
  found = model.decode(embedding, prompts, [0, 1])
  np.testing.assert_allclose(outputs["scores"], found.scores, atol=1e-6)
  np.testing.assert_allclose(outputs["boxes"], found.boxes, atol=1e-6)
  with np.errstate(over="ignore"):
    masks = 1 / (1 + np.exp(-np.asarray(found.mask_logits, np.float64)))
  np.testing.assert_allclose(outputs["masks"], masks, atol=1e-6)


@pytest.mark.parametrize("left_out", [("boxes", "box_labels"), ("box_labels",), ("prompts",)])
def test_keys_may_be_left_out(segmenter, left_out):
  inputs = {key: value for key, value in card().items() if key not in left_out}
  assert segmenter.predict(inputs)["scores"].shape[0] == 2


def test_padding_boxes_are_no_boxes(segmenter):
  inputs = card() | {"box_labels": np.full((2, 1), -10)}
  text_only = {key: inputs[key] for key in ("images", "prompts")}
  np.testing.assert_allclose(
    segmenter.predict(inputs)["scores"], segmenter.predict(text_only)["scores"], atol=1e-6
  )


def test_one_image_without_a_batch(segmenter):
  inputs = {
    "images": np.zeros((30, 20, 3), np.uint8),
    "prompts": "ear",
    "boxes": np.array([[1, 2, 3, 4]]),
    "box_labels": np.array([1]),
  }
  assert segmenter.predict(inputs)["scores"].shape[0] == 1


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"images": np.full((2, 8, 8, 3), 256.0)}, "must have values 0..255; got 256.0 to 256.0"),
    ({"images": np.full((2, 8, 8, 3), -1)}, "must have values 0..255"),
    ({"images": np.full((2, 8, 8, 3), np.nan)}, "must have values 0..255"),
    ({"images": np.zeros((2, 8, 8, 4))}, r"images must be \[B, h, w, 3\]"),
    ({"images": None}, "inputs need images"),
    ({"prompts": ["ear"]}, "2 images need as many prompts"),
    ({"boxes": np.ones((2, 4))}, r"boxes must be \[B, N, 4\]"),
    ({"boxes": np.ones((2, 1, 3))}, r"boxes must be \[B, N, 4\]"),
    ({"box_labels": np.ones((2, 2))}, r"boxes must be \[B, N, 4\]"),
    ({"box_labels": np.full((2, 1), 7)}, "box labels are 1"),
    ({"prompts": None, "boxes": None, "box_labels": None}, "needs a phrase or a box"),
    ({"prompts": None, "box_labels": np.full((2, 1), -10)}, "needs a phrase or a box"),
    ({"points": 1}, "unknown inputs"),
  ],
)
def test_faults_are_one_line(segmenter, change, message):
  with pytest.raises(ValueError, match=message) as caught:
    segmenter.predict(card() | change)
  assert "\n" not in str(caught.value)


def test_where_checkpoints_are_looked_for(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("SAM3_JAX_CHECKPOINTS", str(tmp_path / "shelf"))
  here, shelf = tmp_path / "checkpoints" / "sam3-pcs", tmp_path / "shelf" / "sam3-pcs"
  here.mkdir(parents=True)
  assert hub.find_checkpoint("sam3_pcs").samefile(here)
  shelf.mkdir(parents=True)
  assert hub.find_checkpoint("sam3_pcs").samefile(shelf)
  (tmp_path / "sam3_pcs").mkdir()
  assert hub.find_checkpoint("sam3_pcs").samefile(tmp_path / "sam3_pcs")
  assert (hub.find_checkpoint("sam3_tiny") / "config.json").is_file()


def test_an_unknown_preset_says_where_it_looked(tmp_path, monkeypatch):
  monkeypatch.setenv("SAM3_JAX_CHECKPOINTS", str(tmp_path))
  with pytest.raises(FileNotFoundError, match="sam3-jax convert SOURCE") as caught:
    sam3_jax.SAM3PromptableConceptImageSegmenter.from_preset("sam9")
  message = str(caught.value)
  assert str(tmp_path / "sam9") in message
  assert "checkpoints/sam9" in message
  assert "\n" not in message


def test_an_empty_name():
  with pytest.raises(ValueError, match="the checkpoint's name is empty"):
    hub.find_checkpoint("")


def test_predict_takes_a_mapping(segmenter):
  with pytest.raises(TypeError, match="predict takes a mapping"):
    segmenter.predict(np.zeros((1, 8, 8, 3)))


def test_the_hub_without_its_package(monkeypatch):
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)
  with pytest.raises(ImportError, match=r"pip install 'sam3-jax\[hub\]'"):
    hub.find_checkpoint("hf://facebook/sam3")


def test_the_hub_is_converted_once(tmp_path, monkeypatch):
  calls = []

  def download(name):
    calls.append(name)
    return tmp_path / "snapshot"

  def convert(source, target, progress):
    assert source == tmp_path / "snapshot"
    progress and progress("trunk", 0.5)
    target.mkdir(parents=True)

  monkeypatch.setattr("sam3_jax.snapshots.download", download)
  monkeypatch.setattr("sam3_jax.converters.convert", convert)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  first, second = (hub.find_checkpoint("hf://facebook/sam3") for _ in range(2))
  assert first == second == tmp_path / "sam3-jax" / "facebook--sam3"
  assert calls == ["hf://facebook/sam3"]
  told = []
  tagged = hub.find_checkpoint("hf://facebook/sam3@refs/pr/1", progress=lambda *x: told.append(x))
  assert told == [("downloading hf://facebook/sam3@refs/pr/1", 0.0), ("trunk", 0.5)]
  assert tagged == tmp_path / "sam3-jax" / "facebook--sam3--refs-pr-1"
  assert calls[1:] == ["hf://facebook/sam3@refs/pr/1"]


def test_a_download_without_a_home_is_one_line(monkeypatch):
  def fail():
    raise RuntimeError("Could not determine home directory.")

  monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
  monkeypatch.setattr(Path, "home", fail)
  with pytest.raises(ValueError, match=r"no home to keep hf://a/b in; set XDG_CACHE_HOME\.$"):
    hub.find_checkpoint("hf://a/b")
