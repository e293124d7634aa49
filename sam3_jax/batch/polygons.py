"""Outlines of masks as polygons, along the edges of pixels; for layouts without run lengths."""

import numpy as np
from jaxtyping import Bool, Float

# Directions of an edge: right, down, left, up, each with the image's y downwards.
_STEPS = ((1, 0), (0, 1), (-1, 0), (0, -1))


def outlines(mask: Bool[np.ndarray, "h w"]) -> list[Float[np.ndarray, "n 2"]]:
  """The outer outline of each piece of a mask, the longest first; holes are filled.

  Pixels that touch at a corner only are pieces of their own. Filled again (pixel centres inside),
  the outlines of a mask without holes are that mask, to the pixel.

  Returns:
    Corners x, y in pixels, from 0 to width and height, one for each turn; clockwise as seen.
  """
  loops = [_corners(loop) for loop in _loops(np.asarray(mask, bool))]
  return sorted((loop for loop in loops if _area(loop) > 0), key=len, reverse=True)


def joined(loops: list[Float[np.ndarray, "n 2"]]) -> Float[np.ndarray, "n 2"]:
  """Outlines as one polygon, by bridges without width: for layouts with one polygon an object."""
  if len(loops) <= 1:
    return loops[0] if loops else np.zeros((0, 2))
  path = [np.concatenate([loop, loop[:1]]) for loop in loops]
  back = [loop[:1] for loop in reversed(loops[:-1])]
  return np.concatenate([*path, *back])


def _loops(mask: np.ndarray) -> list[list[tuple[int, int]]]:
  """Closed walks along the edges between pixels inside and outside, the inside to the right."""
  left: dict[tuple[int, int, int], None] = {}  # edges to walk: where from, and which way
  padded = np.pad(mask, 1)
  inside = padded[1:-1, 1:-1]
  # Of each direction: the pixels that have such an edge, and where it starts from their corner.
  edges = (
    (inside & ~padded[:-2, 1:-1], (0, 0)),  # the top, to the right
    (inside & ~padded[1:-1, 2:], (1, 0)),  # the right side, down
    (inside & ~padded[2:, 1:-1], (1, 1)),  # the bottom, to the left
    (inside & ~padded[1:-1, :-2], (0, 1)),  # the left side, up
  )
  for direction, (there, (dx, dy)) in enumerate(edges):
    for y, x in np.argwhere(there).tolist():
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
      # Right turns first: so pixels that touch at a corner are not joined.
      turns = [(x, y, (direction + turn) % 4) for turn in (1, 0, 3)]
      edge = next(turn for turn in turns if turn == start or turn in left)
    loops.append(loop)
  return loops


def _corners(loop: list[tuple[int, int]]) -> Float[np.ndarray, "n 2"]:
  """Only the points where the walk turns."""
  points = np.array(loop)
  before, after = points - np.roll(points, 1, axis=0), np.roll(points, -1, axis=0) - points
  return points[(before != after).any(axis=1)].astype(np.float64)


def _area(loop: Float[np.ndarray, "n 2"]) -> float:
  """Positive for outer outlines, negative for holes."""
  x, y = loop.T
  return float(np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y)) / 2
