"""Opening image files: formats, orientation, errors, limits; paths, bytes and PIL images agree."""

import io
import os
import socket
import struct
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from batches import load_images
from PIL import Image

from sam3_jax.batch.inputs import Input
from sam3_jax.inputs.file_signatures import unsupported_format
from sam3_jax.inputs.image_file import (
  FORMATS,
  IMAGE_SUFFIXES,
  SUFFIXES_BY_FORMAT,
  InvalidImageError,
  UnreadableImageError,
  displayed_size,
  open_image,
)
from sam3_jax.inputs.preprocess import read_image

ROOT = Path(__file__).parents[1]
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(30, 256, (40, 60, 3), np.uint8)
ORIENTABLE = ("JPEG", "MPO", "PNG", "WEBP", "TIFF", "AVIF")
# As TIFF and EXIF write values: type, count, and the value in four bytes.
ODD = {
  "0": (3, 1, b"\0\0\0\0"),
  "9": (3, 1, b"\x09\0\0\0"),
  "65535": (3, 1, b"\xff\xff\0\0"),
  "long": (4, 1, b"\x06\0\0\0"),
  "byte": (1, 1, b"\x06\0\0\0"),
  "text": (2, 2, b"6\0\0\0"),
  "two": (3, 2, b"\x06\0\x01\0"),
  "signed": (8, 1, b"\xff\xff\0\0"),
  "no type": (99, 1, b"\x06\0\0\0"),
  "outside": (3, 9999, b"\xff\xff\xff\x7f"),
}


def exif_of(entry: tuple[int, int, bytes], order: str = "<") -> bytes:
  """EXIF with only the orientation tag."""
  kind, count, value = entry
  if order == ">" and kind == 3:
    value = value[1::-1] + value[3:1:-1]
  head = b"II*\0" if order == "<" else b"MM\0*"
  tag = struct.pack(order + "HHI", 0x0112, kind, count) + value
  return head + struct.pack(order + "IH", 8, 1) + tag + bytes(4)


def saved(form: str, exif: bytes = b"", image: Image.Image | None = None, **options) -> bytes:
  file = io.BytesIO()
  if exif:
    options["exif"] = exif if form in ("PNG", "TIFF", "AVIF") else b"Exif\0\0" + exif
  if form == "MPO":
    options |= {"save_all": True, "append_images": [Image.new("RGB", (60, 40))]}
  (image or Image.fromarray(PIXELS)).save(file, form, **options)
  return file.getvalue()


def assert_all_agree(data: bytes, path: Path, form: str) -> np.ndarray:
  """Checks that the header and the pixels agree, from a path, bytes and PIL images."""
  path.write_bytes(data)
  pixels = read_image(path)
  with Image.open(io.BytesIO(data)) as lazy, Image.open(path) as loaded:
    assert lazy.format == form
    assert displayed_size(lazy) == pixels.shape[:2]
    loaded.load()
    for source in (data, bytearray(data), memoryview(data), str(path), lazy, loaded):
      np.testing.assert_array_equal(read_image(source), pixels)
      assert displayed_size(source) == pixels.shape[:2]
  tar = path.with_name("tar")
  tar.write_bytes(b"before" + data + b"behind")
  inputs = [Input("a", str(path), ()), Input("b", str(tar), (), (6, len(data)))]
  for image in load_images(inputs):
    assert (image.size, image.reason) == (pixels.shape[:2], "")
  return pixels


@pytest.mark.parametrize("form", FORMATS)
def test_formats(form, tmp_path):
  """All source types read a complete file; they agree about a truncated one."""
  data = saved(form)
  pixels = assert_all_agree(data, tmp_path / "a", form)
  assert pixels.shape == (40, 60, 3)
  for size in (1, 10, 30, len(data) // 2, len(data) - 20):
    (tmp_path / "b").write_bytes(data[:size])
    refused = [fault(read_image, source) for source in (data[:size], tmp_path / "b")]
    assert bool(refused[0]) == bool(refused[1])
    assert "\n" not in "".join(refused)
    assert all(len(one.replace(str(tmp_path), "")) < 300 for one in refused)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ORIENTABLE)
def test_orientations(form, orientation, tmp_path):
  shapes = set()
  for order in "<>":
    exif = exif_of((3, 1, struct.pack("<HH", orientation, 0)), order)
    if form == "TIFF":
      image = Image.Exif()
      image.load(exif)
      exif = image
    shapes.add(assert_all_agree(saved(form, exif), tmp_path / "a", form).shape[:2])
  assert shapes == {(60, 40) if orientation >= 5 else (40, 60)}


