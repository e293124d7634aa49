"""J and F against their definition in loops, and edge cases by hand."""

import itertools
import math

import numpy as np
import pytest

from sam3_jax.evaluation.region_contour import (
  Scores,
  boundary,
  contour,
  decay,
  region,
  scores,
  summary,
)

SIZE = 13, 17
EMPTY, FULL = np.zeros(SIZE, bool), np.ones(SIZE, bool)


def rectangle(x0, y0, x1, y1, size=SIZE):
  mask = np.zeros(size, bool)
  mask[y0:y1, x0:x1] = True
  return mask


def slow_boundary(mask):
  """A pixel is on the boundary if a neighbor to the right, below or diagonal differs; in the last
  row only the right one counts, in the last column only the lower one."""
  height, width = mask.shape
  found = np.zeros_like(mask)
  for y, x in np.ndindex(height, width):
    steps = [(0, 1), (1, 0), (1, 1)]
    if y == height - 1:
      steps = [(0, 1)]
    if x == width - 1:
      steps = [(1, 0)]
    if (y, x) != (height - 1, width - 1):
      found[y, x] = any(mask[y, x] != mask[y + dy, x + dx] for dy, dx in steps)
  return found


def slow_contour(mask, truth, radius):
  """Matches each boundary pixel with any of the other boundary's in a disk around it."""
  own, wanted = (list(zip(*np.nonzero(slow_boundary(one)), strict=True)) for one in (mask, truth))

  def matched(some, others):
    near = [any((y - v) ** 2 + (x - u) ** 2 <= radius**2 for v, u in others) for y, x in some]
    return sum(near) / len(near)

  if not own and not wanted:
    return 1.0
  if not own or not wanted:
    return 0.0
  precision, recall = matched(own, wanted), matched(wanted, own)
  return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def samples():
  """Rectangles, some beyond the border, noise, and masks without a boundary."""
  for seed in range(24):
    rng = np.random.default_rng(seed)
    x0, y0 = rng.integers(0, 14), rng.integers(0, 10)
    mask = rectangle(x0, y0, x0 + rng.integers(1, 9), y0 + rng.integers(1, 9))
    yield mask ^ (rng.random(SIZE) < 0.03) if seed % 3 == 0 else mask
  yield from (EMPTY, FULL, np.random.default_rng(5).random(SIZE) < 0.5, ~rectangle(3, 3, 9, 9))


@pytest.mark.parametrize("number", range(28))
def test_boundary_is_that_of_the_definition(number):
  mask = list(samples())[number]
  assert np.array_equal(boundary(mask), slow_boundary(mask))


@pytest.mark.parametrize("radius", [1, 2, 3])
def test_contour_equals_the_definition(radius):
  for mask, truth in itertools.product(list(samples())[::2], list(samples())[1::2]):
    wanted = slow_contour(mask, truth, radius)
    assert contour(mask, truth, radius) == pytest.approx(wanted, abs=1e-15)


def test_the_bound_is_rounded_up_to_pixels():
  size = 90, 120  # the diagonal is 150, so the bound is 1.2 pixels
  truth = rectangle(20, 20, 60, 60, size)
  assert contour(rectangle(22, 20, 62, 60, size), truth) == 1.0
  assert contour(rectangle(23, 20, 63, 60, size), truth) == slow_contour(
    rectangle(23, 20, 63, 60, size), truth, math.ceil(1.2)
  )


def test_region():
  left, right = rectangle(0, 0, 6, 10), rectangle(4, 0, 10, 10)
  assert region(left, right) == 20 / 100
  assert region(left, left) == region(FULL, FULL) == 1
  assert region(left, EMPTY) == region(EMPTY, left) == region(FULL, EMPTY) == 0
  assert region(EMPTY, EMPTY) == 1


def test_half_planes():
  """The boundaries of two half planes are columns at the distance of their edges."""
  one, other = rectangle(0, 0, 5, 10, (10, 20)), rectangle(0, 0, 7, 10, (10, 20))
  assert np.array_equal(boundary(one), rectangle(4, 0, 5, 10, (10, 20)))
  assert contour(one, other, 2) == 1
  assert contour(one, other, 1) == 0
  assert region(one, other) == 50 / 70


def test_one_sided_matches():
  """Of two squares only one is found: precision 1 and recall 1/2."""
  square = rectangle(2, 2, 5, 5)
  both = square | rectangle(10, 2, 13, 5)
  assert contour(square, both, 1) == pytest.approx(2 / 3)
  assert contour(both, square, 1) == pytest.approx(2 / 3)


def test_masks_without_boundary():
  """As DAVIS's code does, a full image counts as a mask without a boundary."""
  assert contour(EMPTY, EMPTY) == contour(FULL, FULL) == contour(FULL, EMPTY) == 1
  assert contour(EMPTY, rectangle(2, 2, 5, 5)) == contour(rectangle(2, 2, 5, 5), EMPTY) == 0
  corner = np.zeros(SIZE, bool)
  corner[-1, -1] = True  # its upper left neighbor is on the boundary
  assert boundary(corner).sum() == 3


def test_single_pixel_image():
  one = np.ones((1, 1), bool)
  assert not boundary(one).any()
  assert contour(one, one) == contour(one, ~one) == 1
  assert region(one, ~one) == 0


def test_scores_of_frames():
  square = rectangle(2, 2, 8, 8)
  found = scores([square, EMPTY, EMPTY], [square, square, EMPTY])
  assert found.region.tolist() == found.contour.tolist() == [1, 0, 1]
  assert found.mean == pytest.approx(2 / 3)
  with pytest.raises(ValueError):
    scores([square], [square, square])
  assert scores([], []).region.shape == (0,)


@pytest.mark.parametrize(
  ("curve", "drop"),
  [
    ([1, 1, 1, 1], 0),
    ([1.0, 0.8, 0.6, 0.4, 0.2], 0.9 - 0.3),  # ends 1 2 3 4 5
    ([1.0, 1.0, 0.4, 0.0], 1.0 - 0.2),  # ends 1 1.75 2.5 3.25 4, rounded 1 2 3 3 4
    ([1.0, 0.0], 1.0),  # ends 1 1 2 2 2
    ([0.5], 0),
  ],
)
def test_decay(curve, drop):
  assert decay(np.array(curve)) == pytest.approx(drop)


def test_summary_is_the_mean_over_objects():
  """An object with few frames counts as much as another one."""
  long, short = np.array([1.0, 1.0, 0.4, 0.0]), np.array([0.2])
  figures = summary([Scores(long, long / 2), Scores(short, short)])
  assert figures["j"] == pytest.approx(100 * (0.6 + 0.2) / 2)
  assert figures["f"] == pytest.approx(100 * (0.3 + 0.2) / 2)
  assert figures["jf"] == pytest.approx((figures["j"] + figures["f"]) / 2)
  assert figures["j_recall"] == pytest.approx(100 * (0.5 + 0) / 2)
  assert figures["f_recall"] == 0  # exactly one half does not count
  assert set(figures) == {"jf", "j", "f", "j_recall", "f_recall", "j_decay", "f_decay"}
