"""Georeferenced rasters, GeoTIFF and COG, read window by window with rasterio (the extra `geo`).

Coordinates of pixels are mapped to the raster's coordinate reference system (CRS) by its affine
transform, which may rotate.
"""

import contextlib
import dataclasses
import os
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8

from sam3_jax.inputs.image_limits import MAX_PIXELS, InvalidImageError, check_size
from sam3_jax.inputs.tiling import Window
from sam3_jax.inputs.window_reader import WindowReader
from sam3_jax.utils.validation import is_number, is_whole

DRIVER = "GTiff"  # of GDAL; it reads COG too. Others may open further files or addresses
SAMPLE = 1024  # pixels of each side from which a stretch is computed


@dataclasses.dataclass(frozen=True)
class RasterOptions:
  """How the bands of a raster become an RGB image.

  Attributes:
    bands: numbers of the bands for red, green and blue, from 1, or of one band for gray; None for
      the first three, or the first if there are fewer.
    stretch: the percentiles of each band's values that become 0 and 255; 0, 100 for the minimum and
      the maximum. Required for bands that are not uint8; None leaves uint8 bands unchanged.

  Raises:
    ValueError: a value out of its range.
  """

  bands: tuple[int, ...] | None = None
  stretch: tuple[float, float] | None = None

  def __post_init__(self):
    bands, stretch = self.bands, self.stretch
    if bands is not None and not (
      len(bands) in (1, 3) and all(is_whole(band) and band > 0 for band in bands)
    ):
      raise ValueError(
        f"bands must be one or three numbers from 1; got {bands!r:.60}. Use 3,2,1 for bands in the "
        "order blue, green, red."
      )
    if stretch is not None and not (
      len(stretch) == 2 and all(map(is_number, stretch)) and 0 <= stretch[0] < stretch[1] <= 100
    ):
      raise ValueError(
        f"stretch must be two percentiles, 0 to 100, in ascending order; got {stretch!r:.60}. Use "
        "2,98, or 0,100 for the minimum and the maximum."
      )


class RasterReader(WindowReader):
  """Windows of a raster.

  Attributes:
    name: of the file, for messages.
    crs: its coordinate reference system, as rasterio's `CRS`; None if it has none.
    transform: maps x and y in pixels to coordinates (an `affine.Affine`).
  """

  def __init__(self, dataset: Any, name: str, options: RasterOptions):
    super().__init__((dataset.height, dataset.width))
    self.name, self.crs, self.transform = name, dataset.crs, dataset.transform
    self._dataset = dataset
    count = dataset.count
    self._bands = options.bands or ((1, 2, 3) if count >= 3 else (1,))
    if max(self._bands) > count:
      raise InvalidImageError(
        f"{name} has {count} {'band' if count == 1 else 'bands'}, and no band {max(self._bands)}; "
        f"choose from 1 to {count} with bands= (--bands on the command line)."
      )
    self._limits = self._stretch(options.stretch)
    self.complete = self._is_complete()

  def read(self, window: Window) -> UInt8[np.ndarray, "h w 3"]:
    """The pixels of a window, RGB; black where there are no data."""
    values = self._dataset.read(self._bands, window=_window(window))
    if self._limits is not None:
      low, high = self._limits
      scaled = (values - low) / (high - low)
      values = np.rint(255 * np.clip(np.nan_to_num(scaled, nan=0), 0, 1)).astype(np.uint8)
    if (valid := self.valid(window)) is not None:
      values = np.where(valid, values, np.uint8(0))
    pixels = np.moveaxis(values, 0, 2)
    return np.ascontiguousarray(np.repeat(pixels, 3, axis=2) if len(values) == 1 else pixels)

  def valid(self, window: Window) -> Bool[np.ndarray, "h w"] | None:
    if self.complete:
      return None
    place = _window(window)
    valid = (self._dataset.read_masks(self._bands, window=place) > 0).all(axis=0)
    if any(np.dtype(self._dataset.dtypes[band - 1]).kind == "f" for band in self._bands):
      valid &= np.isfinite(self._dataset.read(self._bands, window=place)).all(axis=0)
    return None if valid.all() else valid

  def _is_complete(self) -> bool:
    """Whether no pixel can be without data; also if an alpha band is shown as a color."""
    from rasterio.enums import ColorInterp, MaskFlags

    shown = [self._dataset.colorinterp[band - 1] for band in self._bands]
    flags = [self._dataset.mask_flag_enums[band - 1] for band in self._bands]
    integers = all(np.dtype(self._dataset.dtypes[band - 1]).kind in "iu" for band in self._bands)
    valid = all(MaskFlags.all_valid in one for one in flags)
    return integers and (valid or ColorInterp.alpha in shown)

  def _stretch(self, percentiles: tuple[float, float] | None) -> tuple[Any, Any] | None:
    """The values of each band that become 0 and 255; None if they are 0 and 255."""
    kinds = {np.dtype(self._dataset.dtypes[band - 1]) for band in self._bands}
    if percentiles is None and kinds == {np.dtype(np.uint8)}:
      return None
    names = " and ".join(sorted(map(str, kinds)))
    if any(kind.kind not in "iuf" for kind in kinds):
      raise InvalidImageError(f"{self.name} has {names} values: convert it to real numbers.")
    if percentiles is None:
      raise InvalidImageError(
        f"{self.name} has {names} values: give the percentiles that become black and white, "
        "stretch=(2, 98) (--stretch 2,98 on the command line)."
      )
    shape = len(self._bands), *(min(side, SAMPLE) for side in self.size)
    values = self._dataset.read(self._bands, out_shape=shape).astype(np.float64)
    masks = self._dataset.read_masks(self._bands, out_shape=shape) > 0
    valid = masks.all(axis=0) & np.isfinite(values).all(axis=0)
    if not valid.any():
      raise InvalidImageError(f"{self.name} has no valid pixel: all are marked as nodata.")
    low, high = np.percentile(values[:, valid], percentiles, axis=1)[:, :, None, None]
    return low, np.where(high > low, high, low + 1)


