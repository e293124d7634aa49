"""The windows of a large image: squares in rows, each of which overlaps its neighbors."""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sam3_jax.utils.validation import is_number, is_whole

OVERLAP = 0.25
MIN_TILE = 32  # pixels
MAX_OVERLAP = 0.75  # with which a pixel is in up to 16 windows


class Window(NamedTuple):
  """A part of an image, in pixels."""

  x0: int
  y0: int
  x1: int
  y1: int

  @property
  def size(self) -> tuple[int, int]:
    """Height and width."""
    return self.y1 - self.y0, self.x1 - self.x0

  def overlaps(self, other: "Window") -> bool:
    """Whether any pixel is in both."""
    return self.x0 < other.x1 and other.x0 < self.x1 and self.y0 < other.y1 and other.y0 < self.y1


@dataclasses.dataclass(frozen=True)
class Tiling:
  """How to cut an image into windows.

  Attributes:
    tile: side of a window in pixels of the image, at least 32.
    overlap: the least fraction of `tile` that neighbors share, in [0, 0.75]. Objects up to
      `overlap * tile` pixels are whole in at least one window.

  Raises:
    ValueError: a value out of its range.
  """

  tile: int
  overlap: float = OVERLAP

  def __post_init__(self):
    if not (is_whole(self.tile) and self.tile >= MIN_TILE):
      raise ValueError(
        f"tile must be a whole number of pixels, at least {MIN_TILE}; got {self.tile!r:.60}. The "
        "size of the model's input, such as 1008, shows objects at their own size."
      )
    if not (is_number(self.overlap) and 0 <= self.overlap <= MAX_OVERLAP):  # NaN is not
      raise ValueError(
        f"overlap must be a fraction of the tile in [0, {MAX_OVERLAP}]; got {self.overlap!r:.60}. "
        f"Leave it out for {OVERLAP}."
      )

  def windows(self, height: int, width: int) -> list[Window]:
    """The windows of an image, row by row.

    All have the same size. A side of the image that is shorter than `tile` is not cut.
    """
    tops, lefts = self._starts(height), self._starts(width)
    sides = min(self.tile, height), min(self.tile, width)
    return [Window(x, y, x + sides[1], y + sides[0]) for y in tops for x in lefts]

  def within(self, box: tuple[int, int, int, int]) -> list[Window]:
    """Windows without overlap that cover a box exactly; the last ones are smaller."""
    x0, y0, x1, y1 = box
    return [
      Window(x, y, min(x + self.tile, x1), min(y + self.tile, y1))
      for y in range(y0, y1, self.tile)
      for x in range(x0, x1, self.tile)
    ]

  def around(self, box: Sequence[float], height: int, width: int) -> Window:
    """A window of an image with a box in its middle; larger than the others if the box is."""
    side = max(self.tile, math.ceil(max(box[2] - box[0], box[3] - box[1])))
    sides = min(side, width), min(side, height)
    x, y = (
      min(max(0, round((box[i] + box[i + 2] - sides[i]) / 2)), limit - sides[i])
      for i, limit in enumerate((width, height))
    )
    return Window(x, y, x + sides[0], y + sides[1])

  def _starts(self, side: int) -> list[int]:
    """Evenly spaced starts of windows along a side of the image."""
    step = self.tile - math.ceil(self.tile * self.overlap)
    count = 1 + max(0, math.ceil((side - self.tile) / step))
    return np.linspace(0, max(0, side - self.tile), count).astype(int).tolist()
