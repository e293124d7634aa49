"""Instances of georeferenced rasters as features: GeoJSON, GeoPackage and GeoParquet.

Needs the extra `geo`. Each instance is a feature with its polygons in the raster's CRS. GeoJSON has
that CRS too, as the member `crs` of GeoJSON 2008, which GDAL, QGIS and geopandas read; RFC 7946
knows longitudes and latitudes of WGS 84 only, so convert files for web maps:
`geopandas.read_file(path).to_crs(4326)`.
"""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from sam3_jax.outputs.coco_json import Write
from sam3_jax.outputs.column_runs import ColumnRuns
from sam3_jax.outputs.instances import Instances
from sam3_jax.outputs.masks import RunMasks

DRIVERS = {"geojson": "GeoJSON", "gpkg": "GPKG"}  # of GDAL; geoparquet has none
SUFFIXES = {"geojson": ".geojson", "gpkg": ".gpkg", "geoparquet": ".parquet"}
LAYER = "instances"  # the name of the layer


def features(
  instances: Sequence[Instances], phrases: Sequence[str], crs: Any, transform: Any
) -> Any:
  """Converts the instances of a raster to a `geopandas.GeoDataFrame`.

  Args:
    instances: the results, one entry for each phrase, with `RunMasks`.
    phrases: of each entry.
    crs: the coordinate reference system of the raster.
    transform: maps x and y in pixels to coordinates (an `affine.Affine`).

  Returns:
    The columns `id`, `phrase`, `score`, `area_m2` (area on the ground, see `ground_areas`) and
    `geometry` (MultiPolygon along the edges of pixels).

  Raises:
    ImportError: the extra `geo` is not installed.
  """
  geopandas = import_geopandas()
  rows: dict[str, list[Any]] = {"id": [], "phrase": [], "score": [], "geometry": []}
  for found, phrase in zip(instances, phrases, strict=True):
    if not isinstance(found.masks, RunMasks):
      raise TypeError(f"features take results of segment_tiled; got {type(found.masks).__name__}.")
    for identity, score, runs in zip(found.ids, found.scores, found.masks.runs, strict=True):
      rows["id"].append(int(identity))
      rows["phrase"].append(phrase)
      rows["score"].append(float(str(score)))  # with the digits that distinguish float32 values
      rows["geometry"].append(polygons(runs, transform))
  geometry = geopandas.GeoSeries(rows.pop("geometry"), crs=crs)
  columns = {
    "id": np.array(rows["id"], np.int64),
    "phrase": np.array(rows["phrase"], object),
    "score": np.array(rows["score"], np.float64),
    "area_m2": ground_areas(geometry),
  }
  return geopandas.GeoDataFrame(columns, geometry=geometry, crs=crs)


def import_geopandas() -> Any:
  """The module geopandas; raises ImportError if it is not installed."""
  try:
    import geopandas
  except ImportError as error:
    raise ImportError("features need geopandas: pip install 'sam3-jax[geo]'.") from error
  return geopandas


def polygons(runs: ColumnRuns, transform: Any) -> Any:
  """A mask as a shapely MultiPolygon, with holes, in coordinates.

  Pixels that touch only at a corner are not connected. Takes a bitmap of the mask's bounding box.
  """
  import rasterio.features
  import shapely.affinity
  import shapely.geometry

  x0, y0, _, _ = runs.box
  mask = runs.to_mask(runs.box)
  found = rasterio.features.shapes(
    mask.astype(np.uint8), mask=mask, connectivity=4, transform=transform.translation(x0, y0)
  )
  parts: Any = [shapely.geometry.shape(shape) for shape, _ in found]
  corner = [transform.a, transform.b, transform.d, transform.e, transform.c, transform.f]
  moved = shapely.geometry.MultiPolygon(parts)
  return shapely.affinity.affine_transform(moved, corner)


def ground_areas(geometry: Any) -> np.ndarray:
  """The areas of a `geopandas.GeoSeries` on the ground, in square meters.

  They are geodesic, on the ellipsoid of the CRS, as planar areas depend on the projection (in web
  maps, EPSG:3857, they are twice as large at a latitude of 45 degrees). Planar areas are used in a
  local CRS, which has no ellipsoid.

  Args:
    geometry: polygons, with a CRS.
  """
  from shapely.geometry import MultiPolygon
  from shapely.geometry.polygon import orient

  crs: Any = geometry.crs
  if (geographic := crs.geodetic_crs) is None:
    return np.asarray(geometry.area) * crs.axis_info[0].unit_conversion_factor ** 2
  geod = crs.get_geod()
  oriented = [
    MultiPolygon([orient(part) for part in one.geoms]) for one in geometry.to_crs(geographic)
  ]
  return np.array([abs(geod.geometry_area_perimeter(one)[0]) for one in oriented], np.float64)


def writer(frame: Any, layout: str) -> Write:
  """A function that writes features to a file.

  Args:
    frame: of `features`.
    layout: geojson, gpkg or geoparquet.
  """
  buffer = io.BytesIO()
  if layout == "geoparquet":
    frame.to_parquet(buffer, index=False)
  else:
    frame.to_file(buffer, driver=DRIVERS[layout], layer=LAYER, engine="pyogrio", index=False)
  content = buffer.getvalue()
  return lambda file: file.write(content)
