"""Reads images of any kind as RGB pixels, and normalizes them.

Meta's preprocessing has three steps (`Sam3Processor`: `v2.Resize((1008, 1008))` on a uint8 tensor,
`to_dtype(scale=True)`, `Normalize`). `resize` does the first, `normalize` the other two.
"""

import os
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image

from sam3_jax.inputs.image_file import (
  FileSource,
  ImageHeader,
  displayed_size,
  name_of,
  no_pixel_limit,
  open_image,
)
from sam3_jax.inputs.image_limits import MAX_PIXELS, InvalidImageError, check_size
from sam3_jax.inputs.resize import resize

__all__ = ["MAX_PIXELS", "ImageSource", "displayed_size", "normalize", "read_image", "resize"]

ImageSource: TypeAlias = FileSource | np.ndarray | jax.Array

_UPRIGHT = {  # EXIF 2.32, tag 0x0112: the transposition that undoes each orientation
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}

_STRIP = 512  # rows converted to RGB at a time


def read_image(
  source: ImageSource, *, max_pixels: int = MAX_PIXELS, dark: bool = False
) -> UInt8[np.ndarray, "h w 3"]:
  """Reads an image as it is displayed: RGB, upright, opaque.

  EXIF orientation is applied, so boxes and masks refer to the displayed image. Gray, palette, CMYK
  and 1-bit images become RGB; 16-bit values are scaled to 8 bits (65535 becomes 255); of an
  animation, the first frame is read. Transparent pixels are composited over white. (Meta's
  processor drops the alpha channel, which shows the hidden colors.)

  Images whose values use little of their range are refused (see `check_range`), not rescaled.

  Args:
    source: a path, the bytes of a file, a PIL image, or an array of uint8 (0..255) or uint16 of
      shape [h, w], [h, w, 1], [h, w, 3] (RGB) or [h, w, 4] (RGBA).
    max_pixels: larger images are refused before they are decoded.
    dark: accept 8-bit images with values of 0 and 1 only, such as frames of a fade to black.

  Returns:
    The pixels; an RGB array is returned without a copy.

  Raises:
    FileNotFoundError: no such file.
    ValueError: a directory; an empty, truncated or damaged file, or one in an unsupported format
      (see `image_file.FORMATS`); too many pixels; values of another range; an array of another
      shape.
    TypeError: an array of another dtype, or another type of source.
  """
  if isinstance(source, np.ndarray | jax.Array):
    return _from_array(np.asarray(source), max_pixels, dark)
  if not isinstance(source, str | os.PathLike | bytes | bytearray | memoryview | Image.Image):
    raise TypeError(
      f"an image must be a path, bytes, a PIL image or a uint8 array, not {type(source).__name__}."
    )
  with open_image(source, max_pixels=max_pixels) as header:
    return _from_pillow(header, name_of(source), dark)


def normalize(pixels: UInt8[Array | np.ndarray, "*shape 3"]) -> Float[Array, "*shape 3"]:
  """Maps 0..255 to -1..1 in float32: (x / 255 - 0.5) / 0.5.

  Works inside jit. Equal to torch, which multiplies by float32(1 / 255); inside jit, a backend may
  fuse the product and the difference, which changes a value by at most 1.2e-7.
  """
  if pixels.dtype != np.uint8:
    raise TypeError(f"pixels must be uint8, not {pixels.dtype}: normalize takes them as read.")
  return (jnp.asarray(pixels).astype(jnp.float32) * np.float32(1 / 255) - 0.5) / 0.5


def _from_array(array: np.ndarray, max_pixels: int, dark: bool) -> np.ndarray:
  shape, dtype = list(array.shape), array.dtype
  if array.ndim not in (2, 3) or (array.ndim == 3 and shape[2] not in (1, 3, 4)):
    hint = "give a list of images, or a single image"
    if array.ndim == 3:
      hint = "np.moveaxis(image, 0, -1) puts channels last" if shape[0] in (1, 3, 4) else "use RGB"
    raise ValueError(f"image arrays must be [h, w] or [h, w, 1, 3 or 4], not {shape}: {hint}.")
  check_size("the image array", shape[0], shape[1], max_pixels)
  if dtype != np.uint8 and dtype.newbyteorder("=") != np.uint16:
    raise TypeError(_dtype_error(array))
  colors, alpha = (array[..., :3], array[..., 3:]) if shape[2:] == [4] else (array, array[..., :0])
  if not (dark and dtype == np.uint8):
    check_range(colors, "the image array")
  check_range(alpha, "the alpha channel of the image array")
  if dtype != np.uint8:
    array = _to_8_bits(array)
  if array.ndim == 2 or shape[2] == 1:
    return np.repeat(array.reshape(shape[0], shape[1], 1), 3, axis=2)
  if shape[2] == 4:
    return _opaque(Image.fromarray(np.ascontiguousarray(array)))
  return np.ascontiguousarray(array)