@contextlib.contextmanager
def open_raster(
  path: str | os.PathLike,
  options: RasterOptions | None = None,
  *,
  georeferenced: bool = False,
  max_pixels: int = MAX_PIXELS,
) -> Iterator[RasterReader]:
  """Opens a GeoTIFF or COG to read windows of it.

  Args:
    path: of the file.
    options: of bands and stretch.
    georeferenced: refuse a raster without CRS or without a transform to it.
    max_pixels: larger rasters are refused.

  Raises:
    ImportError: rasterio is not installed.
    FileNotFoundError: no such file.
    ValueError: another format, damaged, too large, without CRS or transform, without one of the
      bands, or with values that need a stretch.
  """
  rasterio = import_rasterio()
  name = os.fspath(path)
  if not os.path.isfile(path):
    raise FileNotFoundError(f"there is no image {name}: check the path.")
  with contextlib.ExitStack() as stack:
    try:
      with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        dataset = stack.enter_context(rasterio.open(name, driver=DRIVER))
    except rasterio.errors.RasterioIOError:
      raise InvalidImageError(
        f"{name} is not a GeoTIFF, or is damaged: convert it with gdal_translate, or leave out the "
        "options for rasters (--to, --bands, --stretch)."
      ) from None
    check_size(name, dataset.height, dataset.width, max_pixels)
    if georeferenced and not dataset.crs:
      raise InvalidImageError(
        f"{name} has no coordinate reference system: add it, such as `rio edit-info --crs "
        f"EPSG:32633 {name}`, or leave out --to for results in pixels."
      )
    if georeferenced and dataset.transform.is_identity:  # also that of files without one
      raise InvalidImageError(
        f"{name} has a coordinate reference system but no transform to it: add it, such as `rio "
        f'edit-info --transform "[0.5, 0, 500000, 0, -0.5, 5000000]" {name}`, warp it if it has '
        "control points (gdalwarp), or leave out --to for results in pixels."
      )
    reader = RasterReader(dataset, name, options or RasterOptions())
    try:
      yield reader
    except rasterio.errors.RasterioIOError as error:
      reason = " ".join(str(error).split()).rstrip(".")
      raise InvalidImageError(
        f"{name} is truncated or damaged ({reason:.120}): get the file again."
      ) from error


def import_rasterio() -> Any:
  """The module rasterio; raises ImportError if it is not installed."""
  try:
    import rasterio
    import rasterio.errors
  except ImportError as error:
    raise ImportError(
      "georeferenced rasters need rasterio and geopandas: pip install 'sam3-jax[geo]'."
    ) from error
  return rasterio


def _window(window: Window) -> Any:
  from rasterio.windows import Window as RasterWindow

  height, width = window.size
  return RasterWindow(window.x0, window.y0, width, height)  # pyright: ignore[reportCallIssue]
