"""Pixels: from a file or an array to what the model reads.

`read_image` gives every kind of picture the same form, `resize` is torchvision's uint8 resize bit
for bit, and `normalize` maps 0..255 to -1..1. Meta's model sees exactly these three steps
(`Sam3Processor`: `v2.Resize((1008, 1008))` on a uint8 tensor, `to_dtype(scale=True)`, `Normalize`).
"""

import io
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import ExifTags, Image, UnidentifiedImageError

ImageSource: TypeAlias = (
  str | os.PathLike | bytes | bytearray | memoryview | Image.Image | np.ndarray | jax.Array
)

MAX_PIXELS = 300_000_000

_UPRIGHT = {  # EXIF 2.32, tag 0x0112: what undoes each orientation
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}
_TURNED = (5, 6, 7, 8)  # what was high is wide

_BLOCK = 8  # results of one matrix product along the filtered axis, at most
_WINDOW = 128  # source pixels that a block of several results may span, about
_STRIP = 512  # source rows in work at a time, if a block needs no more
# OpenBLAS computes a product of at most this many multiplications on one thread. Above, its threads
# spin while they wait: on a busy machine that made a resize of 20 ms take up to 12 seconds.
_SINGLE_THREADED = 2**18


def read_image(source: ImageSource, *, max_pixels: int = MAX_PIXELS) -> UInt8[np.ndarray, "h w 3"]:
  """The picture as a viewer shows it: RGB, upright, opaque.

  EXIF orientation is applied, so boxes and masks are in the frame of the displayed picture. Grey,
  palette, CMYK and 1-bit pictures become RGB; 16-bit values are scaled to 8 (65535 becomes 255);
  of an animation, the first frame is read. Transparent pixels are laid over white; Meta's processor
  drops the alpha channel instead, which uncovers whatever colour lies below.

  Args:
    source: a path, a file's bytes, a PIL image, or an array, uint8 (0..255) or uint16, of shape
      [h, w], [h, w, 1], [h, w, 3] (RGB) or [h, w, 4] (RGBA).
    max_pixels: larger pictures are refused before they are decoded.

  Returns:
    The pixels; an RGB array is returned as it is, not copied.

  Raises:
    FileNotFoundError: no such file.
    ValueError: a folder; an empty, truncated or non-image file; too many pixels; an array of
      another shape.
    TypeError: an array of another dtype, or another kind of source.
  """
  if isinstance(source, np.ndarray | jax.Array):
    return _from_array(np.asarray(source), max_pixels)
  if isinstance(source, Image.Image):
    return _from_pillow(source, "the PIL image", max_pixels)
  if isinstance(source, bytes | bytearray | memoryview):
    return _from_file(io.BytesIO(source), "the bytes given as an image", max_pixels)
  if not isinstance(source, str | os.PathLike):
    raise TypeError(
      f"an image must be a path, bytes, a PIL image or a uint8 array, not {type(source).__name__}."
    )
  path = Path(source)
  if path.is_dir():
    raise ValueError(f"{path} is a folder, not an image: name the files in it, one by one.")
  try:
    with path.open("rb") as file:
      return _from_file(file, str(path), max_pixels)
  except FileNotFoundError:
    raise FileNotFoundError(f"there is no image {path}: check the path.") from None
  except OSError as error:
    raise ValueError(f"{path} cannot be read ({error.strerror}): check it.") from error


def normalize(pixels: UInt8[Array | np.ndarray, "*shape 3"]) -> Float[Array, "*shape 3"]:
  """Maps 0..255 to -1..1 in float32: (x / 255 - 0.5) / 0.5.

  Works inside jit. The numbers are torch's own, which multiplies by float32(1 / 255); inside jit
  a backend may fuse the product and the difference, which moves a value by at most 1.2e-7.
  """
  if pixels.dtype != np.uint8:
    raise TypeError(f"pixels must be uint8, not {pixels.dtype}: normalize takes them as read.")
  return (jnp.asarray(pixels).astype(jnp.float32) * np.float32(1 / 255) - 0.5) / 0.5


