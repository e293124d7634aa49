"""Limits of image files: size in pixels, decompression bombs, slow codecs.

Limits are checked from the header, before a decoder allocates memory.
"""

from typing import Any, BinaryIO

from PIL import Image

MAX_PIXELS = 300_000_000

# Codecs that Pillow implements in Python: about a hundred times slower.
_PYTHON_CODECS = ("ppm", "ppm_plain", "bmp_rle")
_MAX_PYTHON_PIXELS = 8_000_000
_MAX_SCANS = 100  # of a progressive JPEG; encoders write about ten, and each costs a pass
# An image that takes more than `_LARGE` bytes to read is refused if its file is `_BOMB_RATIO` times
# smaller than its pixels: it is a decompression bomb or has a damaged header. PNG reaches a ratio
# of 1,032 for a single color; photographs and scans stay below 200.
_LARGE, _BOMB_RATIO = 800_000_000, 500
# Measured memory of decoders in bytes per pixel, where it exceeds the pixels themselves.
_DECODER_BYTES = {"WEBP": 16, "AVIF": 12, "JPEG2000": 20}
_RGB = 3  # bytes per pixel of the result of `read_image`
_TIFF_SUBFILE, _TIFF_TILE = 254, (322, 323)  # tags of TIFF 6.0


class InvalidImageError(ValueError):
  """The file does not contain a usable image; retrying does not help."""


class UnreadableImageError(ValueError):
  """The file could not be read, whatever its content; retrying may help."""


def check_size(name: str, height: int, width: int, max_pixels: int) -> None:
  """Raises InvalidImageError if an image is empty or larger than `max_pixels`."""
  if height * width == 0:
    raise InvalidImageError(
      f"{name} is {width} x {height}, but an image must have at least 1 pixel on each side."
    )
  if height * width > max_pixels:
    raise InvalidImageError(
      f"{name} is {width} x {height}: {height * width:,} pixels, more than {max_pixels:,}. "
      "Allow more with max_pixels= (--max-pixels on the command line), or make it smaller."
    )


def check_file(image: Image.Image, name: str, pixels: int, size: int, file: BinaryIO) -> None:
  """Raises InvalidImageError if decoding would take too much memory or time.

  Args:
    image: opened, not decoded.
    name: of the image, for messages.
    pixels: of the image.
    size: bytes of the file.
    file: the open file.
  """
  codecs = {tile[0] for tile in getattr(image, "tile", ())}
  if codecs & set(_PYTHON_CODECS) and pixels > _MAX_PYTHON_PIXELS:
    raise InvalidImageError(
      f"{name} has {pixels:,} pixels in a {image.format} encoding that is slow to decode, with a "
      f"limit of {_MAX_PYTHON_PIXELS:,}: save it as PNG"
    )
  tags = getattr(image, "tag_v2", {})
  _check_tiff(name, tags, pixels)
  per_pixel = _DECODER_BYTES.get(image.format or "", _mode_bytes(image.mode))
  if progressive := image.format in ("JPEG", "MPO") and bool(image.info.get("progressive")):
    per_pixel = 6 + _mode_bytes(image.mode)  # the coefficients of all blocks, 2 bytes each
  packed = pixels // 8 if image.mode == "1" else pixels * _mode_bytes(image.mode)
  if pixels * (per_pixel + _RGB) > _LARGE and packed > _BOMB_RATIO * size:
    raise InvalidImageError(
      f"{name} is {image.width} x {image.height} in only {size:,} bytes: its header is damaged, or "
      "it is a decompression bomb; get it again, or make it smaller"
    )
  if progressive:
    at = file.tell()
    file.seek(0)
    scans = sum(block.count(b"\xff\xda") for block in iter(lambda: file.read(2**20), b""))
    file.seek(at)
    if scans > _MAX_SCANS:
      raise InvalidImageError(
        f"{name} is a progressive JPEG of {scans} scans, more than {_MAX_SCANS}: save it again"
      )


def _check_tiff(name: str, tags: Any, pixels: int) -> None:
  subfile = tags.get(_TIFF_SUBFILE, 0)
  if isinstance(subfile, int) and subfile & 1:
    raise InvalidImageError(
      f"{name} starts with a thumbnail, like camera raw files (DNG, NEF): convert it to JPEG or PNG"
    )
  sides = [tags.get(tag, 0) for tag in _TIFF_TILE]
  if all(isinstance(side, int) for side in sides) and sides[0] * sides[1] > 4 * pixels + 2**24:
    raise InvalidImageError(
      f"{name} has tiles of {sides[0]} x {sides[1]} in an image of {pixels:,} pixels: get it again"
    )


def _mode_bytes(mode: str) -> int:
  """Bytes per pixel in Pillow's memory."""
  return 1 if mode in ("1", "L", "P") else 2 if mode.startswith("I;16") else 4
