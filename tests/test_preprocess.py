"""Reading, resizing and normalizing images, against torchvision, Pillow and the EXIF standard."""

import hashlib
import io
import json
import math
import struct
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from sam3_jax.inputs.preprocess import normalize, read_image, resize

GOLDENS = Path(__file__).parent / "goldens"
RESIZED = json.loads((GOLDENS / "resize.json").read_text())
SEEDED = [case for case in RESIZED if case["source"].startswith("numpy")]
PHOTOS = [case for case in RESIZED if case["source"].startswith("skimage")]


def random_image(height: int, width: int, seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def sha256(array: np.ndarray) -> str:
  return hashlib.sha256(np.ascontiguousarray(array)).hexdigest()


def encode(image: Image.Image, form: str = "PNG", **options) -> bytes:
  file = io.BytesIO()
  image.save(file, form, **options)
  return file.getvalue()


# Resize.


def reference_resize(image: np.ndarray, size: int, precision: int | None = None) -> np.ndarray:
  """PyTorch's uint8 resize, one weight and pixel at a time, in Python's integers."""

  def shrink(rows: list) -> list:  # along the first axis of a list of rows of integers
    source, result = len(rows), []
    scale = source / size
    support = max(scale, 1.0)
    windows = []
    for i in range(size):
      center = scale * (i + 0.5)
      window = range(max(int(center - support + 0.5), 0), min(int(center + support + 0.5), source))
      weights = [max(0.0, 1 - abs((j - center + 0.5) / support)) for j in window]
      windows.append((window, [weight / math.fsum(weights) for weight in weights]))
    largest = max(max(weights) for _, weights in windows)
    bits = precision
    if bits is None:
      bits = max(p for p in range(23) if p == 0 or int(largest * 2**p + 0.5) < 2**15)
    for window, weights in windows:
      whole = [int(weight * 2**bits + 0.5) for weight in weights]
      columns = zip(*(rows[j] for j in window), strict=True)
      sums = (sum(w * v for w, v in zip(whole, column, strict=True)) for column in columns)
      result.append([min(max((s + 2 ** (bits - 1)) >> bits, 0), 255) for s in sums])
    return result

  height, width, _ = image.shape
  across = shrink(image.transpose(1, 0, 2).reshape(width, -1).tolist())
  middle = np.array(across).reshape(size, height, 3).transpose(1, 0, 2)
  down = shrink(middle.reshape(height, -1).tolist())
  return np.array(down, np.uint8).reshape(size, size, 3)


@pytest.mark.parametrize("case", SEEDED, ids=lambda case: f"{case['shape'][:2]}-{case['size']}")
def test_resize_is_bit_equal_to_torchvision(case):
  height, width, _ = case["shape"]
  image = random_image(height, width, seed=height * 10000 + width)
  assert sha256(image) == case["source_sha256"]
  assert sha256(resize(image, case["size"])) == case["sha256"]


@pytest.mark.parametrize("case", PHOTOS, ids=lambda case: f"{case['source'][:25]}-{case['size']}")
def test_resize_of_photographs(case):
  data = pytest.importorskip("skimage.data")
  image = getattr(data, case["source"].split("(")[0].split(".")[-1])()
  assert sha256(image) == case["source_sha256"], "scikit-image ships another photograph"
  assert sha256(resize(image, case["size"])) == case["sha256"]


@pytest.mark.parametrize("size", [1, 7, 8, 9, 30])
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (50, 1), (2, 3), (8, 8), (31, 29), (40, 200)])
def test_resize_equals_the_reference(shape, size):
  image = random_image(*shape)
  np.testing.assert_array_equal(resize(image, size), reference_resize(image, size))


@pytest.mark.parametrize("shape", [(1, 1), (31, 29), (40, 90)])
def test_reference_with_22_bits_equals_pillow(shape):
  image = random_image(*shape)
  pillow = Image.fromarray(image).resize((17, 17), Image.Resampling.BILINEAR)
  np.testing.assert_array_equal(reference_resize(image, 17, precision=22), np.asarray(pillow))


def test_resize_to_the_same_size_is_the_identity():
  image = random_image(33, 33)
  np.testing.assert_array_equal(resize(image, 33), image)


