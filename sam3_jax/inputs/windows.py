"""Opens large images to read windows of them.

An array, or an array on disk (`np.memmap`), is read where it is. TIFF files of 8-bit RGB are read
window by window if rasterio is installed (the extra `geo`). Other images are decoded once and kept
as 8-bit RGB: 3 bytes per pixel, and 7 while they are decoded.
"""

import contextlib
import importlib.util
import os
from collections.abc import Iterator

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags

from sam3_jax.inputs.image_file import open_image
from sam3_jax.inputs.preprocess import MAX_PIXELS, ImageSource, read_image
from sam3_jax.inputs.raster import open_raster
from sam3_jax.inputs.tiling import Window
from sam3_jax.inputs.window_reader import WindowReader

_ROWS = 16  # of a file, whose values tell whether it must be read as a whole to check their range


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
  if isinstance(source, str | os.PathLike) and _is_plain_tiff(source, max_pixels):
    with open_raster(source, max_pixels=max_pixels) as raster:
      if raster.complete and not _may_be_dark(raster):
        yield raster
        return
  yield ArrayWindows(read_image(source, max_pixels=max_pixels))


def _is_plain_tiff(path: str | os.PathLike, max_pixels: int) -> bool:
  """Whether GDAL reads the same pixels from a file as Pillow; raises like `open_image`."""
  if importlib.util.find_spec("rasterio") is None:
    return False
  with open_image(path, max_pixels=max_pixels, load=False) as header:
    image = header.image
    return (
      image.format == "TIFF"
      and image.mode == "RGB"
      and not header.wide
      and image.info.get("compression") not in ("jpeg", "tiff_jpeg")
      and image.getexif().get(ExifTags.Base.Orientation, 1) == 1
    )


def _may_be_dark(reader: WindowReader) -> bool:
  """Whether the values may be of another range, which `read_image` checks."""
  step = max(1, reader.size[0] // _ROWS)
  return max(int(reader[y : y + 1].max()) for y in range(0, reader.size[0], step)) <= 1
