"""Image files of all supported formats, and damaged and hostile mutants of them."""

import functools
import io
import os
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

VALUES = (0, 1, 2, 7, 8, 127, 128, 255, 256, 0x7FFF, 0x8000, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1)
FOREIGN = {
  "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\nshowpage\n%%EOF\n",
  "pdf": b"%PDF-1.4\n1 0 obj\n<</Type/Catalog>>\nendobj\n",
  "svg": b"<svg xmlns='http://www.w3.org/2000/svg'><rect width='9e9' height='9e9'/></svg>",
  "zip": b"PK\x03\x04" + bytes(60),
  "gzip": b"\x1f\x8b\x08\0" + bytes(60),
  "html": b"<!DOCTYPE html><html><body>404</body></html>",
  "mp4": b"\0\0\0\x18ftypisom\0\0\2\0isomiso2",
  "heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
  "wmf": b"\xd7\xcd\xc6\x9a" + bytes(60),
  "hdf5": b"\x89HDF\r\n\x1a\n" + bytes(60),
  "text": b"photo\n" * 40,
  "escapes": b"\x1b[2J\x1b]0;title\x07" * 9,
  "empty": b"",
}


class Mutant(NamedTuple):
  """A file: its name and its bytes; None for a pipe without a writer."""

  name: str
  data: bytes | None


@functools.cache
def base_images() -> dict[str, bytes]:
  """Valid images of all supported formats, in several variants."""
  rng = np.random.default_rng(0)
  noise = rng.integers(0, 256, (48, 64, 3), np.uint8)
  smooth = np.linspace(20, 235, 64 * 48 * 3).reshape(48, 64, 3).astype(np.uint8)
  color, gray = Image.fromarray(smooth), Image.fromarray(noise[..., 0])
  deep = Image.fromarray(rng.integers(0, 65536, (48, 64), np.uint16))
  clear = Image.fromarray(np.concatenate([noise, noise[..., :1]], -1))
  several = {"save_all": True, "append_images": [color.rotate(9), color.rotate(18)]}
  exif = Image.Exif()
  exif[0x0112] = 6
  exif[0x010E] = "description " * 9
  forms: dict[str, tuple[str, Image.Image, dict[str, Any]]] = {
    "jpg": ("JPEG", color, {"exif": exif}),
    "progressive.jpg": ("JPEG", color, {"progressive": True}),
    "cmyk.jpg": ("JPEG", color.convert("CMYK"), {}),
    "mpo": ("MPO", color, several),
    "png": ("PNG", color, {"exif": exif, "icc_profile": bytes(5000)}),
    "palette.png": ("PNG", color.quantize(16), {"transparency": 3}),
    "deep.png": ("PNG", deep, {}),
    "apng": ("PNG", color, several),
    "webp": ("WEBP", color, {"exif": exif}),
    "lossless.webp": ("WEBP", clear, {"lossless": True}),
    "animated.webp": ("WEBP", color, several),
    "tif": ("TIFF", color, {"exif": exif}),
    "lzw.tif": ("TIFF", gray, {"compression": "tiff_lzw"}),
    "jpeg.tif": ("TIFF", color, {"compression": "jpeg"}),
    "deflate.tif": ("TIFF", deep, {"compression": "tiff_adobe_deflate"}),
    "fax.tif": ("TIFF", gray.convert("1"), {"compression": "group4"}),
    "pages.tif": ("TIFF", color, several),
    "gif": ("GIF", color.quantize(64), {}),
    "animated.gif": ("GIF", color, several),
    "bmp": ("BMP", color, {}),
    "palette.bmp": ("BMP", color.quantize(16), {}),
    "dib": ("DIB", color, {}),
    "jp2": ("JPEG2000", color, {}),
    "deep.jp2": ("JPEG2000", deep, {}),
    "tiled.j2k": ("JPEG2000", color, {"tile_size": (16, 16), "no_jp2": True}),
    "avif": ("AVIF", color, {"exif": exif}),
    "ppm": ("PPM", color, {}),
    "pgm": ("PPM", deep, {}),
    "tga": ("TGA", clear, {"compression": "tga_rle"}),
  }
  made = {}
  for name, (form, image, options) in forms.items():
    file = io.BytesIO()
    if "append_images" in options:  # saving changes their settings
      options = options | {"append_images": [one.copy() for one in options["append_images"]]}
    image.copy().save(file, form, **options)
    made[name] = file.getvalue()
  made["plain.ppm"] = b"P3\n8 8\n255\n" + b" ".join(
    b"%d" % value for value in noise[0].ravel()[:192]
  )
  return made


def truncated(rng: random.Random, data: bytes) -> bytes:
  return data[: rng.randrange(len(data))]


