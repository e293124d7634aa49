"""Run-length encoding and segmentations, against pycocotools and hand-made masks."""

import numpy as np
import pytest
from pycocotools import mask as coco

from sam3_jax.outputs.rle import bounds, decode, encode, runs
from sam3_jax.outputs.segmentations import compress

# pycocotools' own, with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def masks():
  """Masks: empty, full, one pixel, single rows and columns, noise, blobs."""
  rng = np.random.default_rng(0)
  yield np.zeros((1, 1), np.uint8)
  yield np.ones((1, 1), np.uint8)
  yield np.zeros((5, 7), np.uint8)
  yield np.ones((300, 400), np.uint8)  # a run length of four characters
  for corner in ((0, 0), (4, 6), (2, 3)):
    yield np.eye(35, dtype=np.uint8)[corner[0] * 7 + corner[1]].reshape(5, 7)
  for height, width in ((1, 40), (40, 1), (17, 23), (120, 90)):
    for density in (0.02, 0.5, 0.9):
      yield (rng.random((height, width)) < density).astype(np.uint8)
  y, x = np.mgrid[:200, :150]
  yield ((x - 60) ** 2 + (y - 90) ** 2 < 50**2).astype(np.uint8)


@pytest.mark.parametrize("mask", tuple(masks()), ids=lambda mask: "x".join(map(str, mask.shape)))
def test_runs_and_masks_equal_pycocotools(mask):
  rle = coco.encode(np.asfortranarray(mask))
  text = {"size": list(mask.shape), "counts": rle["counts"].decode()}
  for one in (rle, text):
    lengths = runs(one)
    assert lengths.sum() == mask.size
    assert lengths[1::2].sum() == coco.area(rle) == mask.sum()
    assert (decode(one) == mask).all()
    assert (decode(one) == coco.decode(rle)).all()
    assert decode(one).dtype == np.uint8


@pytest.mark.parametrize("mask", tuple(masks()), ids=lambda mask: "x".join(map(str, mask.shape)))
def test_encode_and_bounds(mask):
  rle = encode(mask.astype(bool))
  assert rle["size"] == list(mask.shape)
  assert (decode(rle) == mask).all()
  rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
  want = (0, 0, 0, 0)
  if len(rows):
    want = (columns[0], rows[0], np.ptp(columns) + 1, np.ptp(rows) + 1)
  assert bounds(rle) == want
  assert all(type(value) is float for value in bounds(rle))


@pytest.mark.parametrize("mask", tuple(masks()), ids=lambda mask: "x".join(map(str, mask.shape)))
def test_uncompressed_run_lengths(mask):
  flat = mask.T.ravel()
  change = np.flatnonzero(np.diff(flat)) + 1
  lengths = np.diff(change, prepend=0, append=flat.size).tolist()
  lengths = [0, *lengths] if flat[0] else lengths
  rle = compress({"size": list(mask.shape), "counts": lengths}, *mask.shape)
  assert (decode(rle) == mask).all()
  assert compress(rle, *mask.shape) == rle
  assert rle["counts"] == coco.encode(np.asfortranarray(mask))["counts"].decode()


def test_polygons_are_merged():
  """Two squares, the second with float coordinates."""
  rle = compress([[2, 1, 6, 1, 6, 5, 2, 5], [8.0, 2.0, 10.0, 2.0, 10.0, 4.0, 8.0, 4.0]], 8, 12)
  want = np.zeros((8, 12), np.uint8)
  want[1:5, 2:6] = 1
  want[2:4, 8:10] = 1
  assert rle["size"] == [8, 12]
  assert (decode(rle) == want).all()


@pytest.mark.parametrize(
  ("segmentation", "message"),
  [
    (None, "no segmentation"),
    ({}, "no segmentation"),
    ({"size": [4, 4], "counts": 3}, "no segmentation"),
    ([], "at least three points"),
    ([[0, 0, 1, 1]], "at least three points"),
    ([[0, 0, 1, 1, 2, 2, 3]], "at least three points"),
    ([[0, 0, 1, 1, 2, float("nan")]], "at least three points"),
    ([["0", 0, 1, 1, 2, 2]], "at least three points"),
    ({"size": [4, 4], "counts": [3, -1, 14]}, "whole numbers from 0"),
    ({"size": [4, 4], "counts": [3.5, 12.5]}, "whole numbers from 0"),
    ({"size": [4, 4], "counts": [2**32]}, "cover 4294967296 pixels, not 4 x 4"),
    ({"size": [4, 2**70], "counts": [16]}, "more than 2,147,483,647"),
    ({"size": [5, 4], "counts": [20]}, r"size is \[5, 4\]"),
    ({"size": [4], "counts": "0"}, r"must be \[height, width\]"),
    ({"counts": "0"}, r"must be \[height, width\]"),
    ({"size": [0, 4], "counts": "0"}, r"must be \[height, width\]"),
  ],
  ids=str,
)
def test_invalid_segmentations(segmentation, message):
  with pytest.raises(ValueError, match=message):
    compress(segmentation, 4, 4)


@pytest.mark.parametrize("counts", ["é", "P", "!", "0P", "PPPPPPPPP0", "o" * 30], ids=repr)
def test_damaged_strings(counts):
  for function in (runs, decode, bounds):
    with pytest.raises(ValueError, match="damaged"):
      function({"size": [4, 4], "counts": counts})


@pytest.mark.parametrize("counts", ["", "0", "00", "11", "o" + "0" * 5, b"5"], ids=repr)
def test_runs_of_another_number_of_pixels(counts):
  for function in (runs, decode, bounds):
    with pytest.raises(ValueError, match="pixels, not 4 x 4"):
      function({"size": [4, 4], "counts": counts})


def test_masks_of_another_size():
  rle = encode(np.ones((2, 3), bool))
  assert runs(rle, (2, 3)).tolist() == [0, 6]
  with pytest.raises(ValueError, match=r"size is \[2, 3\], but .* is \[3, 2\]"):
    runs(rle, (3, 2))
