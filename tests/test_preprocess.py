"""Reading images of all source types, the limit of pixels, and normalizing."""

import io
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from image_files import encode, png, random_image
from PIL import Image

from sam3_jax.inputs.preprocess import normalize, read_image

GOLDEN = Path(__file__).parent / "goldens" / "common.npz"


def test_normalize_equals_torch():
  golden = np.unique(np.load(GOLDEN)["pixel_values"])
  pixels = np.rint((golden * 0.5 + 0.5) * 255).astype(np.uint8)
  np.testing.assert_array_equal(normalize(pixels), golden)
  assert len(golden) == 244


def test_normalize_inside_jit():
  pixels = np.arange(256, dtype=np.uint8).reshape(8, 32)
  expected = np.arange(256).reshape(8, 32) / 127.5 - 1
  eager, jitted = normalize(pixels), jax.jit(normalize)(jnp.asarray(pixels))
  assert eager.dtype == jitted.dtype == jnp.float32
  np.testing.assert_allclose(eager, expected, rtol=0, atol=1e-6)  # measured 1.5e-7
  np.testing.assert_allclose(jitted, eager, rtol=0, atol=1e-6)  # measured 1.2e-7: fused


def test_normalize_rejects_floats():
  with pytest.raises(TypeError, match="uint8, not float32"):
    normalize(np.zeros((2, 2, 3), np.float32))


def test_all_source_types_give_the_same_pixels(tmp_path):
  image = random_image(5, 7)
  data = encode(Image.fromarray(image))
  path = tmp_path / "a.png"
  path.write_bytes(data)
  sources = [str(path), path, data, bytearray(data), memoryview(data)]
  sources += [Image.fromarray(image), Image.open(path), image, jnp.asarray(image)]
  for source in sources:
    pixels = read_image(source)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, image)


def test_rgb_arrays_are_not_copied():
  image = random_image(5, 7)
  assert read_image(image) is image


@pytest.mark.parametrize("form", ["PNG", "TIFF", "BMP", "PPM", "GIF"])
def test_single_pixel(form):
  image = np.full((1, 1, 3), 200, np.uint8)
  np.testing.assert_array_equal(read_image(encode(Image.fromarray(image), form)), image)


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 1)])
def test_grey_arrays(shape):
  gray = np.arange(24, dtype=np.uint8).reshape(shape)
  np.testing.assert_array_equal(read_image(gray), np.stack([gray.reshape(6, 4)] * 3, axis=-1))


def test_16_bit_arrays_are_scaled():
  values = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
  expected = np.rint(values / 257).astype(np.uint8)  # no value is halfway
  np.testing.assert_array_equal(read_image(values)[..., 0], expected)
  np.testing.assert_array_equal(read_image(np.stack([values] * 3, -1))[..., 1], expected)
  np.testing.assert_array_equal(read_image(values.astype(">u2"))[..., 2], expected)


@pytest.mark.parametrize(
  ("shape", "hint"),
  [
    ((3, 8, 8), "channels last"),
    ((8, 8, 2), "use RGB"),
    ((2, 8, 8, 3), "list of images"),
    ((8,), "list of images"),
    ((), "list of images"),
  ],
)
def test_arrays_of_invalid_shape(shape, hint):
  with pytest.raises(ValueError, match=rf"not \[{', '.join(map(str, shape))}\]: .*{hint}"):
    read_image(np.zeros(shape, np.uint8))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64])
def test_arrays_of_invalid_dtype(dtype):
  with pytest.raises(TypeError, match=f"uint8, 0..255, not {np.dtype(dtype)}.*round and cast"):
    read_image(np.zeros((4, 4, 3), dtype))


@pytest.mark.parametrize("shape", [(0, 4, 3), (4, 0), (0, 0, 3)])
def test_empty_arrays(shape):
  with pytest.raises(ValueError, match="at least 1 pixel"):
    read_image(np.zeros(shape, np.uint8))


@pytest.mark.parametrize("source", [None, 3, [1, 2]])
def test_unsupported_source_types(source):
  with pytest.raises(TypeError, match=f"not {type(source).__name__}"):
    read_image(source)


def noisy_file(form: str) -> bytes:
  return encode(Image.fromarray(random_image(60, 50)), form)


@pytest.mark.parametrize(
  ("content", "reason"),
  [
    (b"", "is empty"),
    (b"hello, this is a text file\n", "is not an image"),
    (b"\x89PNG\r\n\x1a\n", "is not an image|is truncated or damaged"),
    (noisy_file("PNG")[:3000], "is truncated or damaged"),
    (noisy_file("PNG")[:20], "is truncated or damaged"),
    (noisy_file("JPEG")[:1500], "is truncated or damaged"),
    (noisy_file("BMP")[:3000], "is truncated or damaged"),
    (noisy_file("GIF")[:3000], "is truncated or damaged"),
    (noisy_file("WEBP")[:1000], "is not an image|is truncated or damaged"),
    (png((100, 100), b""), "is truncated or damaged"),
  ],
)
def test_damaged_files(tmp_path, content, reason):
  path = tmp_path / "some image.img"
  path.write_bytes(content)
  with pytest.raises(ValueError, match=f"some image.img ({reason}).*: g") as error:
    read_image(path)
  assert "\n" not in str(error.value)
  with pytest.raises(ValueError, match=f"^the bytes given as an image ({reason})"):
    read_image(content)


def test_truncated_pil_image():
  image = Image.open(io.BytesIO(noisy_file("PNG")[:3000]))
  with pytest.raises(ValueError, match=r"^the PIL image is truncated or damaged"):
    read_image(image)


def test_missing_file(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"no image .*missing\.png: check the path"):
    read_image(tmp_path / "missing.png")


def test_directory(tmp_path):
  with pytest.raises(ValueError, match="is a directory, not an image"):
    read_image(str(tmp_path))


def test_path_through_a_file(tmp_path):
  (tmp_path / "file").write_bytes(b"x")
  with pytest.raises(ValueError, match=r"a\.png cannot be read \(Not a directory\)"):
    read_image(tmp_path / "file" / "a.png")


def test_empty_pil_image():
  with pytest.raises(ValueError, match="is 0 x 5"):
    read_image(Image.new("RGB", (0, 5)))


def test_too_large_images_are_rejected_before_decoding():
  tracemalloc.start()
  with pytest.raises(ValueError, match=r"30000 x 20000: 600,000,000 .* 300,000,000.*max_pixels="):
    read_image(png((30_000, 20_000), b""))
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 10e6
  with pytest.raises(ValueError, match="--max-pixels on the command line"):
    read_image(png((30_000, 20_000), b""))


def test_max_pixels_is_inclusive():
  image = random_image(4, 5)
  for source in (image, Image.fromarray(image), encode(Image.fromarray(image))):
    assert read_image(source, max_pixels=20).shape == (4, 5, 3)
    with pytest.raises(ValueError, match="20 pixels, more than 19"):
      read_image(source, max_pixels=19)


@pytest.mark.parametrize("limit", [1, 12])  # Pillow would raise, Pillow would warn
def test_pillows_limit_is_ignored_and_restored(monkeypatch, limit):
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
  sources = [noisy_file("PNG"), encode(Image.fromarray(random_image(4, 5))), b"not an image"] * 8

  def read(source):
    try:
      return read_image(source).shape
    except ValueError:
      return None

  with ThreadPoolExecutor(4) as pool:
    shapes = list(pool.map(read, sources))
  assert shapes == [(60, 50, 3), (4, 5, 3), None] * 8
  assert limit == Image.MAX_IMAGE_PIXELS
