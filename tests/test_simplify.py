"""Simplified polygons stay within the tolerance, and keep their corners."""

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from sam3_jax.batch.polygons import mask_to_polygons
from sam3_jax.server.simplify import perimeter, simplify


def along(polygon: np.ndarray, steps: int = 50) -> np.ndarray:
  """Points along the edges of a closed polygon."""
  share = np.linspace(0, 1, steps)[:, None, None]
  return (polygon * (1 - share) + np.roll(polygon, -1, axis=0) * share).reshape(-1, 2)


@pytest.mark.parametrize("tolerance", [1.0, 3.0])
def test_of_a_disc(tolerance):
  y, x = np.indices((120, 160))
  [polygon] = mask_to_polygons((x - 80) ** 2 + (y - 60) ** 2 < 50**2)
  small = simplify(polygon, tolerance)
  assert 3 <= len(small) < len(polygon) / 2
  distances = cdist(polygon, along(small)).min(axis=1)
  assert distances.max() <= tolerance + 0.1  # of points on the edges
  assert {tuple(point) for point in small} <= {tuple(point) for point in polygon}


def test_points_on_a_line_are_removed():
  square = np.array([[0, 0], [5, 0], [10, 0], [10, 10], [4, 10], [0, 10]], float)
  assert simplify(square, 0.1).tolist() == [[0, 0], [10, 0], [10, 10], [0, 10]]


@pytest.mark.parametrize("polygon", [np.zeros((0, 2)), [[1, 1]], [[0, 0], [4, 0], [0, 4]]])
def test_small_polygons_are_kept(polygon):
  assert np.array_equal(simplify(np.array(polygon, float), 100), polygon)


def test_polygons_do_not_collapse():
  thin = np.array([[0, 0], [10, 0], [10, 1], [0, 1]], float)
  assert np.array_equal(simplify(thin, 50), thin)
  assert np.array_equal(simplify(thin, 0), thin)


def test_perimeter():
  assert perimeter(np.array([[0, 0], [3, 0], [3, 4], [0, 4]], float)) == 14
