"""Random images, encoded as files."""

import io
import struct
import zlib

import numpy as np
from PIL import Image


def random_image(height: int, width: int, seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encode(image: Image.Image, form: str = "PNG", **options) -> bytes:
  file = io.BytesIO()
  image.save(file, form, **options)
  return file.getvalue()


def png(size: tuple[int, int], pixels: bytes, depth: int = 8) -> bytes:
  """A PNG of RGB pixels.

  Args:
    size: width and height that the header states.
    pixels: the rows, each after a filter byte; empty for a file with only a header.
    depth: bits per value.
  """
  header = struct.pack(">IIBBBBB", *size, depth, 2, 0, 0, 0)
  packed = zlib.compress(pixels) if pixels else b""
  return b"\x89PNG\r\n\x1a\n" + b"".join(
    struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    for kind, data in ((b"IHDR", header), (b"IDAT", packed), (b"IEND", b""))
  )
