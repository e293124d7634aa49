"""`WindowReader`: an image of which windows are read."""

import abc

import numpy as np
from jaxtyping import Bool, UInt8

from sam3_jax.inputs.tiling import Window


class WindowReader(abc.ABC):
  """An image of which windows are read.

  `reader[a:b]` is rows a to b as uint8 [b - a, w, 3], and `np.asarray(reader)` all rows. With
  `shape`, `dtype` and `ndim`, this is all that `resize` and `visualize.canvas` use, so that they
  read a large image in strips.

  Attributes:
    size: height and width in pixels.
    complete: whether every pixel has data; if False, see `valid`.
  """

  complete = True
  dtype = np.dtype(np.uint8)
  ndim = 3

  def __init__(self, size: tuple[int, int]):
    self.size = size

  @property
  def shape(self) -> tuple[int, int, int]:
    return *self.size, 3

  def __len__(self) -> int:
    return self.size[0]

  def __getitem__(self, rows: slice) -> UInt8[np.ndarray, "n w 3"]:
    start, stop, _ = rows.indices(self.size[0])
    return self.read(Window(0, start, self.size[1], stop))

  def __array__(self, dtype=None, copy=None) -> UInt8[np.ndarray, "h w 3"]:
    pixels = self[:]
    return pixels if dtype is None else pixels.astype(dtype)

  @abc.abstractmethod
  def read(self, window: Window) -> UInt8[np.ndarray, "h w 3"]:
    """The pixels of a window, RGB."""

  def valid(self, window: Window) -> Bool[np.ndarray, "h w"] | None:
    """Which pixels of a window have data; None if all have."""
    del window