@pytest.mark.filterwarnings("ignore:.*[Tt]ag:UserWarning")
@pytest.mark.filterwarnings("ignore:Truncated File Read:UserWarning")  # Pillow before 12.3
@pytest.mark.parametrize("name", ODD)
def test_invalid_orientation_tags(name, tmp_path):
  for form in ("JPEG", "PNG", "WEBP"):
    assert_all_agree(saved(form, exif_of(ODD[name])), tmp_path / "a", form)
  path = tmp_path / "b"
  path.write_bytes(tiff(ODD[name]))
  try:  # Pillow rejects some of them
    shape = read_image(path).shape[:2]
  except InvalidImageError:
    return
  assert displayed_size(path) == shape


@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "WEBP", "GIF"])
def test_orientation_in_xmp(form, tmp_path):
  xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><d tiff:Orientation="6"/></x:xmpmeta>'
  if form == "PNG":
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt("XML:com.adobe.xmp", xmp.decode())
    data = saved(form, pnginfo=info)
  elif form == "TIFF":
    data = saved(form, tiffinfo={700: xmp})
  elif form == "GIF":
    data = saved(form, image=Image.fromarray(PIXELS).quantize(16), xmp=xmp)
  else:
    data = saved(form, xmp=xmp)
  assert_all_agree(data, tmp_path / "a", form)


def test_exif_after_the_pixels_of_a_png(tmp_path):
  data = saved("PNG")
  exif = exif_of((3, 1, b"\x06\0\0\0"))
  chunk = b"eXIf" + exif
  chunk = struct.pack(">I", len(exif)) + chunk + struct.pack(">I", zlib.crc32(chunk))
  pixels = assert_all_agree(data[:-12] + chunk + data[-12:], tmp_path / "a", "PNG")
  assert pixels.shape == (60, 40, 3)


def tiff(orientation: tuple[int, int, bytes]) -> bytes:
  """A gray TIFF of 3 x 2 pixels."""
  entries = [(256, 3, 1, b"\x03\0\0\0"), (257, 3, 1, b"\x02\0\0\0"), (258, 3, 1, b"\x08\0\0\0")]
  entries += [(259, 3, 1, b"\x01\0\0\0"), (262, 3, 1, b"\x01\0\0\0")]
  entries += [(273, 4, 1, struct.pack("<I", 8)), (274, *orientation)]
  entries += [(278, 3, 1, b"\x02\0\0\0"), (279, 4, 1, b"\x06\0\0\0")]
  rows = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries)
  start = b"II*\0" + struct.pack("<I", 16) + bytes([10, 200, 30, 40, 50, 60, 0, 0])
  return start + struct.pack("<H", len(entries)) + rows + bytes(4)


def test_suffixes_equal_pillows():
  Image.init()
  for form, suffixes in SUFFIXES_BY_FORMAT.items():
    theirs = {end for end, one in Image.registered_extensions().items() if one == form}
    # Without floats, which are not supported, and suffixes that other programs use differently.
    assert set(suffixes) == theirs - {".pfm", ".icb", ".vda", ".vst"}
  assert {".jpg", ".jfif", ".mpo", ".tga", ".j2k", ".png"} <= IMAGE_SUFFIXES
  assert not {"EPS", "PDF", "WMF", "HDF5", "FITS", "GRIB", "BUFR", "SPIDER"} & set(FORMATS)


def test_no_other_module_opens_images():
  for file in (ROOT / "sam3_jax").rglob("*.py"):
    if file.name not in ("image_file.py", "make_sheet.py"):
      assert "Image.open" not in file.read_text(), file