def _dtype_error(array: np.ndarray) -> str:
  """The message for an array that is neither uint8 nor uint16."""
  expected = f"image arrays must be uint8, 0..255, not {array.dtype} {list(array.shape)}"
  remedy, cast = "after scaling to 0..255", "np.rint(image).astype(np.uint8)"
  if array.dtype == bool:
    return f"{expected}: image.astype(np.uint8) * 255."
  if array.dtype.kind not in "iuf" and "float" not in array.dtype.name:
    return f"{expected}."
  low, high = float(array.min()), float(array.max())
  if low >= 0 and 0 < high <= 1:
    remedy, cast = "if 1 is white", "np.rint(image * 255).astype(np.uint8)"
  elif low >= 0 and 1 < high <= 255:
    remedy = "if 255 is white"
  return f"{expected} with values {low:g} to {high:g}: round and cast, {cast}, {remedy}."


def check_range(values: np.ndarray, name: str) -> None:
  """Raises InvalidImageError if values use so little of their range that the scale must be wrong.

  This concerns uint8 values of only 0 and 1 (a mask, or fractions that were cast), and uint16
  values below a quarter of the range (8, 10, 12 or 14 bits). The model would see a black image.
  Images of a single value are accepted.
  """
  few = 1 if values.dtype == np.uint8 else 2**14 - 1
  # A sample of the values is enough, except for dark images.
  if not values.size or values[:: max(1, len(values) // 16)].max() > few:
    return
  low, high = int(values.min()), int(values.max())
  if high > few or low == high:  # an image of one color shows nothing at any scale
    return
  if values.dtype == np.uint8:
    remedy = "scale a mask or fractions first: * 255, rounded, as uint8"
    raise InvalidImageError(f"{name} has values {low} to {high} only, of 0..255: {remedy}.")
  bits = max(8, high.bit_length() + high.bit_length() % 2)
  raise InvalidImageError(
    f"{name} has values {low} to {high} only, of 0..65535: if they have {bits} bits, scale them, "
    f"np.rint(image / {2**bits - 1} * 255).astype(np.uint8); if it is a dark image, brighten it."
  )


def _from_pillow(header: ImageHeader, name: str, dark: bool) -> np.ndarray:
  image = header.image
  if header.orientation in _UPRIGHT:
    image = image.transpose(_UPRIGHT[header.orientation])
  if image.mode.startswith("I"):  # I;16 in either byte order, or I (32 bits), as from a 16-bit TIFF
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
  try:  # in strips, as Pillow's copies of a large image would take four times its memory
    with no_pixel_limit():  # Pillow before 12.3 applies its limit to crops too
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
  if not dark:
    check_range(pixels, name)
  # Less than a quarter of 16 bits.
  if header.wide and pixels.min() < (high := int(pixels.max())) < 2**6:
    raise InvalidImageError(
      f"{name} has values up to about {high * 256:,} only, of 0..65535: if they have fewer bits, "
      "scale them to 8 bits and save it again; if it is a dark image, brighten it."
    )
  return pixels


def _opaque(image: Image.Image) -> np.ndarray:
  """Composites an image over white."""
  colors = image.convert("RGBA")
  canvas = Image.new("RGB", image.size, "white")
  canvas.paste(colors, mask=colors.getchannel("A"))
  return np.asarray(canvas)


def _to_8_bits(values: np.ndarray) -> np.ndarray:
  """round(values / 257), without leaving 16 bits."""
  scaled = values // 257
  scaled += values - scaled * 257 > 128
  return scaled.astype(np.uint8)
