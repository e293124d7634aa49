"""Lazy masks over an image, against Meta's values, a float64 loop and pycocotools."""

import subprocess
import sys
import tracemalloc
from pathlib import Path

import jax
import numpy as np
import pytest
from pycocotools import mask as coco

import sam3_jax.outputs.masks
from sam3_jax.outputs.masks import Masks, RleMasks, interpolate

GOLDEN = dict(np.load(Path(__file__).parent / "goldens" / "text.npz"))
GOLDEN_SIZE = (1200, 1800)
SIZES = [(1, 1), (1, 9), (13, 1), (2, 3), (12, 12), (7, 40), (41, 33), (3, 5)]
GRIDS = [(1, 1), (1, 4), (5, 1), (2, 2), (12, 12), (9, 6)]


def random_grid(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def naive(grid: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """Bilinear interpolation in float64, one value at a time: half-pixel centers, edge padding."""
  result = np.zeros(size)

  def between(i: int, source: int, target: int) -> tuple[int, int, float]:
    position = max((i + 0.5) * source / target - 0.5, 0)
    lower = min(int(position), source - 1)
    return lower, min(lower + 1, source - 1), position - lower

  for y in range(size[0]):
    y0, y1, v = between(y, grid.shape[0], size[0])
    for x in range(size[1]):
      x0, x1, u = between(x, grid.shape[1], size[1])
      top = grid[y0, x0] * (1 - u) + grid[y0, x1] * u
      bottom = grid[y1, x0] * (1 - u) + grid[y1, x1] * u
      result[y, x] = top * (1 - v) + bottom * v
  return result


def coco_encode(mask: np.ndarray) -> dict:
  encoded = coco.encode(np.asfortranarray(mask))
  return {"size": list(mask.shape), "counts": encoded["counts"].decode()}


def test_interpolation_equals_metas_probabilities():
  top = GOLDEN["final.top"].astype(int)
  for query, expected in zip(top, GOLDEN["final.masks_prob_top_every_8th"][:, 0], strict=True):
    resized = interpolate(GOLDEN["out.pred_masks"][0, query], GOLDEN_SIZE)
    assert resized.shape == GOLDEN_SIZE
    probabilities = 1 / (1 + np.exp(-resized[::8, ::8]))
    np.testing.assert_allclose(probabilities, expected, rtol=0, atol=1e-6)  # measured 1.8e-7


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("grid", GRIDS)
def test_interpolation_equals_a_loop(grid, size):
  values = random_grid(grid)
  resized = interpolate(values, size)
  assert resized.dtype == np.float32
  np.testing.assert_allclose(resized, naive(values, size), rtol=0, atol=1e-5)  # measured 2.4e-6


def test_interpolation_to_a_larger_size_equals_jax():
  values = random_grid((24, 18))
  expected = jax.image.resize(values, (100, 131), "bilinear")
  resized = interpolate(values, (100, 131))
  np.testing.assert_allclose(resized, expected, rtol=0, atol=4e-6)  # measured 4.8e-7


def test_interpolation_to_the_same_size_is_the_identity():
  values = random_grid((24, 18))
  np.testing.assert_array_equal(interpolate(values, (24, 18)), values)


# Masks.


@pytest.mark.parametrize("shift", [-3, -1, 0, 1, 3])  # from all False to all True
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("grid", GRIDS)
def test_masks_and_run_lengths(grid, size, shift):
  masks = Masks(random_grid((2, *grid), seed=shift + 5) + np.float32(shift), size)
  for i in range(2):
    expected = interpolate(masks.logits[i], size) > 0
    assert masks[i].dtype == bool
    np.testing.assert_array_equal(masks[i], expected)
    assert masks.rle(i) == coco_encode(expected)


@pytest.mark.parametrize("value", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("size", SIZES)
def test_constant_masks(size, value):
  masks = Masks(np.full((1, 6, 6), value, np.float32), size)
  assert (masks[0] == (value > 0)).all()
  assert coco.area(masks.rle(0)) == (value > 0) * size[0] * size[1]


def test_masks_of_a_checkerboard():
  board = np.where(np.indices((12, 12)).sum(0) % 2, 1, -1).astype(np.float32)
  masks = Masks(np.stack([board, -board]), (97, 101))
  for i in range(2):
    np.testing.assert_array_equal(masks[i], naive(masks.logits[i], (97, 101)) > 0)
    assert coco.area(masks.rle(i)) == masks[i].sum()
    assert masks.rle(i) == coco_encode(masks[i])


def test_masks_in_several_strips(monkeypatch):
  masks = Masks(random_grid((1, 20, 20)), (150, 130))
  whole, encoded = masks[0], masks.rle(0)
  for values in (1, 131, 4000):
    monkeypatch.setattr(sam3_jax.outputs.masks, "_STRIP", values)
    np.testing.assert_array_equal(masks[0], whole)
    assert masks.rle(0) == encoded


def test_masks_are_a_sequence():
  masks = Masks(random_grid((4, 6, 5)), (20, 30))
  every = np.asarray(masks)
  assert every.shape == (4, 20, 30)
  assert every.dtype == bool
  assert len(masks) == 4
  assert repr(masks) == "Masks(4 of 20 x 30)"
  np.testing.assert_array_equal(list(masks), every)
  np.testing.assert_array_equal(masks[-1], every[3])
  np.testing.assert_array_equal(masks[np.int64(2)], every[2])
  np.testing.assert_array_equal(masks[1:3], every[1:3])
  np.testing.assert_array_equal(masks[[3, 0]], every[[3, 0]])
  np.testing.assert_array_equal(masks[np.array([True, False, False, True])], every[[0, 3]])
  np.testing.assert_array_equal(np.asarray(masks, np.uint8), every.astype(np.uint8))
  assert masks.rle(-1) == masks.rle(3)


@pytest.mark.parametrize("index", [4, -5])
def test_mask_index_out_of_range(index):
  masks = Masks(random_grid((4, 6, 5)), (20, 30))
  with pytest.raises(IndexError, match=f"mask index {index} is out of range: there are 4"):
    masks[index]
  with pytest.raises(IndexError, match=f"mask index {index} is out"):
    masks.rle(index)


def test_empty_masks():
  masks = Masks(random_grid((0, 6, 5)), (20, 30))
  assert np.asarray(masks).shape == (0, 20, 30)
  assert list(masks) == []


def test_masks_as_an_array_need_a_copy():
  with pytest.raises(ValueError, match="copy=False"):
    np.asarray(Masks(random_grid((1, 6, 5)), (20, 30)), copy=False)


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (-1, -1)])
def test_masks_need_a_size(size):
  with pytest.raises(ValueError, match=f"is {size[0]} x {size[1]} .*in pixels"):
    Masks(random_grid((1, 6, 5)), size)


def peak_megabytes(function) -> float:
  tracemalloc.start()
  function()
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  return peak / 1e6


@pytest.mark.slow
def test_memory_at_300_megapixels():
  wave = np.sin(np.arange(288) / 40)[:, None] + 0.3 * np.cos(np.arange(288) / 9)
  masks = Masks(np.broadcast_to(wave.astype(np.float32), (200, 288, 288)), (15_000, 20_000))
  assert peak_megabytes(lambda: masks[50:]) < 1  # masks are computed on access
  assert peak_megabytes(lambda: masks[0]) < 300 + 200  # measured 370, of which the mask is 300
  assert peak_megabytes(lambda: masks.rle(0)) < 200  # measured 52


@pytest.mark.slow
def test_import_does_not_load_pycocotools():
  code = "import sys, sam3_jax.outputs.instances; sys.exit('pycocotools' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Instances.


def stored(size: tuple[int, int], count: int = 3) -> tuple[np.ndarray, RleMasks]:
  masks = np.random.default_rng(0).random((count, *size)) < 0.4
  return masks, RleMasks([coco_encode(mask) for mask in masks], size)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (6, 1), (13, 9)])
