"""Pixels: from a file or an array to what the model reads.

`read_image` gives every kind of image the same form, `resize` is torchvision's uint8 resize bit
for bit, and `normalize` maps 0..255 to -1..1. Meta's model sees exactly these three steps
(`Sam3Processor`: `v2.Resize((1008, 1008))` on a uint8 tensor, `to_dtype(scale=True)`, `Normalize`).
"""

import os
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image

from sam3_jax.inputs.image_file import (
  MAX_PIXELS,
  FileSource,
  ImageHeader,
  InvalidImageError,
  check_size,
  displayed_size,
  name_of,
  open_image,
)

__all__ = ["MAX_PIXELS", "ImageSource", "displayed_size", "normalize", "read_image", "resize"]

ImageSource: TypeAlias = FileSource | np.ndarray | jax.Array

_UPRIGHT = {  # EXIF 2.32, tag 0x0112: what undoes each orientation
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}

_BLOCK = 8  # results of one matrix product along the filtered axis, at most
_WINDOW = 128  # source pixels that a block of several results may span, about
_STRIP = 512  # source rows in work at a time, if a block needs no more
# OpenBLAS computes a product of at most this many multiplications on one thread. Above, its threads
# spin while they wait: on a busy machine that made a resize of 20 ms take up to 12 seconds.
_SINGLE_THREADED = 2**18


def read_image(source: ImageSource, *, max_pixels: int = MAX_PIXELS) -> UInt8[np.ndarray, "h w 3"]:
  """The image as a viewer shows it: RGB, upright, opaque.

  EXIF orientation is applied, so boxes and masks are in the frame of the displayed image. Grey,
  palette, CMYK and 1-bit images become RGB; 16-bit values are scaled to 8 (65535 becomes 255);
  of an animation, the first frame is read. Transparent pixels are laid over white; Meta's processor
  drops the alpha channel instead, which uncovers whatever colour lies below.

  Values that use little of their range are refused (see `check_range`), never guessed.

  Args:
    source: a path, a file's bytes, a PIL image, or an array, uint8 (0..255) or uint16, of shape
      [h, w], [h, w, 1], [h, w, 3] (RGB) or [h, w, 4] (RGBA).
    max_pixels: larger images are refused before they are decoded.

  Returns:
    The pixels; an RGB array is returned as it is, not copied.

  Raises:
    FileNotFoundError: no such file.
    ValueError: a folder; an empty, truncated or non-image file, or one of a format that is not
      read (see `image_file.FORMATS`); too many pixels; values of another range; an array of another
      shape.
    TypeError: an array of another dtype, or another kind of source.
  """
  if isinstance(source, np.ndarray | jax.Array):
    return _from_array(np.asarray(source), max_pixels)
  if not isinstance(source, str | os.PathLike | bytes | bytearray | memoryview | Image.Image):
    raise TypeError(
      f"an image must be a path, bytes, a PIL image or a uint8 array, not {type(source).__name__}."
    )
  with open_image(source, max_pixels=max_pixels) as header:
    return _from_pillow(header, name_of(source))


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
    raise ValueError(f"size is {size}, but an image has at least 1 pixel a side.")
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


def _from_array(array: np.ndarray, max_pixels: int) -> np.ndarray:
  shape, dtype = list(array.shape), array.dtype
  if array.ndim not in (2, 3) or (array.ndim == 3 and shape[2] not in (1, 3, 4)):
    hint = "give a list of images, or one of them"
    if array.ndim == 3:
      hint = "np.moveaxis(image, 0, -1) puts channels last" if shape[0] in (1, 3, 4) else "use RGB"
    raise ValueError(f"image arrays must be [h, w] or [h, w, 1, 3 or 4], not {shape}: {hint}.")
  check_size("the image array", shape[0], shape[1], max_pixels)
  if dtype != np.uint8 and dtype.newbyteorder("=") != np.uint16:
    raise TypeError(_other_type(array))
  colors, alpha = (array[..., :3], array[..., 3:]) if shape[2:] == [4] else (array, array[..., :0])
  for part, name in ((colors, "the image array"), (alpha, "the alpha channel of the image array")):
    check_range(part, name)
  if dtype != np.uint8:
    array = _to_8_bits(array)
  if array.ndim == 2 or shape[2] == 1:
    return np.repeat(array.reshape(shape[0], shape[1], 1), 3, axis=2)
  if shape[2] == 4:
    return _opaque(Image.fromarray(np.ascontiguousarray(array)))
  return np.ascontiguousarray(array)


