"""The resize, bit by bit equal to torchvision's, and its invariances."""

import hashlib
import json
import math
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from image_files import random_image
from PIL import Image

from sam3_jax.inputs.preprocess import resize

GOLDEN = Path(__file__).parent / "goldens" / "resize.json"
RESIZED = json.loads(GOLDEN.read_text())
SEEDED = [case for case in RESIZED if case["source"].startswith("numpy")]
PHOTOS = [case for case in RESIZED if case["source"].startswith("skimage")]


def sha256(array: np.ndarray) -> str:
  return hashlib.sha256(np.ascontiguousarray(array)).hexdigest()


def reference_resize(image: np.ndarray, size: int, precision: int | None = None) -> np.ndarray:
  """PyTorch's uint8 resize, one weight and pixel at a time, in Python's integers."""

  def shrink(rows: list) -> list:  # along the first axis of a list of rows of integers
    source, result = len(rows), []
    scale = source / size
    support = max(scale, 1.0)
    windows = []
    for i in range(size):
      center = scale * (i + 0.5)
      window = range(max(int(center - support + 0.5), 0), min(int(center + support + 0.5), source))
      weights = [max(0.0, 1 - abs((j - center + 0.5) / support)) for j in window]
      windows.append((window, [weight / math.fsum(weights) for weight in weights]))
    largest = max(max(weights) for _, weights in windows)
    bits = precision
    if bits is None:
      bits = max(p for p in range(23) if p == 0 or int(largest * 2**p + 0.5) < 2**15)
    for window, weights in windows:
      whole = [int(weight * 2**bits + 0.5) for weight in weights]
      columns = zip(*(rows[j] for j in window), strict=True)
      sums = (sum(w * v for w, v in zip(whole, column, strict=True)) for column in columns)
      result.append([min(max((s + 2 ** (bits - 1)) >> bits, 0), 255) for s in sums])
    return result

  height, width, _ = image.shape
  across = shrink(image.transpose(1, 0, 2).reshape(width, -1).tolist())
  middle = np.array(across).reshape(size, height, 3).transpose(1, 0, 2)
  down = shrink(middle.reshape(height, -1).tolist())
  return np.array(down, np.uint8).reshape(size, size, 3)


@pytest.mark.parametrize("case", SEEDED, ids=lambda case: f"{case['shape'][:2]}-{case['size']}")
def test_resize_is_bit_equal_to_torchvision(case):
  height, width, _ = case["shape"]
  image = random_image(height, width, seed=height * 10000 + width)
  assert sha256(image) == case["source_sha256"]
  assert sha256(resize(image, case["size"])) == case["sha256"]


@pytest.mark.parametrize("case", PHOTOS, ids=lambda case: f"{case['source'][:25]}-{case['size']}")
def test_resize_of_photographs(case):
  data = pytest.importorskip("skimage.data")
  image = getattr(data, case["source"].split("(")[0].split(".")[-1])()
  assert sha256(image) == case["source_sha256"], "scikit-image ships another photograph"
  assert sha256(resize(image, case["size"])) == case["sha256"]


@pytest.mark.parametrize("size", [1, 7, 8, 9, 30])
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (50, 1), (2, 3), (8, 8), (31, 29), (40, 200)])
def test_resize_equals_the_reference(shape, size):
  image = random_image(*shape)
  np.testing.assert_array_equal(resize(image, size), reference_resize(image, size))


@pytest.mark.parametrize("shape", [(1, 1), (31, 29), (40, 90)])
def test_reference_with_22_bits_equals_pillow(shape):
  image = random_image(*shape)
  pillow = Image.fromarray(image).resize((17, 17), Image.Resampling.BILINEAR)
  np.testing.assert_array_equal(reference_resize(image, 17, precision=22), np.asarray(pillow))


def test_resize_to_the_same_size_is_the_identity():
  image = random_image(33, 33)
  np.testing.assert_array_equal(resize(image, 33), image)


@pytest.mark.parametrize("value", [0, 1, 254, 255])
@pytest.mark.parametrize("shape", [(3, 500), (700, 2), (64, 64)])
def test_resize_preserves_constant_images(shape, value):
  image = np.full((*shape, 3), value, np.uint8)
  assert (resize(image, 21) == value).all()


def test_resize_accepts_views():
  image = random_image(60, 40)
  for view in (image.transpose(1, 0, 2), image[::-2, 3:], image[..., ::-1]):
    np.testing.assert_array_equal(resize(view, 24), resize(view.copy(), 24))


def test_resize_is_equivariant_to_channel_order():
  image = random_image(60, 40)
  np.testing.assert_array_equal(resize(image, 24)[..., ::-1], resize(image[..., ::-1], 24))


@pytest.mark.slow
def test_resize_memory_for_300_megapixels():
  row = random_image(1, 20_000)
  image = np.broadcast_to(row, (15_000, 20_000, 3))
  tracemalloc.start()
  resized = resize(image, 168)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 100e6  # measured 12 MB, and 44 MB for a size of 1008
  assert (resized == resized[0]).all()


@pytest.mark.parametrize(
  "image",
  [
    np.zeros((4, 4), np.uint8),
    np.zeros((4, 4, 4), np.uint8),
    np.zeros((0, 4, 3), np.uint8),
    np.zeros((4, 4, 3), np.float32),
  ],
  ids=lambda image: f"{image.dtype}{image.shape}",
)
def test_resize_rejects_invalid_images(image):
  with pytest.raises(ValueError, match=r"resize takes uint8 \[h, w, 3\], not"):
    resize(image, 8)


def test_resize_rejects_size_0():
  with pytest.raises(ValueError, match="size is 0"):
    resize(random_image(4, 4), 0)
