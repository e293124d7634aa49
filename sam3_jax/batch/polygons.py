"""Masks as polygons along the edges of pixels, for formats without run lengths."""

import numpy as np
from jaxtyping import Bool, Float

# Directions of an edge: right, down, left, up, each with the image's y downwards.
_STEPS = ((1, 0), (0, 1), (-1, 0), (0, -1))


def mask_to_polygons(mask: Bool[np.ndarray, "h w"]) -> list[Float[np.ndarray, "n 2"]]:
  """The outer polygon of each connected component of a mask, the longest first; holes are filled.

  Pixels that touch only at a corner are not connected. Filling the polygons (pixels whose center is
  inside) gives the mask exactly, if it has no holes.

  Returns:
    Vertices x, y in pixels, from 0 to width and height, clockwise as displayed.
  """
  polygons = [_vertices(loop) for loop in _boundaries(np.asarray(mask, bool))]
  outer = (polygon for polygon in polygons if _area(polygon) > 0)
  return sorted(outer, key=len, reverse=True)


def join_polygons(polygons: list[Float[np.ndarray, "n 2"]]) -> Float[np.ndarray, "n 2"]:
  """Joins polygons by bridges of zero width, for formats with one polygon per object."""
  if len(polygons) <= 1:
    return polygons[0] if polygons else np.zeros((0, 2))
  path = [np.concatenate([polygon, polygon[:1]]) for polygon in polygons]
  back = [polygon[:1] for polygon in reversed(polygons[:-1])]
  return np.concatenate([*path, *back])


def _boundaries(mask: np.ndarray) -> list[list[tuple[int, int]]]:
  """Closed paths along the edges between pixels inside and outside; the inside is to the right."""
  left: dict[tuple[int, int, int], None] = {}  # edges not visited yet: start x, y and direction
  padded = np.pad(mask, 1)
  inside = padded[1:-1, 1:-1]
  # For each direction: the pixels with such an edge, and its start relative to their corner.
  edges = (
    (inside & ~padded[:-2, 1:-1], (0, 0)),  # top edge, to the right
    (inside & ~padded[1:-1, 2:], (1, 0)),  # right edge, downwards
    (inside & ~padded[2:, 1:-1], (1, 1)),  # bottom edge, to the left
    (inside & ~padded[1:-1, :-2], (0, 1)),  # left edge, upwards
  )
  for direction, (has_edge, (dx, dy)) in enumerate(edges):
    for y, x in np.argwhere(has_edge).tolist():
      left[x + dx, y + dy, direction] = None
  loops = []
  while left:
    start = edge = next(iter(left))
    loop = []
    while not loop or edge != start:
      del left[edge]
      x, y, direction = edge
      loop.append((x, y))
      x, y = x + _STEPS[direction][0], y + _STEPS[direction][1]
      # Right turns first, so that pixels that touch only at a corner are not joined.
      turns = [(x, y, (direction + turn) % 4) for turn in (1, 0, 3)]
      edge = next(turn for turn in turns if turn == start or turn in left)
    loops.append(loop)
  return loops


def _vertices(loop: list[tuple[int, int]]) -> Float[np.ndarray, "n 2"]:
  """The points of a path at which its direction changes."""
  points = np.array(loop)
  before, after = points - np.roll(points, 1, axis=0), np.roll(points, -1, axis=0) - points
  return points[(before != after).any(axis=1)].astype(np.float64)


def _area(polygon: Float[np.ndarray, "n 2"]) -> float:
  """Positive for outer boundaries, negative for holes."""
  x, y = polygon.T
  return float(np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y)) / 2
