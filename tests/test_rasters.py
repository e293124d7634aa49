"""Georeferenced rasters: windows, bands, nodata, coordinates and areas, with a model that finds the
regions of a color."""

import json

import numpy as np
import pytest
from color_model import SIDE, ColorModel, scene
from PIL import Image

from sam3_jax.cli import segment_images
from sam3_jax.cli.main import main
from sam3_jax.inputs.preprocess import read_image
from sam3_jax.inputs.raster import RasterOptions, open_raster
from sam3_jax.inputs.tiling import Window
from sam3_jax.inputs.windows import ArrayWindows, open_windows

rasterio = pytest.importorskip("rasterio", reason="rasters need the extra geo")
geopandas = pytest.importorskip("geopandas", reason="features need the extra geo")
pyproj = pytest.importorskip("pyproj", reason="areas need the extra geo")

pytestmark = [
  pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # pycocotools
  pytest.mark.filterwarnings("ignore:Use `@` matmul:PendingDeprecationWarning"),  # rasterio's own
]

SIZE = (150, 210)
OBJECTS = 8
UTM = "EPSG:32633", (0.5, 0.0, 500_000.0, 0.0, -0.5, 5_000_000.0)
DEGREES = "EPSG:4326", (1e-5, 0.0, 13.0, 0.0, -1e-5, 47.0)
WEB = "EPSG:3857", (2.0, 0.0, 1_500_000.0, 0.0, -2.0, 6_000_000.0)
ROTATED = "EPSG:32633", (0.4, 0.3, 500_000.0, 0.3, -0.4, 5_000_000.0)  # pixels of 0.25 m2


def write(path, bands, georeference=None, **options):
  """Writes a GeoTIFF from bands [b, h, w]."""
  crs, transform = georeference or (None, None)
  profile = {
    "driver": "GTiff", "count": len(bands), "height": bands.shape[1], "width": bands.shape[2],
    "dtype": bands.dtype, "tiled": True, "blockxsize": 64, "blockysize": 64, **options,
  }  # fmt: skip
  if georeference:
    profile |= {"crs": crs, "transform": rasterio.Affine(*transform)}
  with rasterio.open(path, "w", **profile) as file:
    file.write(bands)
  return path


@pytest.fixture
def objects():
  """A scene as bands, and the masks of its objects."""
  image, masks = scene(SIZE, OBJECTS, seed=3)
  return np.moveaxis(image, 2, 0), masks


