"""Masks as runs down the columns, against bitmaps and pycocotools."""

import tracemalloc

import numpy as np
import pytest
from pycocotools import mask as coco

from sam3_jax.outputs.column_runs import ColumnRuns, union
from sam3_jax.outputs.masks import Masks, RleMasks, RunMasks
from sam3_jax.outputs.rle import encode

SIZES = [(1, 1), (1, 9), (13, 1), (7, 40), (41, 33)]


def random_mask(size, seed=0, share=0.4):
  return np.random.default_rng([seed, *size]).random(size) < share


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("share", [0.0, 0.4, 0.97, 1.0])
class TestColumnRuns:
  def test_equals_the_bitmap(self, size, share):
    mask = random_mask(size, share=share)
    runs = ColumnRuns.of_mask(mask)
    assert runs.area == mask.sum()
    np.testing.assert_array_equal(runs.to_mask(), mask)
    assert (runs.starts < runs.stops).all()
    assert (runs.starts // size[0] == (runs.stops - 1) // size[0]).all()  # of a single column
    assert (runs.starts[1:] >= runs.stops[:-1]).all()

  def test_box(self, size, share):
    mask = random_mask(size, share=share)
    x, y, w, h = coco.toBbox(coco.encode(np.asfortranarray(mask, np.uint8))).astype(int)
    expected = (x, y, x + w, y + h) if mask.any() else (0, 0, 0, 0)
    assert ColumnRuns.of_mask(mask).box == expected

  def test_rle_equals_pycocotools(self, size, share):
    mask = random_mask(size, share=share)
    assert ColumnRuns.of_mask(mask).rle() == encode(mask)

  def test_shared_and_union(self, size, share):
    one, two = random_mask(size, 1, share), random_mask(size, 2)
    runs, other = ColumnRuns.of_mask(one), ColumnRuns.of_mask(two)
    assert runs.shared(other) == other.shared(runs) == (one & two).sum()
    np.testing.assert_array_equal(union([runs, other]).to_mask(), one | two)
    assert union([runs, other]).rle() == encode(one | two)

  def test_crop(self, size, share):
    mask = random_mask(size, share=share)
    for x0, y0, x1, y1 in [(0, 0, size[1], size[0]), (0, 0, 1, 1), (2, 3, 30, 6), (5, 5, 5, 9)]:
      box = min(x0, size[1]), min(y0, size[0]), min(x1, size[1]), min(y1, size[0])
      inside = np.zeros(size, bool)
      inside[box[1] : box[3], box[0] : box[2]] = True
      cropped = ColumnRuns.of_mask(mask).crop(box)
      np.testing.assert_array_equal(cropped.to_mask(), mask & inside)
      np.testing.assert_array_equal(cropped.to_mask(box), mask[box[1] : box[3], box[0] : box[2]])

  @pytest.mark.parametrize("target", [(1, 1), (5, 70), (82, 11)])
  def test_another_size_has_the_nearest_pixels(self, size, share, target):
    mask = random_mask(size, share=share)
    expected = RleMasks([encode(mask)], target)[0]
    np.testing.assert_array_equal(ColumnRuns.of_mask(mask).sample(target), expected)


@pytest.mark.parametrize(
  "window", [(0, 0, 9, 5), (3, 2, 20, 30), (12, 0, 20, 30), (19, 29, 20, 30)]
)
def test_a_window_of_an_image(window):
  x0, y0, x1, y1 = window
  whole = np.zeros((30, 20), bool)
  whole[y0:y1, x0:x1] = random_mask((y1 - y0, x1 - x0))
  runs = ColumnRuns.of_mask(whole[y0:y1, x0:x1], (30, 20), (x0, y0))
  np.testing.assert_array_equal(runs.to_mask(), whole)
  logits = np.where(whole[y0:y1, x0:x1], np.float32(1), np.float32(-1))[None]
  resized = Masks(logits, (y1 - y0, x1 - x0)).runs(0, (30, 20), (x0, y0))
  np.testing.assert_array_equal(resized.to_mask(), whole)


def test_lazy_masks():
  masks = [random_mask((30, 20), seed) for seed in range(3)]
  lazy = RunMasks([ColumnRuns.of_mask(mask) for mask in masks], (30, 20))
  np.testing.assert_array_equal(np.asarray(lazy), masks)
  np.testing.assert_array_equal(lazy[-1], masks[2])
  np.testing.assert_array_equal(np.asarray(lazy[[2, 0]]), [masks[2], masks[0]])
  assert lazy.rle(1) == encode(masks[1])
  half = RleMasks([encode(masks[1])], (15, 10))
  np.testing.assert_array_equal(lazy.at((15, 10))[1], half[0])
  assert lazy.at((15, 10)).rle(1) == half.rle(0)
  assert len(lazy[np.zeros(3, bool)]) == 0


def test_memory_does_not_grow_with_the_image():
  size = 30_000, 40_000
  tracemalloc.start()
  one = ColumnRuns.of_mask(np.ones((200, 300), bool), size, (20_000, 10_000))
  two = ColumnRuns.of_mask(np.ones((200, 300), bool), size, (20_100, 10_100))
  assert one.shared(two) == 200 * 100
  assert union([one, two]).area == 2 * 200 * 300 - 200 * 100
  assert coco.area(one.rle()) == 200 * 300
  assert tracemalloc.get_traced_memory()[1] < 2e6  # a bitmap would take 1.2 GB
  tracemalloc.stop()
