"""Image files: supported formats, and opening them.

All paths, bytes and PIL images from users are opened here, so that formats, limits, orientation and
error messages are the same for all. Limits are checked from the header, before a decoder allocates
memory.
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

from sam3_jax.inputs.file_signatures import unsupported_format
from sam3_jax.inputs.image_limits import (
  MAX_PIXELS,
  InvalidImageError,
  UnreadableImageError,
  check_file,
  check_size,
)
from sam3_jax.storage.urls import is_object, redact
from sam3_jax.utils.os_errors import error_text, remedy

FileSource: TypeAlias = str | os.PathLike | bytes | bytearray | memoryview | Image.Image

# Pillow's names of the supported formats and the suffixes of their files. Left out, even if Pillow
# can read them, are formats that start another program (EPS starts Ghostscript), formats that need
# plug-ins (HDF5, GRIB, FITS, WMF), and formats that are not used for photographs.
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

_HEADER = 2**16  # bytes of an object that are read at a time if only its header is needed
_TRANSPOSED = (5, 6, 7, 8)  # orientations (EXIF 2.32) that exchange height and width
_TIFF_STARTS = (b"II*\0", b"MM\0*")
_TIFF_SIZE = (257, 256)  # tags of TIFF 6.0: height, width


class ImageHeader(NamedTuple):
  """An image whose pixels may not be decoded yet.

  Attributes:
    image: the PIL image.
    height, width: as displayed, with the orientation applied.
    orientation: 1 to 8 as in EXIF: the transposition that remains to be applied after loading.
      (Pillow applies that of a TIFF file when it loads it.)
    wide: whether the channels have 16 bits, which Pillow reduces to 8.
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
  """Opens an image; closes it at the end, unless it was given as a PIL image.

  Args:
    source: a path or the URL of an object, the bytes of a file, or a PIL image.
    max_pixels: larger images are refused before they are decoded.
    load: decode the image. If False, only the header is read, except for PNG files, whose EXIF may
      be at the end.

  Raises:
    FileNotFoundError: no such file.
    UnreadableImageError: the file cannot be read (permission, input/output error, ...).
    InvalidImageError: the file is not an image or in an unsupported format, is truncated or
      damaged, or has too many pixels, in total or for the size of its file.
  """
  name = name_of(source)
  if isinstance(source, Image.Image):
    with no_pixel_limit():
      header = _header(source, name, max_pixels, load)
    yield header
    return
  raw = isinstance(source, bytes | bytearray | memoryview)
  if is_object(source):
    file = _ErrorRecorder(_open_object(source, load))
  else:
    file = _ErrorRecorder(io.BytesIO(source) if raw else _open_regular(Path(source)))
  with file:
    with no_pixel_limit(), _decoding(name, file):
      image, size = _identify(file, name, max_pixels)
    with image:
      with no_pixel_limit():
        header = _header(image, name, max_pixels, load, file, size)
      yield header