def _other_type(array: np.ndarray) -> str:
  """What is wrong with an array that is not of unsigned integers of 8 or 16 bits."""
  said = f"image arrays must be uint8, 0..255, not {array.dtype} {list(array.shape)}"
  remedy, cast = "after scaling to 0..255", "np.rint(image).astype(np.uint8)"
  if array.dtype == bool:
    return f"{said}: image.astype(np.uint8) * 255."
  if array.dtype.kind not in "iuf" and "float" not in array.dtype.name:
    return f"{said}."
  low, high = float(array.min()), float(array.max())
  if low >= 0 and 0 < high <= 1:
    remedy, cast = "if 1 is white", "np.rint(image * 255).astype(np.uint8)"
  elif low >= 0 and 1 < high <= 255:
    remedy = "if 255 is white"
  return f"{said} with values {low:g} to {high:g}: round and cast, {cast}, {remedy}."


def check_range(values: np.ndarray, name: str) -> None:
  """Raises ValueError of values that use so little of their type's range that they are of another.

  Those are 0 and 1 in uint8 (a mask, or fractions that were cast), and less than a quarter of
  uint16 (8, 10, 12 or 14 bits): as they stand, the model would see a black image. An image of one
  value everywhere is one.
  """
  few = 1 if values.dtype == np.uint8 else 2**14 - 1
  # A look at some of the values settles it, but for dark images.
  if not values.size or values[:: max(1, len(values) // 16)].max() > few:
    return
  low, high = int(values.min()), int(values.max())
  if high > few or low == high:  # of one colour: nothing is seen in it at any scale
    return
  if values.dtype == np.uint8:
    remedy = "for a mask or for fractions, scale them before: * 255, rounded, as uint8"
    raise InvalidImageError(f"{name} has values {low} to {high} only, of 0..255: {remedy}.")
  bits = max(8, high.bit_length() + high.bit_length() % 2)
  raise InvalidImageError(
    f"{name} has values {low} to {high} only, of 0..65535: if they are of {bits} bits, scale them, "
    f"np.rint(image / {2**bits - 1} * 255).astype(np.uint8); if it is a dark image, brighten it."
  )


def _from_pillow(header: ImageHeader, name: str) -> np.ndarray:
  image = header.image
  if header.orientation in _UPRIGHT:
    image = image.transpose(_UPRIGHT[header.orientation])
  if image.mode.startswith("I"):  # I;16 in either byte order, or I: 32 bits, as of a 16-bit TIFF
    values = np.asarray(image)
    if values.min() < 0 or values.max() >= 2**16:
      raise InvalidImageError(
        f"{name} has values {values.min()} to {values.max()}: scale them to 8 or 16 bits first."
      )
    values = values.astype(np.uint16)
    check_range(values, name)
    return np.repeat(_to_8_bits(values)[..., None], 3, axis=2)
  if image.mode == "F":
    low, high = image.getextrema()
    raise InvalidImageError(
      f"{name} holds floating-point values: scale them to 0..255 (they are {low:g} to {high:g}) "
      "and save as uint8."
    )
  pixels = np.empty((image.height, image.width, 3), np.uint8)
  opaque = not image.has_transparency_data
  try:  # in strips: Pillow's own copies of a large image take four times its memory
    for top in range(0, image.height, _STRIP):
      strip = image.crop((0, top, image.width, min(top + _STRIP, image.height)))
      strip = np.asarray(strip.convert("RGB")) if opaque else _opaque(strip)
      pixels[top : top + _STRIP] = strip
  except ValueError as error:
    raise InvalidImageError(
      f"{name} has pixels in mode {image.mode}: convert it to RGB first."
    ) from error
  if not opaque and "A" in image.getbands() and image.getchannel("A").getextrema()[1] == 1:
    raise InvalidImageError(
      f"{name} has an alpha channel of values 0 to 1 only, of 0..255: scale it, or drop it."
    )
  check_range(pixels, name)
  # Less than a quarter of 16 bits.
  if header.wide and pixels.min() < (high := int(pixels.max())) < 2**6:
    raise InvalidImageError(
      f"{name} has values up to about {high * 256:,} only, of 0..65535: if they are of fewer bits, "
      "scale them to 8 bits and save it again; if it is a dark image, brighten it."
    )
  return pixels


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
