"""Simplifies polygons by the algorithm of Ramer (1972), and Douglas and Peucker (1973)."""

import numpy as np
from jaxtyping import Bool, Float


def simplify(polygon: Float[np.ndarray, "n 2"], tolerance: float) -> Float[np.ndarray, "m 2"]:
  """Removes vertices of a closed polygon that are within `tolerance` pixels of the result.

  The first vertex and the one farthest from it are kept. A polygon is returned unchanged if fewer
  than 3 of its vertices would remain.
  """
  polygon = np.asarray(polygon, np.float64)
  if tolerance <= 0 or len(polygon) <= 3:
    return polygon
  far = int(((polygon - polygon[0]) ** 2).sum(axis=1).argmax())
  closed = np.concatenate([polygon, polygon[:1]])
  kept = _kept(closed, [(0, far), (far, len(polygon))], tolerance)[:-1]
  return polygon[kept] if kept.sum() >= 3 else polygon


def perimeter(polygon: Float[np.ndarray, "n 2"]) -> float:
  """Length of a closed polygon's boundary."""
  return float(np.linalg.norm(np.roll(polygon, -1, axis=0) - polygon, axis=1).sum())


def _kept(
  path: Float[np.ndarray, "n 2"], spans: list[tuple[int, int]], tolerance: float
) -> Bool[np.ndarray, " n"]:
  """Marks the ends of the spans, and vertices farther than `tolerance` from a simplified path."""
  kept = np.zeros(len(path), bool)
  while spans:
    start, end = spans.pop()
    kept[[start, end]] = True
    if end - start < 2:
      continue
    distances = _distances(path[start + 1 : end], path[start], path[end])
    farthest = int(distances.argmax())
    if distances[farthest] > tolerance:
      middle = start + 1 + farthest
      spans += [(start, middle), (middle, end)]
  return kept


def _distances(
  points: Float[np.ndarray, "n 2"], start: Float[np.ndarray, "2"], end: Float[np.ndarray, "2"]
) -> Float[np.ndarray, " n"]:
  """Distances of points from a segment."""
  along = end - start
  length = float(along @ along)
  if length == 0:
    return np.linalg.norm(points - start, axis=1)
  position = np.clip((points - start) @ along / length, 0, 1)
  return np.linalg.norm(points - start - position[:, None] * along, axis=1)
