"""KerasHub's class on top of `Sam3`."""

import numpy as np
import pytest

import sam3_jax


@pytest.fixture(scope="module")
def segmenter():
  return sam3_jax.SAM3PromptableConceptImageSegmenter.from_preset("sam3_tiny")


def card(batch=2, size=128):
  """The input of the model card's example."""
  return {
    "images": np.ones((batch, size, size, 3), dtype="float32"),
    "prompts": ["ear", "head"],
    "boxes": np.ones((batch, 1, 4), dtype="float32"),
    "box_labels": np.ones((batch, 1), dtype="int32"),
  }


@pytest.mark.slow
def test_model_card_example(segmenter):
  outputs = segmenter.predict(card())
  config = segmenter.model.config
  queries, size = config.queries, config.mask_size
  assert outputs["scores"].shape == (2, queries)
  assert outputs["boxes"].shape == (2, queries, 4)
  assert outputs["masks"].shape == (2, queries, size, size)
  assert all(type(x) is np.ndarray and np.isfinite(x).all() for x in outputs.values())
  assert ((outputs["masks"] >= 0) & (outputs["masks"] <= 1)).all()


@pytest.mark.slow
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


@pytest.mark.parametrize("missing", [("boxes", "box_labels"), ("box_labels",), ("prompts",)])
@pytest.mark.slow
def test_optional_keys(segmenter, missing):
  inputs = {key: value for key, value in card().items() if key not in missing}
  assert segmenter.predict(inputs)["scores"].shape[0] == 2


@pytest.mark.slow
def test_padding_boxes_are_ignored(segmenter):
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
    ({"prompts": ["ear"]}, "2 images need 2 prompts"),
    ({"boxes": np.ones((2, 4))}, r"boxes must be \[B, N, 4\]"),
    ({"boxes": np.ones((2, 1, 3))}, r"boxes must be \[B, N, 4\]"),
    ({"box_labels": np.ones((2, 2))}, r"boxes must be \[B, N, 4\]"),
    ({"box_labels": np.full((2, 1), 7)}, "box labels are 1"),
    ({"prompts": None, "boxes": None, "box_labels": None}, "needs a phrase or a box"),
    ({"prompts": None, "box_labels": np.full((2, 1), -10)}, "needs a phrase or a box"),
    ({"points": 1}, "unknown inputs"),
  ],
)
def test_errors_are_one_line(segmenter, change, message):
  with pytest.raises(ValueError, match=message) as caught:
    segmenter.predict(card() | change)
  assert "\n" not in str(caught.value)


def test_predict_takes_a_mapping(segmenter):
  with pytest.raises(TypeError, match="predict takes a mapping"):
    segmenter.predict(np.zeros((1, 8, 8, 3)))
