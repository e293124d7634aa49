"""Postprocessing: instances of an image, thresholds and filling of holes."""

import sys
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from sam3_jax.outputs import instances as postprocess
from sam3_jax.outputs.detections import Detections, VisualMasks
from sam3_jax.outputs.instances import Instances, fill_holes, instances, visual_masks
from sam3_jax.outputs.masks import Masks, interpolate

GOLDEN = dict(np.load(Path(__file__).parent / "goldens" / "text.npz"))
GOLDEN_SIZE = (1200, 1800)


def random_grid(shape: tuple[int, ...]) -> np.ndarray:
  return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def detections(scores, size=(8, 10), grid=(4, 5), convert=jnp.asarray) -> Detections:
  """Random detections; query q of prompt p has the id 100 p + q."""
  scores = np.asarray(scores, np.float32)
  prompts, queries = scores.shape
  sizes = np.broadcast_to(np.asarray(size, np.int32), (prompts, 2))
  return Detections(
    scores=convert(scores),
    boxes=convert(np.linspace(-0.2, 1.2, prompts * queries * 4, dtype=np.float32)).reshape(
      prompts, queries, 4
    ),
    mask_logits=convert(random_grid((prompts, queries, *grid))),
    presence_logit=convert(np.zeros(prompts, np.float32)),
    semantic_logits=convert(np.zeros((prompts, *grid), np.float32)),
    image_index=convert(np.zeros(prompts, np.int32)),
    sizes=convert(sizes),
    ids=convert(np.arange(prompts)[:, None] * 100 + np.arange(queries)),
  )


# Interpolation.


def test_boxes_equal_metas():
  detected = detections(np.full((1, 10), 0.9), size=GOLDEN_SIZE)
  detected = detected.replace(boxes=jnp.asarray(GOLDEN["out.pred_boxes_xyxy"]))
  np.testing.assert_array_equal(instances(detected)[0].boxes, GOLDEN["final.boxes"])


@pytest.mark.parametrize("convert", [jnp.asarray, np.asarray])
def test_instances(convert):
  detected = detections([[0.2, 0.9, 0.5, 0.7], [0.1, 0.2, 0.3, 0.4]], convert=convert)
  first, second = instances(detected)
  np.testing.assert_array_equal(first.ids, [1, 3])
  np.testing.assert_array_equal(first.scores, np.float32([0.9, 0.7]))
  boxes = np.asarray(detected.boxes)[0, [1, 3]] * np.float32([10, 8, 10, 8])
  np.testing.assert_array_equal(first.boxes, boxes)
  np.testing.assert_array_equal(first.masks.logits, np.asarray(detected.mask_logits)[0, [1, 3]])
  assert first.masks.size == (8, 10)
  assert len(first) == len(first.masks) == 2
  assert (first.scores.dtype, first.boxes.dtype) == (np.float32, np.float32)
  assert len(second) == 0
  assert second.boxes.shape == (0, 4)
  assert np.asarray(second.masks).shape == (0, 8, 10)


def test_boxes_are_not_clipped():
  found = instances(detections(np.full((1, 4), 0.9)))[0]
  assert found.boxes.min() < 0
  assert found.boxes.max() > 10


def test_ties_are_ordered_by_query():
  found = instances(detections([[0.6, 0.9, 0.6, 0.6, 0.9]]))[0]
  np.testing.assert_array_equal(found.ids, [1, 4, 0, 2, 3])


def test_threshold_is_strict_and_float32():
  detected = detections([[0.3, 0.5, np.nextafter(np.float32(0.5), 1)]])
  np.testing.assert_array_equal(instances(detected, 0.5)[0].ids, [2])
  np.testing.assert_array_equal(instances(detected, 0.3)[0].ids, [2, 1])
  assert len(instances(detections([[1.0, 0.0]]), 1.0)[0]) == 0
  assert len(instances(detections([[1.0, 0.0]]), 0)[0]) == 1


@pytest.mark.parametrize("convert", [list, tuple, np.array, jnp.array])
def test_threshold_for_each_prompt(convert):
  detected = detections([[0.2, 0.9], [0.2, 0.9], [0.2, 0.9]])
  found = instances(detected, convert([0.1, 0.5, 0.95]))
  assert [len(one) for one in found] == [2, 1, 0]


def test_prompts_on_images_of_different_sizes():
  detected = detections([[0.9], [0.9]], size=[(8, 10), (3, 4)])
  first, second = instances(detected)
  assert np.asarray(first.masks).shape == (1, 8, 10)
  assert np.asarray(second.masks).shape == (1, 3, 4)
  boxes = np.asarray(detected.boxes)[1] * np.float32([4, 3, 4, 3])
  np.testing.assert_array_equal(second.boxes, boxes)


def test_no_prompts():
  assert instances(detections(np.zeros((0, 4)))) == []


def test_no_queries():
  found = instances(detections(np.zeros((2, 0))))
  assert [len(one) for one in found] == [0, 0]


def test_bfloat16_masks():
  detected = detections([[0.9, 0.8]])
  detected = detected.replace(mask_logits=detected.mask_logits.astype(jnp.bfloat16))
  found = instances(detected)[0]
  exact = Masks(np.asarray(detected.mask_logits[0], np.float32), (8, 10))
  np.testing.assert_array_equal(found.masks, exact)
  assert found.masks.rle(1) == exact.rle(1)