@pytest.fixture
def segment(tmp_path, monkeypatch, capsys):
  """Runs `segment` in windows; returns its exit status and what it wrote to stderr."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(segment_images.Sam3, "from_checkpoint", lambda *_, **__: ColorModel())

  def run(*typed):
    tiles = ["--tile", str(SIDE), "--overlap", "0.4"]
    status = main(["segment", *map(str, typed), "--text", "red", *tiles, "--quiet"])
    return status, capsys.readouterr().err

  return run


def true_areas(masks, georeference):
  """Areas on the ground, by an equal-area projection around the raster."""
  crs, (a, b, c, d, e, f) = georeference
  lon, lat = pyproj.Transformer.from_crs(crs, 4326, always_xy=True).transform(c, f)
  equal = pyproj.CRS.from_proj4(f"+proj=laea +lat_0={lat} +lon_0={lon} +ellps=WGS84")
  to_equal = pyproj.Transformer.from_crs(crs, equal, always_xy=True)
  areas = []
  for mask in masks:
    y, x = np.nonzero(mask)
    corners = [(x, y), (x + 1, y), (x + 1, y + 1), (x, y + 1)]
    u, v = (
      np.array(values)
      for values in zip(
        *(to_equal.transform(c + a * i + b * j, f + d * i + e * j) for i, j in corners),
        strict=True,
      )
    )
    crossed = u * np.roll(v, -1, axis=0) - np.roll(u, -1, axis=0) * v
    areas.append(np.abs(crossed.sum(axis=0) / 2).sum())
  return sorted(areas)


def read(path):
  return geopandas.read_parquet(path) if path.suffix == ".parquet" else geopandas.read_file(path)


@pytest.mark.parametrize(
  ("georeference", "to", "suffix"),
  [
    (UTM, "geojson", ".geojson"),
    (UTM, "geoparquet", ".parquet"),
    (DEGREES, "geojson", ".geojson"),
    (DEGREES, "gpkg", ".gpkg"),
    (WEB, "gpkg", ".gpkg"),
    (ROTATED, "geoparquet", ".parquet"),
  ],
)
def test_areas_and_coordinates(segment, tmp_path, objects, georeference, to, suffix):
  bands, masks = objects
  write(tmp_path / "map.tif", bands, georeference)
  assert segment("map.tif", "--to", to) == (0, "")
  found = read(tmp_path / "out" / f"map.sam3{suffix}")
  assert found.crs.to_string() in (georeference[0], "OGC:CRS84")
  assert set(found.columns) == {"id", "phrase", "score", "area_m2", "geometry"}
  assert set(found.phrase) == {"red"}
  areas = true_areas(masks, georeference)
  np.testing.assert_allclose(sorted(found.area_m2), areas, rtol=2e-5)  # measured 2e-6
  # Each object's center is in one feature.
  a, b, c, d, e, f = georeference[1]
  for mask in masks:
    y, x = (values.mean() for values in np.nonzero(mask))
    point = geopandas.points_from_xy([c + a * x + b * y], [f + d * x + e * y])[0]
    assert found.contains(point).sum() == 1
  record = json.loads((tmp_path / "out" / "map.sam3.json").read_text())
  assert len(record["annotations"]) == OBJECTS


def test_planar_areas_of_a_projected_raster(segment, tmp_path, objects):
  """Ground and planar areas differ by the square of the scale, 0.9996 at the central meridian."""
  bands, masks = objects
  write(tmp_path / "map.tif", bands, UTM)
  segment("map.tif", "--to", "gpkg")
  found = read(tmp_path / "out" / "map.sam3.gpkg")
  planar = sorted(mask.sum() * 0.25 for mask in masks)
  np.testing.assert_allclose(sorted(found.geometry.area), planar, rtol=1e-6)
  np.testing.assert_allclose(sorted(found.area_m2), planar, rtol=1e-3)  # measured 8e-4


def test_areas_in_a_local_crs(segment, tmp_path, objects):
  """In feet."""
  bands, masks = objects
  feet = 'LOCAL_CS["site",UNIT["foot",0.3048],AXIS["x",EAST],AXIS["y",NORTH]]'
  write(tmp_path / "map.tif", bands, (feet, (2.0, 0.0, 0.0, 0.0, -2.0, 0.0)))
  assert segment("map.tif", "--to", "geoparquet") == (0, "")
  found = read(tmp_path / "out" / "map.sam3.parquet")
  expected = sorted(mask.sum() * (2 * 0.3048) ** 2 for mask in masks)
  np.testing.assert_allclose(sorted(found.area_m2), expected, rtol=1e-6)


def test_holes_are_not_filled(segment, tmp_path):
  bands = np.zeros((3, SIDE, SIDE), np.uint8)
  bands[0, 10:50, 10:50] = 255
  bands[0, 20:30, 20:30] = 0
  bands[2] = 9
  write(tmp_path / "map.tif", bands, UTM)
  segment("map.tif", "--to", "geojson")
  [shape] = read(tmp_path / "out" / "map.sam3.geojson").geometry
  assert shape.area == pytest.approx((1600 - 100) * 0.25)


def test_no_instance_gives_an_empty_file(segment, tmp_path):
  write(tmp_path / "map.tif", np.full((3, 40, 50), 9, np.uint8), UTM)
  for to in ("geojson", "gpkg", "geoparquet"):
    assert segment("map.tif", "--to", to) == (0, "")
  for path in (tmp_path / "out").glob("map.sam3.g*"):
    assert len(read(path)) == 0
  assert read(tmp_path / "out" / "map.sam3.parquet").crs == UTM[0]


@pytest.mark.parametrize("kind", ["value", "alpha", "nan"])
def test_pixels_without_data_are_not_segmented(segment, tmp_path, objects, kind):
  bands, masks = objects
  hidden = np.zeros(SIZE, bool)
  hidden[:, :80] = True
  typed = ["--to", "gpkg"]
  if kind == "value":
    bands = np.where(hidden, np.uint8(7), bands)
    options = {"nodata": 7}
  elif kind == "alpha":
    bands = np.concatenate([bands, np.where(hidden, 0, 255)[None].astype(np.uint8)])
    options = {"photometric": "RGB", "alpha": "yes"}
  else:
    bands = np.where(hidden, np.nan, bands.astype(np.float32) / 100)
    options, typed = {}, [*typed, "--stretch", "0,100"]
  write(tmp_path / "map.tif", bands, UTM, **options)
  assert segment("map.tif", *typed) == (0, "")
  found = read(tmp_path / "out" / "map.sam3.gpkg")
  visible = [mask & ~hidden for mask in masks if (mask & ~hidden).any()]
  assert len(visible) < len(masks)
  np.testing.assert_allclose(
    sorted(found.geometry.area), sorted(mask.sum() * 0.25 for mask in visible)
  )


def test_masks_are_cut_where_there_are_no_data(tmp_path):
  """Also if the model sees more than there is."""

  class Everything(ColorModel):
    def _regions(self, pixels, prompt):
      return [np.ones(pixels.shape[:2], bool)]

  bands = np.full((3, 90, 100), 90, np.uint8)
  bands[:, 20:30, 10:60] = 0
  bands[:, :, :40] = 0
  write(tmp_path / "map.tif", bands, UTM, nodata=0)
  with open_raster(tmp_path / "map.tif") as reader:
    [found] = Everything().segment_tiled(reader, "red", tile=SIDE)
  np.testing.assert_array_equal(found.masks[0], bands[0] > 0)


class TestReader:
  def test_windows_equal_the_bands(self, tmp_path):
    bands = np.random.default_rng(0).integers(0, 256, (4, 90, 70), np.uint8)
    write(tmp_path / "map.tif", bands, UTM)
    with open_raster(tmp_path / "map.tif", RasterOptions(bands=(4, 2, 1))) as reader:
      window = Window(5, 60, 66, 85)
      expected = np.moveaxis(bands[[3, 1, 0]], 0, 2)
      np.testing.assert_array_equal(reader.read(window), expected[60:85, 5:66])
      np.testing.assert_array_equal(np.asarray(reader), expected)
    write(tmp_path / "map.tif", bands, UTM, photometric="MINISBLACK")  # without an alpha band
    with open_raster(tmp_path / "map.tif", RasterOptions(bands=(3,))) as reader:
      np.testing.assert_array_equal(np.asarray(reader), np.repeat(bands[2][..., None], 3, axis=2))

  def test_stretch(self, tmp_path):
    values = np.linspace(100, 1100, 101).astype(np.uint16)
    bands = np.stack([np.tile(values, (40, 1)) * k for k in (1, 2, 3)])
    write(tmp_path / "map.tif", bands, UTM)
    with open_raster(tmp_path / "map.tif", RasterOptions(stretch=(0, 100))) as reader:
      expected = np.rint(255 * (values - 100.0) / 1000)
      np.testing.assert_array_equal(reader[:1][0, :, 2], expected)
    with open_raster(tmp_path / "map.tif", RasterOptions(stretch=(10, 90))) as reader:
      expected = np.rint(255 * np.clip((values - 200.0) / 800, 0, 1))
      np.testing.assert_array_equal(reader[:1][0, :, 0], expected)

  def test_plain_tiff_files_are_read_by_windows(self, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (90, 70, 3), np.uint8)
    window = Window(5, 60, 66, 85)
    for compression in (None, "tiff_lzw", "tiff_deflate", "jpeg"):
      Image.fromarray(pixels).save(tmp_path / "map.tif", compression=compression)
      with open_windows(tmp_path / "map.tif") as reader:
        assert isinstance(reader, ArrayWindows) == (compression == "jpeg")
        whole = read_image(tmp_path / "map.tif")
        np.testing.assert_array_equal(reader.read(window), whole[60:85, 5:66])

  def test_other_tiff_files_are_read_as_displayed(self, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (90, 70, 4), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "alpha.tif")
    Image.fromarray(pixels[..., :3]).save(tmp_path / "turned.tif", exif=exif)
    Image.fromarray(pixels[..., 0]).save(tmp_path / "gray.tif")
    for path in tmp_path.iterdir():
      with open_windows(path) as reader:
        np.testing.assert_array_equal(np.asarray(reader), read_image(path))


class TestBadInput:
  @pytest.mark.parametrize(
    ("typed", "message"),
    [
      (["--to", "gpkg"], "plain.tif has no coordinate reference system: add it, such as `rio edit"),
      (["--bands", "1,2"], "--bands must be one or three numbers from 1; got (1, 2). Use 3,2,1"),
      (["--bands", "a"], "--bands must be numbers, such as 3,2,1; got 'a'."),
      (["--bands", "1,2,9"], "plain.tif has 3 bands, and no band 9; choose from 1 to 3"),
      (["--stretch", "9"], "--stretch must be two percentiles, 0 to 100, in ascending order"),
      (["--stretch", "98,2"], "--stretch must be two percentiles, 0 to 100, in ascending order"),
      (["--max-pixels", "99", "--bands", "1"], "31,500 pixels, more than 99"),
    ],
  )
  def test_options(self, segment, tmp_path, objects, typed, message):
    Image.fromarray(np.moveaxis(objects[0], 0, 2)).save(tmp_path / "plain.tif")
    status, error = segment("plain.tif", *typed)
    assert status == 2
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()

  def test_files(self, segment, tmp_path, objects):
    write(tmp_path / "deep.tif", objects[0].astype(np.uint16), UTM)
    write(tmp_path / "cut.tif", objects[0], UTM, compress="deflate")
    with pytest.warns(rasterio.errors.NotGeoreferencedWarning):
      write(tmp_path / "pixels.tif", objects[0], crs="EPSG:32633")
    data = (tmp_path / "cut.tif").read_bytes()
    (tmp_path / "cut.tif").write_bytes(data[: len(data) // 2])
    Image.fromarray(np.moveaxis(objects[0], 0, 2)).save(tmp_path / "photo.png")
    messages = {
      "deep.tif": "deep.tif has uint16 values: give the percentiles",
      "photo.png": "photo.png is not a GeoTIFF, or is damaged: convert it with gdal_translate",
      "cut.tif": "cut.tif is ",
      "pixels.tif": "pixels.tif has a coordinate reference system but no transform to it: add it",
    }
    for name, message in messages.items():
      status, error = segment(name, "--to", "gpkg")
      assert status == 2
      assert message in error
      assert error.count("\n") == 1

  def test_a_broken_raster_among_others(self, segment, tmp_path, objects):
    write(tmp_path / "map.tif", objects[0], UTM)
    Image.fromarray(np.moveaxis(objects[0], 0, 2)).save(tmp_path / "plain.tif")
    status, error = segment("plain.tif", "map.tif", "--to", "gpkg")
    assert status == 2
    assert error.count("\n") == 1
    assert len(read(tmp_path / "out" / "map.sam3.gpkg")) == OBJECTS
