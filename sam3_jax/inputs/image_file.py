"""Image files: which formats are read, and the one way to open them.

Every image that comes from outside, from a path, from bytes or as a PIL image, is opened here, so
that all of them have the same formats, bounds, orientation and messages. Bounds are checked from
the header, before a decoder takes memory.
"""

import io
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeAlias

from PIL import ExifTags, Image, UnidentifiedImageError

from sam3_jax.inputs.file_signatures import what_it_is
from sam3_jax.utils.os_errors import remedy

FileSource: TypeAlias = str | os.PathLike | bytes | bytearray | memoryview | Image.Image

MAX_PIXELS = 300_000_000

# Pillow's names of the formats that are read, and the endings their files have. Not in the table,
# so refused whatever Pillow could do: formats that start another program (EPS starts Ghostscript),
# hand over to plug-ins (HDF5, GRIB, FITS, WMF), or that nobody keeps photographs in.
SUFFIXES_BY_FORMAT: dict[str, tuple[str, ...]] = {
  "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
  "MPO": (".mpo",),
  "PNG": (".png", ".apng"),
  "WEBP": (".webp",),
  "TIFF": (".tif", ".tiff"),
  "GIF": (".gif",),
  "BMP": (".bmp",),
  "DIB": (".dib",),
  "JPEG2000": (".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c"),
  "AVIF": (".avif", ".avifs"),
  "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
  "TGA": (".tga",),  # last: it has no signature
}
FORMATS = tuple(SUFFIXES_BY_FORMAT)
IMAGE_SUFFIXES = frozenset(end for ends in SUFFIXES_BY_FORMAT.values() for end in ends)

_TURNED = (5, 6, 7, 8)  # orientations, EXIF 2.32, that exchange height and width
_TIFF_SIZE = (257, 256)  # tags of TIFF 6.0: height, width
_TIFF_SUBFILE, _TIFF_TILE = 254, (322, 323)

# Codecs that Pillow has in Python: slower by a factor of a hundred, so their images are bounded.
_PYTHON_CODECS = ("ppm", "ppm_plain", "bmp_rle")
_MAX_PYTHON_PIXELS = 8_000_000
_MAX_SCANS = 100  # of a progressive JPEG; encoders write about ten, and each costs a pass
# Of the images that would take more than this many bytes to read, those are refused whose files
# are this many times smaller than their pixels: decompression bombs, or damaged headers.
# PNG reaches 1,032 for one colour; photographs and scans stay below 200.
_LARGE, _BOMB_RATIO = 800_000_000, 500
# Bytes a pixel that decoders take, as measured, where it is more than the pixels themselves.
_DECODER_BYTES = {"WEBP": 16, "AVIF": 12, "JPEG2000": 20}
_RGB = 3  # bytes a pixel of what `read_image` makes of it


class InvalidImageError(ValueError):
  """The file holds no image that can be used: another try gives the same."""


class UnreadableImageError(ValueError):
  """The file could not be read, whatever is in it: another try may succeed."""


class ImageHeader(NamedTuple):
  """What is known of an image before its pixels are decoded.

  Attributes:
    image: to be loaded.
    height, width: as a viewer shows it, with the orientation applied.
    orientation: 1 to 8 as in EXIF: what the pixels need once `image` was loaded. (Pillow applies
      a TIFF's own by loading it.)
    wide: its channels have 16 bits, which Pillow reduces to 8.
  """

  image: Image.Image
  height: int
  width: int
  orientation: int
  wide: bool


@contextmanager
def open_image(
  source: FileSource, *, max_pixels: int = MAX_PIXELS, load: bool = True
) -> Iterator[ImageHeader]:
  """Opens an image of any kind; closes what it opened.

  Args:
    source: a path, a file's bytes, or a PIL image.
    max_pixels: larger images are refused before they are decoded.
    load: decode it; else only the header is read (of a PNG all, as its EXIF may be at the end).

  Raises:
    FileNotFoundError: no such file.
    UnreadableImageError: it cannot be read (permission, input/output error, ...).
    ValueError: no image, one of a format that is not read, a truncated or damaged one; too many
      pixels, or far more than its bytes can hold.
  """
  name = name_of(source)
  if isinstance(source, Image.Image):
    with _no_pixel_limit():
      header = _header(source, name, max_pixels, load)
    yield header
    return
  raw = isinstance(source, bytes | bytearray | memoryview)
  file = _Noting(io.BytesIO(source) if raw else _open_regular(Path(source)))
  with file:
    with _no_pixel_limit(), _decoding(name, file):
      image, size = _identify(file, name, max_pixels)
    with image:
      with _no_pixel_limit():
        header = _header(image, name, max_pixels, load, file, size)
      yield header