def test_rle_masks(size):
  masks, kept = stored(size)
  assert (len(kept), kept.size, repr(kept)) == (3, size, f"RleMasks(3 of {size[0]} x {size[1]})")
  np.testing.assert_array_equal(np.asarray(kept), masks)
  np.testing.assert_array_equal(kept[-1], masks[2])
  np.testing.assert_array_equal(np.asarray(kept[1:]), masks[1:])
  np.testing.assert_array_equal(np.asarray(kept[np.array([2, 0])]), masks[[2, 0]])
  np.testing.assert_array_equal(np.asarray(kept[np.array([True, False, True])]), masks[[0, 2]])
  assert kept.rle(1) == coco_encode(masks[1])
  with pytest.raises(IndexError, match="mask index 3 is out of range: there are 3"):
    kept[3]
  with pytest.raises(ValueError, match=r"copy=False\) is impossible"):
    np.asarray(kept, copy=False)


def test_rle_masks_of_another_size():
  masks, kept = stored((6, 4))
  twice = kept.at((12, 8))
  np.testing.assert_array_equal(twice[0], masks[0].repeat(2, axis=0).repeat(2, axis=1))
  np.testing.assert_array_equal(twice.at((6, 4))[0], masks[0])
  np.testing.assert_array_equal(kept.at((3, 2))[0], masks[0][::2, ::2])
  assert twice.rle(0) == coco_encode(twice[0])
  assert Masks(random_grid((1, 3, 3)), (6, 4)).at((9, 9)).size == (9, 9)