@pytest.mark.parametrize(
  ("start", "kind"),
  [
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n", "PostScript"),
    (b"\xc5\xd0\xd3\xc6" + bytes(40), "PostScript"),
    (b"%PDF-1.7\n", "PDF"),
    (b"\xef\xbb\xbf \n<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
    (b"<?xml version='1.0'?>\n<svg/>", "SVG"),
    (b"<!DOCTYPE html><html>", "web page"),
    (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
    (b"\0\0\0\x18ftypisom\0\0\0\0isommp42", "video"),
    (b"\x1a\x45\xdf\xa3" + bytes(40), "video"),
    (b"PK\x03\x04" + bytes(40), "zip"),
    (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    (b"\x93NUMPY\x01\0", "NumPy"),
    (bytes(128) + b"DICM", "DICOM"),
    (b"\0\0\x01\0\x01\0" + bytes(40), "ICO"),
    (b"SIMPLE  =                    T", "FITS"),
  ],
)
def test_unsupported_files_are_recognized(start, kind, tmp_path):
  (tmp_path / "a.jpg").write_bytes(start)
  for source in (start, tmp_path / "a.jpg"):
    for read in (read_image, displayed_size):
      with pytest.raises(InvalidImageError, match=kind) as error:
        read(source)
      assert "\n" not in str(error.value)


def test_supported_formats_are_not_recognized_as_unsupported():
  for form in FORMATS:
    assert unsupported_format(saved(form)[:512]) is None


def test_unsupported_formats():
  for form in ("PCX", "PDF", "EPS", "SGI", "ICO", "DDS"):
    with pytest.raises(InvalidImageError):
      read_image(saved(form))
  icon = Image.open(io.BytesIO(saved("PCX")))
  with pytest.raises(InvalidImageError, match="the unsupported format PCX"):
    read_image(icon)
  icon.load()
  np.testing.assert_array_equal(read_image(icon), PIXELS)


def test_thumbnails_of_raw_files():
  data = saved("TIFF", tiffinfo={254: 1})
  for read in (read_image, displayed_size):
    with pytest.raises(InvalidImageError, match="camera raw"):
      read(data)


def test_only_regular_files(tmp_path):
  os.mkfifo(tmp_path / "pipe.jpg")
  with socket.socket(socket.AF_UNIX) as server:
    server.bind(str(tmp_path / "socket.jpg"))
  for path in (tmp_path / "pipe.jpg", tmp_path / "socket.jpg", "/dev/zero", "/dev/stdin"):
    if Path(path).is_file():
      continue
    for read in (read_image, displayed_size):
      with ThreadPoolExecutor(1) as pool:
        assert "not a regular file" in pool.submit(fault, read, path).result(timeout=10)
  assert "null byte" in fault(read_image, "a\0b")
  assert "cannot be read (File name too long)" in fault(read_image, "a" * 300)


def fault(read, source) -> str:
  try:
    read(source)
  except (ValueError, OSError) as error:
    return str(error)
  return ""


def test_read_errors_are_not_reported_as_damage(tmp_path, monkeypatch):
  """Even if a decoder hides them."""

  class Broken(io.FileIO):
    def readinto(self, buffer):
      if self.tell() > 0:
        raise OSError(5, "Input/output error")
      return super().readinto(memoryview(buffer)[:512])

  monkeypatch.setattr(io, "FileIO", Broken)
  for form in ("PNG", "JPEG", "TIFF", "BMP"):
    (tmp_path / "a").write_bytes(saved(form))
    with pytest.raises(UnreadableImageError, match=r"cannot be read \(Input/output error\)"):
      read_image(tmp_path / "a")


def header_of(form: str, width: int, height: int) -> bytes:
  """A small file whose header has a wrong size."""
  data = bytearray(saved(form))
  if form == "PNG":
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
  elif form == "BMP":
    data[18:26] = struct.pack("<II", width, height)
  elif form == "GIF":
    data[6:10] = struct.pack("<HH", width, height)
  elif form == "TGA":
    data[12:16] = struct.pack("<HH", width, height)
  elif form == "JPEG":
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
  elif form == "PPM":
    data[:8] = b"P6\n%d %d" % (width, height)
  elif form == "WEBP":
    animated = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(animated, "WEBP", save_all=True, append_images=frames[1:])
    data = bytearray(animated.getvalue())
    assert data[12:16] == b"VP8X"
    data[24:30] = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
  return bytes(data)


@pytest.mark.parametrize("form", ["PNG", "BMP", "GIF", "TGA", "JPEG", "PPM", "WEBP"])
def test_too_large_images_are_rejected_by_their_header(form):
  for read in (read_image, displayed_size):
    for _ in range(2):  # the first call imports modules, which take memory too
      tracemalloc.start()
      with pytest.raises(InvalidImageError, match=r"is 60000 x 50000: 3,000,000,000 pixels"):
        read(header_of(form, 60_000, 50_000))
      peak = tracemalloc.get_traced_memory()[1]
      tracemalloc.stop()
    assert peak < 5e6


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_decompression_bombs_are_rejected(form):
  for read in (read_image, displayed_size):
    with pytest.raises(InvalidImageError, match=r"in only [\d,]+ bytes"):
      read(header_of(form, 16_000, 16_000))


def test_slow_encodings_have_a_limit():
  plain = b"P3\n4000 3000\n255\n" + b"1 2 3 " * 10
  with pytest.raises(InvalidImageError, match="12,000,000 pixels in a PPM encoding"):
    read_image(plain)


def test_progressive_scans_have_a_limit():
  data = saved("JPEG", progressive=True)
  assert read_image(data).shape == (40, 60, 3)
  at = data.index(b"\xff\xda")
  with pytest.raises(InvalidImageError, match="progressive JPEG of 1"):
    read_image(data[:at] + b"\xff\xda\0\x08\x01\x01\0\0\0\0" * 100 + data[at:])


def test_file_is_closed(tmp_path):
  (tmp_path / "a").write_bytes(saved("PNG"))
  before = len(os.listdir("/proc/self/fd"))
  with open_image(tmp_path / "a") as header:
    assert (header.height, header.width, header.orientation) == (40, 60, 1)
  assert fault(read_image, ROOT / "pyproject.toml")
  assert len(os.listdir("/proc/self/fd")) == before
