"""Masks of large images as runs down their columns, the order of COCO's run lengths.

Memory and time depend on the outlines of a mask, and not on the size of its image: a mask of
12,000 x 9,000 pixels is never a bitmap.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from sam3_jax.outputs.rle import Rle, coco_api

Box = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels


@dataclasses.dataclass(frozen=True)
class ColumnRuns:
  """A mask as runs of pixels, none of which leaves its column.

  Pixel x, y has the number x * height + y.

  Attributes:
    size: height and width of the image in pixels.
    starts: the number of the first pixel of each run, ascending.
    stops: the number after the last pixel of each run, at most the next start.
  """

  size: tuple[int, int]
  starts: Int[np.ndarray, " n"]
  stops: Int[np.ndarray, " n"]

  @classmethod
  def of_mask(
    cls,
    mask: Bool[np.ndarray, "h w"],
    size: tuple[int, int] | None = None,
    corner: tuple[int, int] = (0, 0),
  ) -> "ColumnRuns":
    """The runs of a bitmap.

    Args:
      mask: of a window of the image.
      size: height and width of the image; None if the window is the whole image.
      corner: x and y of the window's top left pixel.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    size, (x, y) = mask.shape if size is None else size, corner
    if not len(rows):
      return cls(size, *np.zeros((2, 0), np.int64))
    inside = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].T
    return cls(size, *transitions(inside, size[0], (x + int(columns[0]), y + int(rows[0]))))

  @functools.cached_property
  def area(self) -> int:
    """The number of pixels."""
    return int((self.stops - self.starts).sum())

  @functools.cached_property
  def box(self) -> Box:
    """The bounding box; zeros if there is no pixel."""
    if not len(self.starts):
      return 0, 0, 0, 0
    column, first = np.divmod(self.starts, self.size[0])
    last = first + self.stops - self.starts
    return int(column[0]), int(first.min()), int(column[-1]) + 1, int(last.max())

  def crop(self, box: Box) -> "ColumnRuns":
    """The part of the mask inside a box; the image stays the same."""
    x0, y0, x1, y1 = box
    low, high = np.searchsorted(self.starts, [x0 * self.size[0], x1 * self.size[0]])
    starts, stops = self.starts[low:high], self.stops[low:high]
    top = starts // self.size[0] * self.size[0]
    starts, stops = np.maximum(starts, top + y0), np.minimum(stops, top + y1)
    kept = starts < stops
    return ColumnRuns(self.size, starts[kept], stops[kept])

  def shared(self, other: "ColumnRuns") -> int:
    """The number of pixels that are in both masks."""
    if len(other.starts) > len(self.starts):
      return other.shared(self)
    if not len(other.starts):
      return 0
    return int((self._before(other.stops) - self._before(other.starts)).sum())

  def _before(self, pixels: Int[np.ndarray, " k"]) -> Int[np.ndarray, " k"]:
    """How many pixels of the mask have a lower number."""
    lengths = self.stops - self.starts
    run = np.searchsorted(self.starts, pixels, side="right") - 1
    within = np.clip(pixels - self.starts[run], 0, lengths[run])
    return np.where(run < 0, 0, (np.cumsum(lengths) - lengths)[run] + within)

  def to_mask(self, box: Box | None = None) -> Bool[np.ndarray, "h w"]:
    """The bitmap of the mask inside a box; None for the whole image."""
    x0, y0, x1, y1 = (0, 0, self.size[1], self.size[0]) if box is None else box
    inside = self.crop((x0, y0, x1, y1))
    column, first = np.divmod(inside.starts, self.size[0])
    height = y1 - y0
    # The first pixel of a run and the pixel after it invert everything that follows.
    flips = np.zeros((x1 - x0) * height + 1, np.int8)
    starts = (column - x0) * height + first - y0
    np.add.at(flips, starts, 1)
    np.add.at(flips, starts + inside.stops - inside.starts, -1)
    return np.cumsum(flips[:-1], dtype=np.int8).astype(bool).reshape(x1 - x0, height).T

  def sample(self, size: tuple[int, int]) -> Bool[np.ndarray, "h w"]:
    """The mask over an image of another size, by nearest neighbors."""
    sides = [np.arange(target) * own // target for own, target in zip(self.size, size, strict=True)]
    x0, y0, x1, y1 = self.box
    (top, bottom), (left, right) = (
      np.searchsorted(side, limits)
      for side, limits in zip(sides, ((y0, y1), (x0, x1)), strict=True)
    )
    mask = np.zeros(size, bool)
    if top < bottom and left < right:
      pixels = sides[1][left:right] * self.size[0] + sides[0][top:bottom, None]
      run = np.searchsorted(self.starts, pixels, side="right") - 1
      mask[top:bottom, left:right] = (run >= 0) & (pixels < self.stops[run])
    return mask

  def rle(self) -> Rle:
    """COCO's compressed run lengths, equal to those of pycocotools."""
    height, width = self.size
    # A run that continues in the next column has its end and start at the same pixel.
    apart = self.starts[1:] != self.stops[:-1]
    first, last = (x[: len(self.starts)] for x in (np.append(True, apart), np.append(apart, True)))
    ends = np.stack([self.starts[first], self.stops[last]], axis=1)
    runs = np.diff(ends.ravel(), prepend=0, append=height * width)
    runs = runs[: len(runs) - (runs[-1] == 0)]
    encoded: Any = coco_api().frPyObjects(
      {"size": [height, width], "counts": runs.tolist()}, height, width
    )
    return {"size": [height, width], "counts": encoded["counts"].decode("ascii")}


def transitions(
  transposed: Bool[np.ndarray, "w h"], height: int, corner: tuple[int, int]
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
  """Starts and stops of the runs of a window, given column by column.

  Args:
    transposed: the mask of the window.
    height: of the image.
    corner: x and y of the window's top left pixel.
  """
  columns, high = transposed.shape
  # A False before and after each column ends its runs there.
  inside = np.zeros(columns * (high + 1) + 1, bool)
  inside[1:].reshape(-1, high + 1)[:, :high] = transposed
  right, down = np.divmod(np.flatnonzero(inside[1:] != inside[:-1]), high + 1)
  changes = (corner[0] + right) * height + corner[1] + down
  return changes[::2], changes[1::2]


def union(masks: Sequence[ColumnRuns]) -> ColumnRuns:
  """The pixels that are in any of the masks, of which there is at least one."""
  if len(masks) == 1:
    return masks[0]
  starts = np.concatenate([mask.starts for mask in masks])
  stops = np.concatenate([mask.stops for mask in masks])
  order = np.argsort(starts, kind="stable")
  starts, stops = starts[order], np.maximum.accumulate(stops[order])
  # Runs that only touch stay apart, as one of them may be at the end of its column.
  first = np.append(True, starts[1:] >= stops[:-1])[: len(starts)]
  last = np.append(first[1:], True)[: len(starts)]
  return ColumnRuns(masks[0].size, starts[first], stops[last])


def concatenate(
  parts: Iterable[tuple[np.ndarray, np.ndarray]], size: tuple[int, int]
) -> ColumnRuns:
  """Joins the runs of windows that follow each other from left to right."""
  starts, stops = zip(*parts, strict=True) if (parts := list(parts)) else ((), ())
  empty = np.zeros(0, np.int64)
  return ColumnRuns(size, np.concatenate([empty, *starts]), np.concatenate([empty, *stops]))
