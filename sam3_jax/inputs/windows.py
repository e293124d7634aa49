"""Reads windows of large images.

An array, or an array on disk (`np.memmap`), is read where it is. Other images are decoded once and
kept as 8-bit RGB: 3 bytes per pixel, and 7 while they are decoded.
"""

import abc
import contextlib
from collections.abc import Iterator

import numpy as np
from jaxtyping import UInt8

from sam3_jax.inputs.preprocess import MAX_PIXELS, ImageSource, read_image
from sam3_jax.inputs.tiling import Window


class WindowReader(abc.ABC):
  """An image of which windows are read.

  `reader[a:b]` is rows a to b as uint8 [b - a, w, 3], and `np.asarray(reader)` all rows. With
  `shape`, `dtype` and `ndim`, this is all that `resize` and `visualize.canvas` use, so that they
  read a large image in strips.

  Attributes:
    size: height and width in pixels.
  """

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


class ArrayWindows(WindowReader):
  """Windows of pixels in memory, uint8 [h, w, 3]."""

  def __init__(self, pixels: UInt8[np.ndarray, "h w 3"]):
    super().__init__((pixels.shape[0], pixels.shape[1]))
    self._pixels = pixels

  def read(self, window: Window) -> UInt8[np.ndarray, "h w 3"]:
    return np.ascontiguousarray(self._pixels[window.y0 : window.y1, window.x0 : window.x1])


@contextlib.contextmanager
def open_windows(
  source: ImageSource | WindowReader, *, max_pixels: int = MAX_PIXELS
) -> Iterator[WindowReader]:
  """Opens an image to read windows of it; raises like `read_image`.

  Args:
    source: as `read_image` takes it, or a reader, which stays open.
    max_pixels: larger images are refused.
  """
  if isinstance(source, WindowReader):
    yield source
    return
  yield ArrayWindows(read_image(source, max_pixels=max_pixels))
