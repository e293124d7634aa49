"""Recognizes files that are not in a supported image format, and suggests a remedy for each."""

from typing import NamedTuple

_CONVERT = "convert it to PNG or JPEG"
_FRAMES = "extract its frames as JPEG or PNG files"
_UNPACK = "unpack it and give the images in it"
_AGAIN = "it looks like a failed download; get the file again"

# Offset, bytes, kind, remedy; the first match counts.
_SIGNATURES = (
  (0, b"%!PS", "PostScript", _CONVERT),
  (0, b"\xc5\xd0\xd3\xc6", "PostScript (EPS)", _CONVERT),
  (0, b"%PDF-", "a PDF document", "convert its pages to PNG"),
  (0, b"8BPS", "a Photoshop document", _CONVERT),
  (0, b"gimp xcf", "a GIMP document", _CONVERT),
  (0, b"\xff\x0a", "a JPEG XL image", _CONVERT),
  (0, b"\0\0\0\x0cJXL ", "a JPEG XL image", _CONVERT),
  (0, b"v/1\x01", "an OpenEXR image", "convert it to 8 bits a channel, PNG or JPEG"),
  (0, b"#?RADIANCE", "a Radiance HDR image", "convert it to 8 bits a channel, PNG or JPEG"),
  (0, b"\0\0\x01\0", "an icon (ICO)", _CONVERT),
  (0, b"qoif", "a QOI image", _CONVERT),
  (0, b"\x01\xda", "an SGI image", _CONVERT),
  (0, b"DDS ", "a DDS texture", _CONVERT),
  (0, b"icns", "an icon (ICNS)", _CONVERT),
  (0, b"\xd7\xcd\xc6\x9a", "a Windows metafile", _CONVERT),
  (128, b"DICM", "a DICOM file", "window its values to 0..255 and save them as PNG"),
  (0, b"SIMPLE  =", "a FITS file", "scale its values to 0..255 and save them as PNG"),
  (0, b"\x89HDF\r\n", "an HDF5 file", "save the array of pixels in it as PNG"),
  (0, b"\x93NUMPY", "a NumPy array", "pass numpy.load of it in Python, or save it as PNG"),
  (0, b"II*\0\x10\0\0\0CR", "a camera raw file (CR2)", _CONVERT),
  (0, b"IIU\0", "a camera raw file (RW2)", _CONVERT),
  (0, b"FUJIFILMCCD-RAW", "a camera raw file (RAF)", _CONVERT),
  (8, b"AVI ", "a video (AVI)", _FRAMES),
  (0, b"\x1a\x45\xdf\xa3", "a video (Matroska or WebM)", _FRAMES),
  (0, b"\0\0\x01\xba", "a video (MPEG)", _FRAMES),
  (0, b"\0\0\x01\xb3", "a video (MPEG)", _FRAMES),
  (0, b"FLV\x01", "a video (FLV)", _FRAMES),
  (0, b"0&\xb2u\x8ef\xcf\x11", "a video (WMV)", _FRAMES),
  (0, b"PK\x03\x04", "a zip file", _UNPACK),
  (0, b"\x1f\x8b", "a gzip file", _UNPACK),
  (0, b"7z\xbc\xaf\x27\x1c", "a 7-zip file", _UNPACK),
  (0, b"\x28\xb5\x2f\xfd", "a zstandard file", _UNPACK),
  (0, b"Rar!", "a RAR file", _UNPACK),
  (257, b"ustar", "a tar file", "give it to `sam3-jax batch`, or unpack it"),
  (0, b"version https://git-lfs", "a pointer of Git LFS", "run `git lfs pull`"),
)
_TEXTS = (  # the beginning of the text in lower case
  (b"<svg", "an SVG drawing", "draw it as PNG"),
  (b"<!doctype html", "a web page", _AGAIN),
  (b"<html", "a web page", _AGAIN),
  (b"<?xml", "an XML file", "draw it as PNG, if it is an SVG drawing"),
)
_HEIF = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_AVIF = (b"avif", b"avis")


class UnsupportedFormat(NamedTuple):
  """The kind of a file, and how to convert it."""

  kind: str
  remedy: str


def unsupported_format(start: bytes) -> UnsupportedFormat | None:
  """Recognizes a file by its first 512 bytes; None if it may be a supported image."""

  for offset, signature, kind, remedy in _SIGNATURES:
    if start.startswith(signature, offset):
      return UnsupportedFormat(kind, remedy)
  if start[4:8] == b"ftyp":
    brands = start[8 : min(int.from_bytes(start[:4]), len(start))]
    if any(brand in brands for brand in _AVIF):
      return None
    if any(brand in brands for brand in _HEIF):
      return UnsupportedFormat("a HEIC image", _CONVERT)
    return UnsupportedFormat("a video (MP4, MOV or the like)", _FRAMES)
  text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
  for beginning, kind, remedy in _TEXTS:
    if text.startswith(beginning):
      if b"<svg" in text:
        return UnsupportedFormat("an SVG drawing", "draw it as PNG")
      return UnsupportedFormat(kind, remedy)
  return None