def flipped(rng: random.Random, data: bytes) -> bytes:
  result = bytearray(data)
  reach = len(data) if rng.random() < 0.5 else min(len(data), 200)
  for _ in range(rng.choice((1, 2, 8, 50))):
    result[rng.randrange(reach)] ^= 1 << rng.randrange(8)
  return bytes(result)


def other_fields(rng: random.Random, data: bytes) -> bytes:
  """Replaces integers in the header by extreme ones."""
  result = bytearray(data)
  for _ in range(rng.choice((1, 1, 2, 4))):
    size, order = rng.choice((1, 2, 4)), rng.choice("<>")
    value = (rng.choice(VALUES) % 256**size).to_bytes(size, "little" if order == "<" else "big")
    reach = len(data) if rng.random() < 0.3 else min(len(data), 120)
    at = rng.randrange(max(1, reach - size))
    result[at : at + size] = value
  return bytes(result)


def other_size(rng: random.Random, data: bytes) -> bytes:
  """Replaces all occurrences of the image's width and height by large values."""
  sides = rng.choice(((16_000, 16_000), (60_000, 50_000), (65_535, 4_000), (2**31 - 1, 2)))
  result = data
  for form in ("<H", ">H", "<I", ">I"):
    for side, new in zip((64, 48), sides, strict=True):
      old = struct.pack(form, side)
      wide = struct.pack(form, new % 256 ** len(old))
      result = result[:8] + result[8:300].replace(old, wide) + result[300:]
  if data[:4] == b"\x89PNG":
    result = result[:29] + struct.pack(">I", zlib.crc32(result[12:29])) + result[33:]
  if data[12:16] == b"VP8X":
    result = data[:24] + b"".join((s % 2**24).to_bytes(3, "little") for s in sides) + data[30:]
  return result


def repeated(rng: random.Random, data: bytes) -> bytes:
  """Repeats a part of the data many times."""
  start = rng.randrange(len(data))
  part = data[start : start + rng.choice((4, 64, 1024))]
  return data[:start] + part * rng.choice((2, 50, 2000)) + data[start:]


def spliced(rng: random.Random, data: bytes) -> bytes:
  other = rng.choice(list(base_images().values()))
  at = rng.randrange(1, 60)
  return rng.choice((data[:at] + other[at:], other + data, data + other))


def chunk(kind: bytes, data: bytes) -> bytes:
  return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@functools.cache
def extras() -> list[bytes]:
  """Chunks of a PNG with large texts."""
  text = zlib.compress(bytes(10**7), 9)
  packed = [chunk(kind, b"a\0\0" + text) for kind in (b"zTXt", b"iCCP")]
  return [b"", *packed, chunk(b"tEXt", b"a\0" + b"b" * 10**6) * 80]


def bomb(rng: random.Random, data: bytes) -> bytes:
  """A small PNG file with many pixels or large texts."""
  side = rng.choice((10_000, 16_000, 17_300, 40_000))
  kind, row = rng.choice(((0, side), (2, 3 * side), (6, 4 * side)))
  packer = zlib.compressobj(9)
  rows = side if side * row < 4e8 else 100  # if larger, only the header claims the size
  pixels = b"".join(packer.compress(bytes(row + 1)) for _ in range(rows)) + packer.flush()
  extra = rng.choice(extras())
  header = struct.pack(">IIBBBBB", side, side, 8, kind, 0, 0, 0)
  start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra
  return start + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


KINDS: tuple[tuple[Callable[[random.Random, bytes], bytes], int], ...] = (
  (truncated, 4), (flipped, 6), (other_fields, 6), (other_size, 3), (repeated, 2), (spliced, 1),
  (bomb, 1),
)  # fmt: skip


def mutants(count: int, seed: int, *, bombs: bool = True) -> Iterator[Mutant]:
  """Yields `count` mutants of all variants in turn. Bombs take seconds to make."""
  kinds = KINDS if bombs else [kind for kind in KINDS if kind[0] is not bomb]
  rng = random.Random(seed)
  bases = base_images()
  foreign = list(FOREIGN.items())
  for number in range(count):
    name = list(bases)[number % len(bases)]
    suffix = name.rpartition(".")[2] if rng.random() < 0.9 else rng.choice(("png", "jpg", "tif"))
    if number % 20 == 19:
      kind, data = rng.choice([*foreign, *[("pipe", None)] * 4])
      yield Mutant(f"{number:04}-{kind}.{suffix}", data)
      continue
    (mutate,) = rng.choices([one for one, _ in kinds], [weight for _, weight in kinds])
    data = mutate(rng, bases[name])
    yield Mutant(f"{number:04}-{mutate.__name__}-{name.partition('.')[0]}.{suffix}", data)


def write(folder: Path, found: Mutant) -> Path:
  path = folder / found.name
  if found.data is None:
    os.mkfifo(path)
  else:
    path.write_bytes(found.data)
  return path
