"""Lazy masks over an image: each mask is computed on access, since all masks of a large image would
not fit into memory."""

import abc
from collections.abc import Iterator, Sequence
from typing import Self, overload

import numpy as np
from jaxtyping import Bool, Float

from sam3_jax.outputs.column_runs import ColumnRuns, concatenate, transitions
from sam3_jax.outputs.rle import decode, encode

_STRIP = 2**16  # values of a resized mask processed at a time; two such arrays fit into the cache


class LazyMasks(abc.ABC):
  """A sequence of masks over an image, computed on access and not cached.

  `masks[i]` is bool [h, w]; `masks[a:b]` has the same class; `masks.rle(i)` is COCO's run-length
  encoding; `masks.at(size)` gives the masks over an image of another size; `np.asarray(masks)` is
  bool [n, h, w] with all masks.

  Attributes:
    size: height and width of the image in pixels.
  """

  size: tuple[int, int]

  @abc.abstractmethod
  def __len__(self) -> int: ...

  @abc.abstractmethod
  def rle(self, index: int) -> dict:
    """COCO's compressed run lengths: {"size": [h, w], "counts": str}, as pycocotools writes them.

    Equal to `pycocotools.mask.encode(np.asfortranarray(masks[index]))`, "counts" decoded to str.
    """

  @abc.abstractmethod
  def at(self, size: tuple[int, int]) -> Self:
    """The same masks over an image of another size."""

  @abc.abstractmethod
  def _mask(self, index: int) -> Bool[np.ndarray, "h w"]:
    """Computes a mask; `index` is not negative."""

  @abc.abstractmethod
  def _subset(self, index: slice | np.ndarray | Sequence[int]) -> Self: ...

  def __repr__(self) -> str:
    return f"{type(self).__name__}({len(self)} of {self.size[0]} x {self.size[1]})"

  @overload
  def __getitem__(self, index: int | np.integer) -> Bool[np.ndarray, "h w"]: ...
  @overload
  def __getitem__(self, index: slice | np.ndarray | Sequence[int]) -> Self: ...
  def __getitem__(self, index):
    if not isinstance(index, int | np.integer):
      return self._subset(index)
    return self._mask(self._nonnegative(index))

  def __array__(self, dtype=None, copy=None) -> Bool[np.ndarray, "n h w"]:
    if copy is False:
      raise ValueError("masks are computed on access: np.asarray(masks, copy=False) is impossible.")
    masks = np.empty((len(self), *self.size), bool)
    for i in range(len(self)):
      masks[i] = self[i]
    return masks if dtype is None else masks.astype(dtype)

  def _nonnegative(self, index: int | np.integer) -> int:
    """Converts a negative index to a nonnegative one."""
    if not -len(self) <= index < len(self):
      raise IndexError(f"mask index {index} is out of range: there are {len(self)} masks.")
    return int(index) % len(self)


class Masks(LazyMasks):
  """Masks given by logits, which are resized to the image.

  Computing a mask of 20,000 x 15,000 pixels takes about 70 MB in addition to the result. `rle`
  takes the same plus its runs, and never has the whole mask in memory.

  Args:
    logits: before the sigmoid, on the decoder's grid.
    size: height and width of the source image in pixels.
  """

  def __init__(self, logits: Float[np.ndarray, "n Hm Wm"], size: tuple[int, int]):
    self.logits = logits
    self.size = _as_size(size)

  def __len__(self) -> int:
    return len(self.logits)

  def _subset(self, index):
    return Masks(self.logits[index], self.size)

  def _mask(self, index: int) -> Bool[np.ndarray, "h w"]:
    mask, grid = np.zeros(self.size, bool), self._grid(index)
    rows, columns = _reach(grid, self.size)
    for row, strip in _strips(grid, self.size, rows, columns):
      np.greater(strip, 0, out=mask[row : row + len(strip), columns])
    return mask

  def rle(self, index: int) -> dict:
    return self.runs(index).rle()

  def runs(
    self, index: int, image: tuple[int, int] | None = None, corner: tuple[int, int] = (0, 0)
  ) -> ColumnRuns:
    """The runs of a mask down the columns.

    Args:
      index: of the mask.
      image: height and width of a larger image, of which these masks cover a window; None if there
        is none.
      corner: x and y of the window's top left pixel.
    """
    height, width = self.size
    size, grid = self.size if image is None else image, self._grid(self._nonnegative(index))
    rows, columns = _reach(grid, self.size)
    # Computes the transposed mask in strips of whole columns.
    strips = _strips(grid.T, (width, height), columns, rows)
    return concatenate(
      (
        transitions(strip > 0, size[0], (corner[0] + column, corner[1] + rows.start))
        for column, strip in strips
      ),
      size,
    )

  def at(self, size: tuple[int, int]) -> "Masks":
    return Masks(self.logits, size)

  def _grid(self, index: int) -> Float[np.ndarray, "Hm Wm"]:
    return np.asarray(self.logits[index], np.float32)


