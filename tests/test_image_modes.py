"""Pixels of each image mode: colors, transparency, depth, and EXIF orientation."""

import io

import numpy as np
import pytest
from image_files import encode, random_image
from PIL import Image

from sam3_jax.inputs.preprocess import read_image


def test_alpha_is_composited_over_white():
  alpha, color = np.meshgrid(np.arange(256), np.arange(256))
  image = np.stack([color, 255 - color, color // 2, alpha], -1).astype(np.uint8)
  exact = 255 + (image[..., :3] - 255.0) * alpha[..., None] / 255
  np.testing.assert_array_equal(read_image(image), np.floor(exact + 0.5))
  np.testing.assert_array_equal(read_image(Image.fromarray(image)), read_image(image))
  np.testing.assert_array_equal(read_image(image.astype(np.uint16) * 257), read_image(image))


COLORS = random_image(6, 5)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV"])
def test_modes_without_transparency(mode):
  image = Image.fromarray(COLORS).convert(mode)
  np.testing.assert_array_equal(read_image(image), np.asarray(image.convert("RGB")))


def test_cmyk_conversion():
  image = Image.new("CMYK", (2, 1), (0, 255, 100, 0))
  np.testing.assert_array_equal(read_image(image)[0, 0], [255, 0, 155])


@pytest.mark.parametrize("mode", ["LA", "PA", "RGBA", "RGBa"])
def test_modes_with_transparency(mode):
  image = Image.new("RGBA", (2, 1), (90, 90, 90, 0))
  image.putpixel((1, 0), (90, 90, 90, 255))
  if mode == "PA":
    alpha, image = image.getchannel("A"), Image.new("P", (2, 1))
    image.putpalette([90, 90, 90])
    image.putalpha(alpha)
    assert image.mode == "PA"
  pixels = read_image(image.convert(mode))
  np.testing.assert_array_equal(pixels, [[[255] * 3, [90] * 3]])


def test_transparent_palette_entries():
  image = Image.new("P", (3, 1))
  image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
  for i in range(3):
    image.putpixel((i, 0), i)
  some = read_image(encode(image, transparency=bytes([0, 255, 255])))
  one = read_image(encode(image, "GIF", transparency=0))
  for pixels in (some, one):
    np.testing.assert_array_equal(pixels, [[[255, 255, 255], [40, 50, 60], [70, 80, 90]]])


def test_transparent_color():
  image = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
  pixels = read_image(encode(image, transparency=(1, 2, 3)))
  np.testing.assert_array_equal(pixels, [[[255, 255, 255], [4, 5, 6]]])


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_16_bit_grey_files(form):
  values = np.array([[0, 257, 128, 129, 30_000, 65_535]], np.uint16)
  pixels = read_image(encode(Image.fromarray(values), form))
  np.testing.assert_array_equal(pixels[0, :, 1], [0, 1, 0, 1, 117, 255])


def test_bands_of_a_tiff_file(tmp_path):
  """Pillow does not read bands that are not colors; rasterio does."""
  path = tmp_path / "bands.tif"
  Image.fromarray(COLORS).save(path)
  head = b"\x06\x01\x03\0\x01\0\0\0"  # PhotometricInterpretation: 2 is RGB, 1 is gray
  assert path.read_bytes().count(head + b"\x02") == 1
  path.write_bytes(path.read_bytes().replace(head + b"\x02", head + b"\x01"))
  for source in (path, path.read_bytes()):
    with pytest.raises(ValueError, match="is a TIFF file of an unsupported kind, such as several"):
      read_image(source)


def test_16_bit_values_in_a_32_bit_file():
  values = np.array([[0, 257, 65_535]], np.int32)
  pixels = read_image(encode(Image.fromarray(values), "TIFF"))
  np.testing.assert_array_equal(pixels[0, :, 0], [0, 1, 255])


@pytest.mark.parametrize("values", [[[-1, 5]], [[0, 65_536]]])
def test_32_bit_values(values):
  with pytest.raises(ValueError, match=r"has values .*: scale them"):
    read_image(Image.fromarray(np.array(values, np.int32)))


def test_float_and_unsupported_modes():
  with pytest.raises(ValueError, match="the PIL image holds floating-point values: scale them"):
    read_image(Image.new("F", (3, 4)))
  with pytest.raises(ValueError, match="the PIL image has pixels in mode La: convert it to RGB"):
    read_image(Image.new("La", (3, 4)))


def test_first_frame_of_an_animation():
  frames = [Image.new("RGB", (4, 3), color) for color in ("red", "blue")]
  data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
  np.testing.assert_array_equal(read_image(data), np.broadcast_to([255, 0, 0], (3, 4, 3)))


# EXIF 2.32, tag 0x0112: at which side of the displayed image are row 0 and column 0 of the file?
SIDES = {
  1: ("top", "left"),
  2: ("top", "right"),
  3: ("bottom", "right"),
  4: ("bottom", "left"),
  5: ("left", "top"),
  6: ("right", "top"),
  7: ("right", "bottom"),
  8: ("left", "bottom"),
}


@pytest.mark.parametrize("orientation", SIDES)
@pytest.mark.parametrize("form", ["PNG", "TIFF", "JPEG", "I;16"])
def test_exif_orientation(form, orientation):
  stored = np.zeros((4, 6, 3), np.uint8)
  stored[0] += 100  # row 0
  stored[:, 0] += 50  # column 0
  image = Image.fromarray(stored)
  if form == "I;16":
    image, form = Image.fromarray(stored[..., 0].astype(np.uint16) * 257), "PNG"
  exif = Image.Exif()
  exif[0x0112] = orientation
  options = {"quality": 100, "subsampling": 0} if form == "JPEG" else {}
  data = encode(image, form, exif=exif, **options)
  displayed = read_image(data)[..., 0].astype(int)
  row, column = SIDES[orientation]
  side = {
    "top": displayed[0],
    "bottom": displayed[-1],
    "left": displayed[:, 0],
    "right": displayed[:, -1],
  }
  expected = (4, 6) if row in ("top", "bottom") else (6, 4)
  assert displayed.shape == expected
  assert sorted(side[row].round(-1)) == [100] * 5 + [150]
  assert sorted(side[column].round(-1)) == [50] * 3 + [150]


def test_exif_orientation_of_a_pil_image():
  exif = Image.Exif()
  exif[0x0112] = 6
  image = Image.open(io.BytesIO(encode(Image.fromarray(random_image(4, 6)), exif=exif)))
  assert read_image(image).shape == (6, 4, 3)
  assert image.size == (6, 4)  # width x height: the user's image is unchanged


@pytest.mark.parametrize("orientation", [0, 9, 65_535])
def test_invalid_orientations(orientation):
  exif = Image.Exif()
  exif[0x0112] = orientation
  image = random_image(4, 6)
  data = encode(Image.fromarray(image), exif=exif)
  np.testing.assert_array_equal(read_image(data), image)


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_invalid_exif(form):
  data = encode(Image.fromarray(random_image(4, 6)), form, exif=b"Exif\0\0garbage")
  assert read_image(data).shape == (4, 6, 3)
