"""Parses the options for georeferenced rasters of a command line."""

import enum
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from sam3_jax.inputs.raster import RasterOptions


class FeatureLayout(enum.StrEnum):
  geojson = "geojson"
  gpkg = "gpkg"
  geoparquet = "geoparquet"


def parse_raster(
  to: FeatureLayout | None, bands: str | None, stretch: str | None
) -> "RasterOptions | None":
  """The options of --bands and --stretch; None without these and without --to.

  Raises:
    ValueError: a value that is not numbers, or out of its range.
    ImportError: an option is given, and the extra `geo` is not installed.
  """
  if to is bands is stretch is None:
    return None
  from sam3_jax.inputs.raster import RasterOptions, import_rasterio

  import_rasterio()
  if to is not None:
    from sam3_jax.outputs.geo_features import import_geopandas

    import_geopandas()
  try:
    return RasterOptions(_numbers("bands", bands, int), _numbers("stretch", stretch, float))
  except ValueError as error:
    raise ValueError(f"--{error}") from None


def _numbers(name: str, text: str | None, kind: Callable[[str], Any]) -> tuple[Any, ...] | None:
  if text is None:
    return None
  try:
    return tuple(kind(part) for part in text.split(","))
  except ValueError:
    example = {"bands": "3,2,1", "stretch": "2,98"}[name]
    raise ValueError(f"{name} must be numbers, such as {example}; got {text!r:.60}.") from None