@pytest.mark.parametrize("value", [0, 1, 254, 255])
@pytest.mark.parametrize("shape", [(3, 500), (700, 2), (64, 64)])
def test_resize_preserves_constant_images(shape, value):
  image = np.full((*shape, 3), value, np.uint8)
  assert (resize(image, 21) == value).all()


def test_resize_accepts_views():
  image = random_image(60, 40)
  for view in (image.transpose(1, 0, 2), image[::-2, 3:], image[..., ::-1]):
    np.testing.assert_array_equal(resize(view, 24), resize(view.copy(), 24))


def test_resize_is_equivariant_to_channel_order():
  image = random_image(60, 40)
  np.testing.assert_array_equal(resize(image, 24)[..., ::-1], resize(image[..., ::-1], 24))


@pytest.mark.slow
def test_resize_memory_for_300_megapixels():
  row = random_image(1, 20_000)
  image = np.broadcast_to(row, (15_000, 20_000, 3))
  tracemalloc.start()
  resized = resize(image, 168)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 100e6  # measured 12 MB, and 44 MB for a size of 1008
  assert (resized == resized[0]).all()


@pytest.mark.parametrize(
  "image",
  [
    np.zeros((4, 4), np.uint8),
    np.zeros((4, 4, 4), np.uint8),
    np.zeros((0, 4, 3), np.uint8),
    np.zeros((4, 4, 3), np.float32),
  ],
  ids=lambda image: f"{image.dtype}{image.shape}",
)
def test_resize_rejects_invalid_images(image):
  with pytest.raises(ValueError, match=r"resize takes uint8 \[h, w, 3\], not"):
    resize(image, 8)


def test_resize_rejects_size_0():
  with pytest.raises(ValueError, match="size is 0"):
    resize(random_image(4, 4), 0)


# Normalize.


def test_normalize_equals_torch():
  golden = np.unique(np.load(GOLDENS / "common.npz")["pixel_values"])
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


# Sources.


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
  grey = np.arange(24, dtype=np.uint8).reshape(shape)
  np.testing.assert_array_equal(read_image(grey), np.stack([grey.reshape(6, 4)] * 3, axis=-1))


def test_16_bit_arrays_are_scaled():
  values = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
  expected = np.rint(values / 257).astype(np.uint8)  # no value is halfway
  np.testing.assert_array_equal(read_image(values)[..., 0], expected)
  np.testing.assert_array_equal(read_image(np.stack([values] * 3, -1))[..., 1], expected)
  np.testing.assert_array_equal(read_image(values.astype(">u2"))[..., 2], expected)


def test_alpha_is_composited_over_white():
  alpha, color = np.meshgrid(np.arange(256), np.arange(256))
  image = np.stack([color, 255 - color, color // 2, alpha], -1).astype(np.uint8)
  exact = 255 + (image[..., :3] - 255.0) * alpha[..., None] / 255
  np.testing.assert_array_equal(read_image(image), np.floor(exact + 0.5))
  np.testing.assert_array_equal(read_image(Image.fromarray(image)), read_image(image))
  np.testing.assert_array_equal(read_image(image.astype(np.uint16) * 257), read_image(image))


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


# Modes of images.

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


# Files that are wrong.


def png_header(width: int, height: int) -> bytes:
  """A PNG with only a header."""

  def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

  header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
  return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


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
    (png_header(100, 100), "is truncated or damaged"),
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


# The limit of pixels.


def test_too_large_images_are_rejected_before_decoding():
  tracemalloc.start()
  with pytest.raises(ValueError, match=r"30000 x 20000: 600,000,000 .* 300,000,000.*max_pixels="):
    read_image(png_header(30_000, 20_000))
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 10e6
  with pytest.raises(ValueError, match="--max-pixels on the command line"):
    read_image(png_header(30_000, 20_000))


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


# Values that use little of their range.

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
    data = bytearray(png_header(5, 4)[:8])
    for kind, content in (
      (b"IHDR", struct.pack(">IIBBBBB", 5, 4, 16, 2, 0, 0, 0)),
      (b"IDAT", zlib.compress(rows)),
      (b"IEND", b""),
    ):
      data += struct.pack(">I", len(content)) + kind + content
      data += struct.pack(">I", zlib.crc32(kind + content))
    if fine:
      assert read_image(bytes(data)).max() > 200
    else:
      with pytest.raises(ValueError, match=r"values up to about [\d,]+ only, of 0..65535"):
        read_image(bytes(data))


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
