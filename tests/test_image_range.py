"""Pixel values in another range than their type's, which are refused with a conversion."""

import jax.numpy as jnp
import numpy as np
import pytest
from image_files import encode, png
from PIL import Image

from sam3_jax.inputs.preprocess import read_image

UNITS = np.random.default_rng(1).integers(0, 2, (9, 12)).astype(np.uint8)


@pytest.mark.parametrize("bits", [8, 10, 12, 14])
def test_16_bit_values_with_fewer_bits(bits):
  values = np.random.default_rng(1).integers(0, 2**bits, (9, 12)).astype(np.uint16)
  values[0, 0] = 2**bits - 1
  sources = [values, np.stack([values] * 3, -1), jnp.asarray(values), Image.fromarray(values)]
  sources += [encode(Image.fromarray(values), form) for form in ("PNG", "TIFF", "JPEG2000")]
  sources += [encode(Image.fromarray(values.astype(np.int32)), "TIFF")]
  for source in sources:
    with pytest.raises(
      ValueError, match=rf"values \d+ to {2**bits - 1} only.*{bits} bits.*/ {2**bits - 1} \* 255"
    ):
      read_image(source)
  assert read_image(values << (16 - bits)).max() > 240


def test_16_bit_colors_with_fewer_bits():
  """Pillow reduces them to 8 bits while loading."""
  values = np.random.default_rng(1).integers(0, 2**12, (4, 5, 3)).astype(">u2")
  for shift, fine in ((0, False), (4, True)):
    rows = b"".join(b"\0" + (row << shift).astype(">u2").tobytes() for row in values)
    data = png((5, 4), rows, depth=16)
    if fine:
      assert read_image(data).max() > 200
    else:
      with pytest.raises(ValueError, match=r"values up to about [\d,]+ only, of 0..65535"):
        read_image(data)


def test_values_of_only_0_and_1():
  sources = [UNITS, np.stack([UNITS] * 3, -1), jnp.asarray(UNITS), Image.fromarray(UNITS)]
  sources += [encode(Image.fromarray(UNITS))]
  for source in sources:
    with pytest.raises(ValueError, match=r"values 0 to 1 only, of 0..255: .* \* 255"):
      read_image(source)
  assert read_image(UNITS * 255).max() == 255
  assert read_image(Image.fromarray(UNITS).convert("1", dither=Image.Dither.NONE)).shape == (
    9,
    12,
    3,
  )
  clear = np.dstack([UNITS * 255] * 3 + [UNITS])
  for source in (clear, Image.fromarray(clear), encode(Image.fromarray(clear))):
    with pytest.raises(ValueError, match=r"alpha channel .*values 0 to 1 only"):
      read_image(source)


@pytest.mark.parametrize("value", [0, 1, 2, 200])
def test_dark_and_single_color_images(value):
  for dtype in (np.uint8, np.uint16):
    assert read_image(np.full((4, 5), value, dtype)).shape == (4, 5, 3)
  dark = np.full((300, 5), value, np.uint8)
  dark[7] = value + 2
  np.testing.assert_array_equal(read_image(dark)[..., 0], dark)


@pytest.mark.parametrize(
  ("array", "remedy"),
  [
    (np.linspace(0, 1, 12).reshape(3, 4), r"values 0 to 1: .*np.rint\(image \* 255\)"),
    (np.linspace(0, 200, 12, dtype=np.float32).reshape(3, 4), "values 0 to 200: .*255 is white"),
    (np.arange(12).reshape(3, 4) - 5, "values -5 to 6: .*after scaling"),
    (np.zeros((3, 4), bool), r"not bool .*image.astype\(np.uint8\) \* 255"),
    (np.full((3, 4), np.nan), "values nan to nan"),
    (np.zeros((3, 4), "U3"), "not <U3"),
    (np.zeros((3, 4), object), "not object"),
    (np.zeros((3, 4), complex), "not complex128"),
  ],
)
def test_dtype_errors_name_a_conversion(array, remedy):
  with pytest.raises(TypeError, match=remedy) as error:
    read_image(array)
  assert len(str(error.value)) < 300