def test_method_equals_the_function():
  detected = detections([[0.9, 0.4]])
  for mine, theirs in zip(detected.instances(0.3), instances(detected, 0.3), strict=True):
    np.testing.assert_array_equal(mine.ids, theirs.ids)


def test_copying_masks_compiles_once():
  postprocess._mask.clear_cache()
  scores = np.random.default_rng(0).random((3, 20))
  for threshold in (0.1, 0.5, 0.9, 1.0):
    instances(detections(scores), threshold)
  assert postprocess._mask._cache_size() == 1


def test_selecting_instances():
  found = instances(detections([[0.6, 0.9, 0.7]]))[0]
  best = found[found.scores > 0.65]
  assert isinstance(best, Instances)
  np.testing.assert_array_equal(best.ids, [1, 2])
  np.testing.assert_array_equal(best.masks, np.asarray(found.masks)[:2])
  np.testing.assert_array_equal(found[1:].boxes, found.boxes[1:])
  with pytest.raises(TypeError, match=r"use \[0:1\]"):
    found[0]


@pytest.mark.parametrize("threshold", [-0.1, 1.5, float("nan"), [0.5, 2.0], float("inf")])
def test_thresholds_outside_0_to_1(threshold):
  with pytest.raises(ValueError, match=r"threshold is .*in \[0, 1\]"):
    instances(detections([[0.9], [0.9]]), threshold)


@pytest.mark.parametrize("threshold", [[0.5], [0.5, 0.5, 0.5], [[0.5, 0.5]], []])
def test_thresholds_of_invalid_shape(threshold):
  with pytest.raises(ValueError, match=r"2 prompts and thresholds of shape .*one for each"):
    instances(detections([[0.9], [0.9]]), threshold)


@pytest.mark.parametrize("size", [(0, 0), (8, 0), (-1, 8)])
def test_image_without_size(size):
  with pytest.raises(ValueError, match=f"prompt 1 is {size[0]} x {size[1]}"):
    instances(detections([[0.9], [0.9]], size=[(8, 10), size]))


def test_supervision(monkeypatch):
  """With a stub of the optional package."""
  found = instances(detections([[0.9, 0.1, 0.8]]), 0.5)[0]
  monkeypatch.setitem(sys.modules, "supervision", types.SimpleNamespace(Detections=dict))
  got = found.to_supervision(class_id=3)
  assert got["xyxy"] is found.boxes
  assert got["mask"].shape == (2, 8, 10)
  assert got["mask"].dtype == bool
  np.testing.assert_array_equal(got["mask"][1], found.masks[1])
  assert got["confidence"] is found.scores
  assert got["class_id"].tolist() == [3, 3]
  assert got["data"]["identity"] is found.ids
  monkeypatch.setitem(sys.modules, "supervision", None)
  with pytest.raises(ImportError, match="pip install supervision"):
    found.to_supervision()


# Masks of visual prompts.


def ring(size: int = 24) -> np.ndarray:
  """Logits of a ring with a hole of 9 cells, without corners of 3 cells and 1 cell."""
  grid = np.full((size, size), 2.0, np.float32)
  grid[8:11, 8:11] = -3
  grid[0, :3] = 0  # 0 is outside
  grid[-1, -1] = -1
  grid[-2, -2] = -1  # touches it by a corner
  return grid


@pytest.mark.parametrize(
  ("area", "filled"), [(0, 0), (1, 0), (2, 2), (3, 5), (8, 5), (9, 14), (1000, 14)]
)
def test_holes_are_filled_up_to_their_area(area, filled):
  grid = ring()
  got = fill_holes(grid, area)
  changed = got != grid
  assert changed.sum() == filled
  assert (grid[changed] <= 0).all()
  assert (got[changed] == 10).all()
  assert got.dtype == grid.dtype


@pytest.mark.parametrize("value", [-1.0, 1.0])
def test_constant_masks_have_no_holes(value):
  grid = np.full((5, 6), value, np.float32)
  np.testing.assert_array_equal(fill_holes(grid, 29), grid)


@pytest.mark.parametrize("prompts", [0, 1, 3])
def test_masks_of_visual_prompts(prompts):
  logits = np.stack([ring(), -ring()])[None].repeat(prompts, axis=0)
  sizes = np.array([[48, 30]] * prompts, np.int32).reshape(-1, 2)
  zeros = np.zeros(prompts)
  found = VisualMasks(jnp.asarray(logits), zeros[:, None], zeros, zeros, sizes)
  for hole_area in (0, 9):
    masks = visual_masks(found, hole_area)
    assert len(masks) == prompts
    for one in masks:
      for k, grid in enumerate(logits[0]):
        filled = fill_holes(grid, hole_area) if hole_area else grid
        np.testing.assert_array_equal(one[k], interpolate(filled, (48, 30)) > 0)
  assert len(found.masks()) == prompts
  for area, wanted in ((-1, "0 or more; got -1"), (np.nan, "a finite number"), ("a", "a finite")):
    with pytest.raises(ValueError, match=f"hole_area must be {wanted}.* 0 fills none") as caught:
      visual_masks(found, area)
    assert "\n" not in str(caught.value)


# Masks as run lengths.