def displayed_size(source: FileSource, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
  """Height and width of an image as a viewer shows it, from its header; raises as `open_image`."""
  with open_image(source, max_pixels=max_pixels, load=False) as header:
    return header.height, header.width


def name_of(source: FileSource) -> str:
  """What messages call it."""
  if isinstance(source, Image.Image):
    return "the PIL image"
  if isinstance(source, bytes | bytearray | memoryview):
    return "the bytes given as an image"
  return str(Path(source))


def check_size(name: str, height: int, width: int, max_pixels: int) -> None:
  """Raises ValueError unless an image of this size may be read."""
  if height * width == 0:
    raise InvalidImageError(
      f"{name} is {width} x {height}, but an image has at least 1 pixel a side."
    )
  if height * width > max_pixels:
    raise InvalidImageError(
      f"{name} is {width} x {height}: {height * width:,} pixels, more than {max_pixels:,}. "
      "Allow more with max_pixels= (--max-pixels on the command line), or make it smaller."
    )


class _Noting(io.BufferedReader):
  """A file that remembers an error of reading it, whatever a decoder makes of that error."""

  def __init__(self, raw: Any):
    super().__init__(raw)
    self.error: OSError | None = None

  def _note(self, read: Any, *args: Any) -> Any:
    try:
      return read(*args)
    except OSError as error:
      if error.errno is not None:
        self.error = error
      raise

  def read(self, *args: Any) -> bytes:
    return self._note(super().read, *args)

  def readline(self, *args: Any) -> bytes:
    return self._note(super().readline, *args)

  def readinto(self, *args: Any) -> int:
    return self._note(super().readinto, *args)


def _open_regular(path: Path) -> io.FileIO:
  """Opens a regular file; never waits for the other end of a pipe."""
  if "\0" in str(path):
    raise FileNotFoundError(f"there is no image {str(path)!r}: its name has a null byte.")
  try:
    found = os.stat(path)
    if stat.S_ISDIR(found.st_mode):
      raise InvalidImageError(
        f"{path} is a folder, not an image: name the files in it, one by one."
      )
    if not stat.S_ISREG(found.st_mode):
      raise InvalidImageError(
        f"{path} is no regular file (a pipe, socket or device): save it as a file."
      )
    return io.FileIO(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
  except FileNotFoundError:
    raise FileNotFoundError(f"there is no image {path}: check the path.") from None
  except OSError as error:
    raise UnreadableImageError(
      f"{path} cannot be read ({error.strerror}); {remedy(error)}."
    ) from error


def _identify(file: BinaryIO, name: str, max_pixels: int) -> tuple[Image.Image, int]:
  """The image, not decoded, and the bytes of its file."""
  size = file.seek(0, os.SEEK_END)
  file.seek(0)
  start = file.read(512)
  if not start:
    raise InvalidImageError(f"{name} is empty (0 bytes): get the file again.")
  if (found := what_it_is(start)) is not None:
    raise InvalidImageError(f"{name} is {found.kind}, not an image that is read: {found.remedy}.")
  if start[:4] == b"RIFF" and start[8:16] == b"WEBPVP8X" and len(start) >= 30:
    # Pillow takes memory for the canvas when it opens the file.
    width, height = (1 + int.from_bytes(start[at : at + 3], "little") for at in (24, 27))
    check_size(name, height, width, max_pixels)
  file.seek(0)
  # Pillow opens MPO by the opener of JPEG.
  skipped = {"MPO"} if _may_be_tga(start) else {"MPO", "TGA"}
  return Image.open(file, formats=[one for one in FORMATS if one not in skipped]), size


def _may_be_tga(start: bytes) -> bool:
  """Whether the header's fields agree, as Pillow takes much else for a TGA file."""
  colormap, kind = (start[1], start[2]) if len(start) >= 18 else (-1, -1)
  depths = {1: (8,), 9: (8,), 2: (16, 24, 32), 10: (16, 24, 32), 3: (8, 16), 11: (8, 16)}
  return (
    kind in depths
    and colormap == (kind in (1, 9))
    and start[16] in depths[kind]
    and not start[17] & 0xC0
  )


def _header(
  image: Image.Image,
  name: str,
  max_pixels: int,
  load: bool,
  file: _Noting | None = None,
  size: int = 0,
) -> ImageHeader:
  stored = _stored_size(image)
  check_size(name, *stored, max_pixels)
  if getattr(image, "tile", None) and image.format not in FORMATS:
    raise InvalidImageError(
      f"{name} is of the format {image.format}, which is not read: call its load() before, or "
      "convert it to PNG or JPEG."
    )
  with _decoding(name, file):
    wide = _is_wide(image)
    if file is not None:
      _check_file(image, name, stored[0] * stored[1], size, file)
    if load or image.format == "PNG":
      turned = _orientation(image) if image.format == "TIFF" else 1  # gone once it was loaded
      image.load()
      orientation = turned if image.format == "TIFF" else _orientation(image)
    else:
      orientation = _orientation(image)
  height, width = stored[::-1] if orientation in _TURNED else stored
  remaining = 1 if image.format == "TIFF" else orientation
  return ImageHeader(image, height, width, remaining, wide)


def _stored_size(image: Image.Image) -> tuple[int, int]:
  """Height and width of the pixels as they are in the file."""
  tags = getattr(image, "tag_v2", None)
  if image.format == "TIFF" and tags is not None and getattr(image, "tile", None):
    height, width = (tags.get(tag) for tag in _TIFF_SIZE)
    if isinstance(height, int) and isinstance(width, int):
      return height, width
  return image.height, image.width


def _orientation(image: Image.Image) -> int:
  """1 to 8; 1 where there is none, or one that EXIF does not have."""
  try:
    found = image.getexif().get(ExifTags.Base.Orientation)
    return next((one for one in range(1, 9) if one == found), 1)
  except Exception:  # EXIF that is damaged: viewers ignore it, Pillow raises all kinds of errors
    return 1


def _is_wide(image: Image.Image) -> bool:
  """Whether Pillow will reduce channels of 16 bits to 8, which hides that they hold fewer."""
  if image.mode.startswith(("I", "F")):
    return False  # their values are kept
  for _, _, _, args in getattr(image, "tile", ()):
    values = args if isinstance(args, tuple) else (args,)
    if any(isinstance(one, str) and ";16" in one for one in values[:1]):
      return True
    if len(values) > 1 and isinstance(values[1], int) and image.format == "PPM":
      return values[1] > 255
  return False


def _check_file(image: Image.Image, name: str, pixels: int, size: int, file: BinaryIO) -> None:
  """Raises ValueError if decoding would take memory or time out of all proportion."""
  codecs = {tile[0] for tile in getattr(image, "tile", ())}
  if codecs & set(_PYTHON_CODECS) and pixels > _MAX_PYTHON_PIXELS:
    raise InvalidImageError(
      f"{name} has {pixels:,} pixels in a kind of {image.format} that is decoded slowly, at most "
      f"{_MAX_PYTHON_PIXELS:,}: save it as PNG"
    )
  tags = getattr(image, "tag_v2", {})
  _check_tiff(name, tags, pixels)
  each = _DECODER_BYTES.get(image.format or "", _mode_bytes(image.mode))
  if progressive := image.format in ("JPEG", "MPO") and bool(image.info.get("progressive")):
    each = 6 + _mode_bytes(image.mode)  # the coefficients of all blocks, 2 bytes each
  packed = pixels // 8 if image.mode == "1" else pixels * _mode_bytes(image.mode)
  if pixels * (each + _RGB) > _LARGE and packed > _BOMB_RATIO * size:
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
        f"{name} is a progressive JPEG of {scans} scans, at most {_MAX_SCANS}: save it again"
      )


def _check_tiff(name: str, tags: Any, pixels: int) -> None:
  subfile = tags.get(_TIFF_SUBFILE, 0)
  if isinstance(subfile, int) and subfile & 1:
    raise InvalidImageError(
      f"{name} begins with the thumbnail of another image, as camera raw files (DNG, NEF) do: "
      "convert it to JPEG or PNG"
    )
  sides = [tags.get(tag, 0) for tag in _TIFF_TILE]
  if all(isinstance(side, int) for side in sides) and sides[0] * sides[1] > 4 * pixels + 2**24:
    raise InvalidImageError(
      f"{name} has tiles of {sides[0]} x {sides[1]} in an image of {pixels:,} pixels: get it again"
    )


def _mode_bytes(mode: str) -> int:
  """Bytes a pixel that Pillow takes."""
  return 1 if mode in ("1", "L", "P") else 2 if mode.startswith("I;16") else 4


@contextmanager
def _decoding(name: str, file: _Noting | None) -> Iterator[None]:
  """Makes one ValueError of whatever a decoder raises."""
  try:
    yield
  except (MemoryError, InvalidImageError):
    raise
  except Exception as error:
    if file is not None:
      _raise_if_unreadable(name, file)
    if isinstance(error, UnidentifiedImageError):
      raise InvalidImageError(
        f"{name} is not an image, or only the beginning of one: give a JPEG, PNG, WebP, TIFF or "
        "another format that is read."
      ) from None
    reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    raise InvalidImageError(
      f"{name} is truncated or damaged ({reason:.120}): get the file again."
    ) from error


def _raise_if_unreadable(name: str, file: _Noting) -> None:
  """Raises UnreadableImageError if the file cannot be read to its end."""
  try:
    file.seek(0)
    while file.read(2**20):
      pass
  except (OSError, ValueError):  # ValueError: a decoder closed it
    pass
  if file.error is not None:
    raise UnreadableImageError(
      f"{name} cannot be read ({file.error.strerror}); {remedy(file.error)}."
    ) from file.error


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