def resize(image: UInt8[np.ndarray, "h w 3"], size: int) -> UInt8[np.ndarray, "size size 3"]:
  """Resizes to a square, whatever the aspect ratio, exactly as torchvision does on a CPU.

  That is PyTorch's uint8 kernel (`UpSampleKernel.cpp`, antialias): a triangle filter along rows,
  rounded to uint8, then along columns, with integer weights. Here both passes are matrix products
  of floats, in which every product and sum is an integer small enough to be exact (`_Filter`).
  Beside `image` and the result it takes under 80 MB for an image of 20,000 x 15,000.

  Raises:
    ValueError: `image` is not uint8 [h, w, 3] with pixels in it, or `size` is below 1.
  """
  if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
    raise ValueError(
      f"resize takes uint8 [h, w, 3], not {image.dtype} {list(image.shape)}: see read_image."
    )
  if size < 1:
    raise ValueError(f"size is {size}, but a picture has at least 1 pixel a side.")
  height, width, _ = image.shape
  across, down = _filter(width, size), _filter(height, size)
  dtype = np.float64 if max(across.total, down.total) >= 2**24 else np.float32
  # One product makes a block of a row's pixels; the channels do not mix.
  across_weights = np.stack([np.kron(weights, np.eye(3)) for weights in across.weights])
  across_weights = across_weights.astype(dtype)
  down_weights = down.weights.transpose(0, 2, 1).astype(dtype)

  blocks, length, window = down_weights.shape
  result = np.empty((blocks, length, len(across_weights), across_weights.shape[2]), np.uint8)
  stride = max(1, _STRIP * size // (length * height))
  for first in range(0, blocks, stride):
    starts = down.starts[first : first + stride]
    strip = image[starts[0] : starts[-1] + window].reshape(-1, width * 3)
    middle = _filter_rows(strip, across.starts * 3, across_weights)
    for i, start in enumerate(starts - starts[0]):
      block = down_weights[first + i] @ middle[:, start : start + window]
      block += 0.5
      result[first + i] = np.minimum(block, 255, out=block).transpose(1, 0, 2)
  return np.ascontiguousarray(result.reshape(blocks * length, -1, 3)[:size, :size])


def _filter_rows(
  strip: UInt8[np.ndarray, "rows width3"],
  starts: np.ndarray,
  weights: Float[np.ndarray, "blocks window3 block3"],
) -> Float[np.ndarray, "blocks rows block3"]:
  """The horizontal pass, rounded to whole numbers. May add rows at the end; they hold nothing."""
  blocks, window, width = weights.shape
  batch = min(64, max(1, _SINGLE_THREADED // (window * width)))
  rows = -(-len(strip) // batch) * batch
  source = np.zeros((rows, window), weights.dtype)
  result = np.empty((blocks, rows, width), weights.dtype)
  for start, weight, target in zip(starts, weights, result, strict=True):
    source[: len(strip)] = strip[:, start : start + window]
    np.matmul(source.reshape(-1, batch, window), weight, out=target.reshape(-1, batch, width))
    target += 0.5
    np.floor(target, out=target)
    np.minimum(target, 255, out=target)
  return result


class _Filter(NamedTuple):
  """A filter along one axis, cut into blocks of results that read the same window of the source.

  Attributes:
    starts: where each block's window begins.
    weights: PyTorch's int16 weights, divided by 2**precision.
    total: bound of every sum of weight * 255, before that division; below 2**24 float32 holds each
      of them exactly, in any order, and below 2**53 float64 does.
  """

  starts: np.ndarray
  weights: Float[np.ndarray, "blocks window block"]
  total: int


def _filter(source: int, size: int) -> _Filter:
  scale = source / size
  support = max(1.0, scale)
  center = scale * (np.arange(size) + 0.5)
  first = np.maximum((center - support + 0.5).astype(np.int64), 0)
  last = np.minimum((center + support + 0.5).astype(np.int64), source)
  taps = np.arange((last - first).max())
  index = first[:, None] + taps
  weights = np.maximum(0, 1 - np.abs((index - center[:, None] + 0.5) / support))
  weights[index >= last[:, None]] = 0
  weights /= weights.sum(axis=1, keepdims=True)
  precision = 0  # the most bits, up to 22, with which the largest weight still is an int16
  while precision < 22 and int(0.5 + weights.max() * 2 ** (precision + 1)) < 2**15:
    precision += 1
  whole = np.floor(weights * 2**precision + 0.5)

  length = min(_BLOCK, max(1, _WINDOW * size // source))
  blocks = -(-size // length)
  begin, end = first[::length], last[np.minimum(np.arange(1, blocks + 1) * length, size) - 1]
  window = (end - begin).max()
  starts = np.minimum(begin, source - window)
  table = np.zeros((blocks, window + len(taps), length))  # + taps: those of weight 0 may stick out
  result = np.arange(size)
  block, column = np.divmod(result, length)
  rows = (first - starts[block])[:, None] + taps
  table[block[:, None], rows, column[:, None]] = whole / 2**precision
  total = int(255 * whole.sum(axis=1).max()) + 2**precision
  return _Filter(starts, table[:, :window], total)


def displayed_size(path: str | Path) -> tuple[int, int]:
  """Height and width of a picture as a viewer shows it, from its header; raises as Pillow does."""
  with Image.open(path) as image:
    turned = _orientation(image) in _TURNED
    return (image.width, image.height) if turned else (image.height, image.width)


def _from_array(array: np.ndarray, max_pixels: int) -> np.ndarray:
  shape, dtype = list(array.shape), array.dtype
  if array.ndim not in (2, 3) or (array.ndim == 3 and shape[2] not in (1, 3, 4)):
    hint = "give a list of images, or one of them"
    if array.ndim == 3:
      hint = "np.moveaxis(image, 0, -1) puts channels last" if shape[0] in (1, 3, 4) else "use RGB"
    raise ValueError(f"image arrays must be [h, w] or [h, w, 1, 3 or 4], not {shape}: {hint}.")
  _check_size("the image array", shape[0], shape[1], max_pixels)
  if dtype.newbyteorder("=") == np.uint16:
    array = _to_8_bits(array)
  elif dtype != np.uint8:
    raise TypeError(
      f"image arrays must be uint8, 0..255, not {dtype} {shape}: round and cast, "
      "np.rint(image).astype(np.uint8), after scaling to 0..255."
    )
  if array.ndim == 2 or shape[2] == 1:
    return np.repeat(array.reshape(shape[0], shape[1], 1), 3, axis=2)
  if shape[2] == 4:
    return _opaque(Image.fromarray(np.ascontiguousarray(array)))
  return np.ascontiguousarray(array)


def _from_file(file: BinaryIO, name: str, max_pixels: int) -> np.ndarray:
  if not file.read(1):
    raise ValueError(f"{name} is empty (0 bytes): get the file again.")
  file.seek(0)
  with _no_pixel_limit():
    with _decoding(name):
      image = Image.open(file)
    with image:
      return _from_pillow(image, name, max_pixels)


def _from_pillow(image: Image.Image, name: str, max_pixels: int) -> np.ndarray:
  _check_size(name, image.height, image.width, max_pixels)
  with _decoding(name):
    image.load()
  if (orientation := _orientation(image)) in _UPRIGHT:
    image = image.transpose(_UPRIGHT[orientation])
  if image.mode.startswith("I"):  # I;16 in either byte order, or I: 32 bits, as of a 16-bit TIFF
    values = np.asarray(image)
    if values.min() < 0 or values.max() >= 2**16:
      raise ValueError(
        f"{name} has values {values.min()} to {values.max()}: scale them to 8 or 16 bits first."
      )
    return np.repeat(_to_8_bits(values.astype(np.uint16))[..., None], 3, axis=2)
  if image.mode == "F":
    raise ValueError(f"{name} holds floating-point values: scale them to 0..255 and save as uint8.")
  pixels = np.empty((image.height, image.width, 3), np.uint8)
  opaque = not image.has_transparency_data
  try:  # in strips: Pillow's own copies of a large picture take four times its memory
    for top in range(0, image.height, _STRIP):
      strip = image.crop((0, top, image.width, min(top + _STRIP, image.height)))
      strip = np.asarray(strip.convert("RGB")) if opaque else _opaque(strip)
      pixels[top : top + _STRIP] = strip
  except ValueError as error:
    raise ValueError(f"{name} has pixels in mode {image.mode}: convert it to RGB first.") from error
  return pixels


def _orientation(image: Image.Image) -> int | None:
  try:
    return image.getexif().get(ExifTags.Base.Orientation)
  except SyntaxError:  # EXIF that is none: Pillow itself ignores that in a JPEG, but not in a PNG
    return None


@contextmanager
def _decoding(name: str) -> Iterator[None]:
  try:
    yield
  except MemoryError:
    raise
  except UnidentifiedImageError:
    raise ValueError(
      f"{name} is not an image, or only the beginning of one: give a JPEG, PNG, WebP, TIFF or "
      "another format that Pillow reads."
    ) from None
  except Exception as error:  # decoders raise all kinds of errors on a broken file
    reason = " ".join(str(error).split()).rstrip(".")
    raise ValueError(f"{name} is truncated or damaged ({reason}): get the file again.") from error


def _check_size(name: str, height: int, width: int, max_pixels: int) -> None:
  if height * width == 0:
    raise ValueError(f"{name} is {width} x {height}, but a picture has at least 1 pixel a side.")
  if height * width > max_pixels:
    raise ValueError(
      f"{name} is {width} x {height}: {height * width:,} pixels, more than {max_pixels:,}. "
      "Allow more with max_pixels= (--max-pixels on the command line), or make it smaller."
    )


def _opaque(image: Image.Image) -> np.ndarray:
  colors = image.convert("RGBA")
  canvas = Image.new("RGB", image.size, "white")
  canvas.paste(colors, mask=colors.getchannel("A"))
  return np.asarray(canvas)


def _to_8_bits(values: np.ndarray) -> np.ndarray:
  """round(values / 257), without leaving 16 bits."""
  scaled = values // 257
  scaled += values - scaled * 257 > 128
  return scaled.astype(np.uint8)


_limit_lock = threading.Lock()
_limit_lifted: list[int | None] = []  # Pillow's own limit, once for each thread inside


@contextmanager
def _no_pixel_limit() -> Iterator[None]:
  """Lifts Pillow's limit, which is a global, while any thread is in here: `max_pixels` rules."""
  with _limit_lock:
    _limit_lifted.append(_limit_lifted[0] if _limit_lifted else Image.MAX_IMAGE_PIXELS)
    Image.MAX_IMAGE_PIXELS = None
  try:
    yield
  finally:
    with _limit_lock:
      limit = _limit_lifted.pop()
      if not _limit_lifted:
        Image.MAX_IMAGE_PIXELS = limit