def displayed_size(source: FileSource, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
  """Height and width of an image as displayed, from its header; raises like `open_image`."""
  with open_image(source, max_pixels=max_pixels, load=False) as header:
    return header.height, header.width


def name_of(source: FileSource) -> str:
  """The name of an image in messages."""
  if isinstance(source, Image.Image):
    return "the PIL image"
  if isinstance(source, bytes | bytearray | memoryview):
    return "the bytes given as an image"
  return redact(Path(source))


class _ErrorRecorder(io.BufferedReader):
  """A file that records read errors, which decoders may hide."""

  def __init__(self, raw: Any):
    super().__init__(raw)
    self.error: OSError | None = None

  def _record(self, read: Any, *args: Any) -> Any:
    try:
      return read(*args)
    except OSError as error:
      if error.errno is not None:
        self.error = error
      raise

  def read(self, *args: Any) -> bytes:
    return self._record(super().read, *args)

  def readline(self, *args: Any) -> bytes:
    return self._record(super().readline, *args)

  def readinto(self, *args: Any) -> int:
    return self._record(super().readinto, *args)


def _open_regular(path: Path) -> io.FileIO:
  """Opens a regular file; raises for pipes instead of waiting for their other end."""
  if "\0" in str(path):
    raise FileNotFoundError(f"there is no image {str(path)!r}: its name has a null byte.")
  try:
    found = os.stat(path)
    if stat.S_ISDIR(found.st_mode):
      raise InvalidImageError(f"{path} is a directory, not an image: name the files in it.")
    if not stat.S_ISREG(found.st_mode):
      raise InvalidImageError(
        f"{path} is not a regular file (a pipe, socket or device): save it as a file."
      )
    return io.FileIO(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
  except FileNotFoundError:
    raise FileNotFoundError(f"there is no image {path}: check the path.") from None
  except OSError as error:
    raise UnreadableImageError(
      f"{path} cannot be read ({error_text(error)}); {remedy(error)}."
    ) from error


def _open_object(source: Any, whole: bool) -> Any:
  """Opens an object: its content if it is needed as a whole."""
  from sam3_jax.storage.objects import ObjectPath

  try:
    path = ObjectPath(str(source))
    return io.BytesIO(path.read_bytes()) if whole else path.open("rb", _HEADER)
  except FileNotFoundError:
    raise FileNotFoundError(f"there is no image {redact(source)}: check the address.") from None
  except OSError as error:
    raise UnreadableImageError(f"{redact(source)} cannot be read ({error_text(error)}).") from error


def _identify(file: BinaryIO, name: str, max_pixels: int) -> tuple[Image.Image, int]:
  """Opens an image without decoding it; returns it and the size of its file in bytes."""
  size = file.seek(0, os.SEEK_END)
  file.seek(0)
  start = file.read(512)
  if not start:
    raise InvalidImageError(f"{name} is empty (0 bytes): get the file again.")
  if (found := unsupported_format(start)) is not None:
    raise InvalidImageError(f"{name} is {found.kind}, not a supported image: {found.remedy}.")
  if start[:4] == b"RIFF" and start[8:16] == b"WEBPVP8X" and len(start) >= 30:
    # Pillow allocates the canvas when it opens the file.
    width, height = (1 + int.from_bytes(start[at : at + 3], "little") for at in (24, 27))
    check_size(name, height, width, max_pixels)
  file.seek(0)
  # Pillow opens MPO files with its JPEG plug-in.
  skipped = {"MPO"} if _may_be_tga(start) else {"MPO", "TGA"}
  return Image.open(file, formats=[one for one in FORMATS if one not in skipped]), size


def _may_be_tga(start: bytes) -> bool:
  """Whether the header is consistent: Pillow takes many other files for TGA."""
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
  file: _ErrorRecorder | None = None,
  size: int = 0,
) -> ImageHeader:
  stored = _stored_size(image)
  check_size(name, *stored, max_pixels)
  if getattr(image, "tile", None) and image.format not in FORMATS:
    raise InvalidImageError(
      f"{name} has the unsupported format {image.format}: call its load() first, or convert it to "
      "PNG or JPEG."
    )
  with _decoding(name, file):
    wide = _is_wide(image)
    if file is not None:
      check_file(image, name, stored[0] * stored[1], size, file)
    if load or image.format == "PNG":
      of_tiff = _orientation(image) if image.format == "TIFF" else 1  # loading removes it
      image.load()
      orientation = of_tiff if image.format == "TIFF" else _orientation(image)
    else:
      orientation = _orientation(image)
  height, width = stored[::-1] if orientation in _TRANSPOSED else stored
  remaining = 1 if image.format == "TIFF" else orientation
  return ImageHeader(image, height, width, remaining, wide)


def _stored_size(image: Image.Image) -> tuple[int, int]:
  """Height and width as stored in the file."""
  tags = getattr(image, "tag_v2", None)
  if image.format == "TIFF" and tags is not None and getattr(image, "tile", None):
    height, width = (tags.get(tag) for tag in _TIFF_SIZE)
    if isinstance(height, int) and isinstance(width, int):
      return height, width
  return image.height, image.width


def _orientation(image: Image.Image) -> int:
  """The EXIF orientation, 1 to 8; 1 if there is none or it is invalid."""
  try:
    found = image.getexif().get(ExifTags.Base.Orientation)
    return next((one for one in range(1, 9) if one == found), 1)
  except Exception:  # damaged EXIF: viewers ignore it, Pillow raises many types of errors
    return 1


def _is_wide(image: Image.Image) -> bool:
  """Whether Pillow will reduce channels of 16 bits to 8."""
  if image.mode.startswith(("I", "F")):
    return False  # Pillow keeps their values
  for _, _, _, args in getattr(image, "tile", ()):
    values = args if isinstance(args, tuple) else (args,)
    if any(isinstance(one, str) and ";16" in one for one in values[:1]):
      return True
    if len(values) > 1 and isinstance(values[1], int) and image.format == "PPM":
      return values[1] > 255
  return False


@contextmanager
def _decoding(name: str, file: _ErrorRecorder | None) -> Iterator[None]:
  """Turns any error of a decoder into a one-line ValueError."""
  try:
    yield
  except (MemoryError, InvalidImageError):
    raise
  except Exception as error:
    if file is not None:
      _raise_if_unreadable(name, file)
    if isinstance(error, UnidentifiedImageError):
      if file is not None and _starts_as_tiff(file):
        raise InvalidImageError(
          f"{name} is a TIFF file of an unsupported kind, such as several bands of 16 bits, or is "
          "damaged: convert it to 8-bit RGB, or read it as a raster (segment --stretch 2,98)."
        ) from None
      raise InvalidImageError(
        f"{name} is not an image, or is cut off: give a JPEG, PNG, WebP, TIFF or another supported "
        "format."
      ) from None
    reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    raise InvalidImageError(
      f"{name} is truncated or damaged ({reason:.120}): get the file again."
    ) from error


def _starts_as_tiff(file: _ErrorRecorder) -> bool:
  """Whether a file, which can be read to its end, begins like a TIFF file."""
  file.seek(0)
  return file.read(4) in _TIFF_STARTS


def _raise_if_unreadable(name: str, file: _ErrorRecorder) -> None:
  """Raises UnreadableImageError if the file cannot be read to its end."""
  try:
    file.seek(0)
    while file.read(2**20):
      pass
  except (OSError, ValueError):  # ValueError: a decoder closed it
    pass
  if file.error is not None:
    raise UnreadableImageError(
      f"{name} cannot be read ({error_text(file.error)}); {remedy(file.error)}."
    ) from file.error


_limit_lock = threading.Lock()
_limit_lifted: list[int | None] = []  # Pillow's limit, once for each thread in `no_pixel_limit`


@contextmanager
def no_pixel_limit() -> Iterator[None]:
  """Lifts Pillow's global limit while any thread is in this context: `max_pixels` replaces it."""
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