class RleMasks(LazyMasks):
  """Masks given by run lengths.

  Args:
    rles: COCO's compressed run lengths, all of the same size.
    size: height and width of the image; masks are resized to it with nearest neighbors.
  """

  def __init__(self, rles: Sequence[dict], size: tuple[int, int]):
    self.rles = list(rles)
    self.size = _as_size(size)

  def __len__(self) -> int:
    return len(self.rles)

  def _subset(self, index):
    return RleMasks([self.rles[row] for row in np.arange(len(self))[index]], self.size)

  def _mask(self, index: int) -> Bool[np.ndarray, "h w"]:
    mask = decode(self.rles[index]).astype(bool)
    for axis, (source, side) in enumerate(zip(mask.shape, self.size, strict=True)):
      if source != side:
        mask = mask.take(np.arange(side) * source // side, axis=axis)
    return mask

  def rle(self, index: int) -> dict:
    rle = self.rles[self._nonnegative(index)]
    return rle if tuple(rle["size"]) == self.size else encode(self[index])

  def at(self, size: tuple[int, int]) -> "RleMasks":
    return RleMasks(self.rles, size)


class RunMasks(LazyMasks):
  """Masks of a large image given by runs down its columns; `rle` never has a mask as a bitmap.

  Args:
    runs: the masks, all over images of the same size.
    size: height and width of the image; masks are resized to it with nearest neighbors.
  """

  def __init__(self, runs: Sequence[ColumnRuns], size: tuple[int, int]):
    self.runs = list(runs)
    self.size = _as_size(size)

  def __len__(self) -> int:
    return len(self.runs)

  def _subset(self, index):
    return RunMasks([self.runs[row] for row in np.arange(len(self))[index]], self.size)

  def _mask(self, index: int) -> Bool[np.ndarray, "h w"]:
    runs = self.runs[index]
    return runs.to_mask() if runs.size == self.size else runs.sample(self.size)

  def rle(self, index: int) -> dict:
    runs = self.runs[self._nonnegative(index)]
    return runs.rle() if runs.size == self.size else encode(self[index])

  def at(self, size: tuple[int, int]) -> "RunMasks":
    return RunMasks(self.runs, size)


def _as_size(size: tuple[int, int]) -> tuple[int, int]:
  """Validates a height and width; raises ValueError unless both are at least 1."""
  height, width = (int(side) for side in size)
  if min(height, width) < 1:
    raise ValueError(
      f"the source image is {height} x {width} (height x width), but masks need its size in pixels."
    )
  return height, width


def interpolate(
  grid: Float[np.ndarray, "Hm Wm"], size: tuple[int, int]
) -> Float[np.ndarray, "h w"]:
  """Bilinear resize in float32 to a height and width, equal to PyTorch's `F.interpolate`.

  With `align_corners=False` and without antialiasing, at any scale.
  """
  grid = np.asarray(grid, np.float32)
  strips = [strip for _, strip in _strips(grid, size, slice(0, size[0]), slice(0, size[1]))]
  return np.concatenate(strips)


def _strips(
  grid: Float[np.ndarray, "Hm Wm"], size: tuple[int, int], rows: slice, columns: slice
) -> Iterator[tuple[int, Float[np.ndarray, "n w"]]]:
  """Yields strips of the resized grid from the top: the first row, and the values in `columns`."""
  if rows.start == rows.stop or columns.start == columns.stop:
    return
  lower, upper, weight = _taps(grid.shape[1], size[1], columns)
  across = grid[:, lower] * (1 - weight)
  across += grid[:, upper] * weight
  lower, upper, weight = _taps(grid.shape[0], size[0], rows)
  weight = weight[:, None]
  step = max(1, _STRIP // len(across[0]))
  for start in range(0, len(lower), step):
    part = slice(start, start + step)
    strip = across[lower[part]]
    strip *= 1 - weight[part]
    below = across[upper[part]]
    below *= weight[part]
    strip += below
    yield rows.start + start, strip


def _taps(source: int, result: int, part: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """The two cells to interpolate for each result, and the weight of the second (as in PyTorch)."""
  scale = np.float32(source) / np.float32(result)
  # PyTorch rounds once, after a fused multiply-add; float64 reproduces that.
  index = np.arange(part.start, part.stop)
  position = (scale.astype(np.float64) * (index + 0.5) - 0.5).astype(np.float32)
  position = np.maximum(position, 0)
  lower = np.minimum(position.astype(np.int64), source - 1)
  weight = np.clip(position - lower.astype(np.float32), 0, 1)
  return lower, np.minimum(lower + 1, source - 1), weight


def _reach(grid: Float[np.ndarray, "Hm Wm"], size: tuple[int, int]) -> tuple[slice, slice]:
  """The rows and columns that contain the mask; elsewhere all logits are at most 0."""
  inside = grid > 0
  slices = []
  for axis in (0, 1):
    cells = np.flatnonzero(inside.any(axis=1 - axis))
    if not len(cells):
      return slice(0, 0), slice(0, 0)
    lower, upper, _ = _taps(grid.shape[axis], size[axis], slice(0, size[axis]))
    start = np.searchsorted(upper, cells[0], side="left")
    slices.append(slice(int(start), int(np.searchsorted(lower, cells[-1], side="right"))))
  return slices[0], slices[1]
