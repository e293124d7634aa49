"""Masks as run lengths, COCO's way: down the columns, the first run outside.

After COCO's `maskApi.c` (`rleFrString`, `rleDecode`), which checks nothing and reads past the end
of what does not add up; `runs` does, and whatever is not our own goes through it first.
"""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, UInt8

Rle = dict[str, Any]  # {"size": [height, width], "counts": str | bytes}: COCO's compressed runs
Segmentation = Any  # polygons, or runs compressed or not
Box = tuple[float, float, float, float]  # x, y, width, height in pixels


def runs(rle: Rle, size: tuple[int, int] | None = None) -> Int[np.ndarray, " n"]:
  """Lengths of a mask's runs down its columns, the first one outside, checked.

  Args:
    rle: the mask.
    size: height and width that it must have; None for any.

  Raises:
    ValueError: it has another size, its counts are damaged, or its runs do not cover its pixels.
  """
  height, width = rle["size"]
  if size is not None and (height, width) != size:
    raise ValueError(
      f"its mask's size is {[height, width]}, but the picture's [height, width] is {[*size]}"
    )
  lengths = _lengths(rle["counts"])
  if (lengths < 0).any() or lengths.sum() != height * width:
    raise ValueError(f"its mask's runs cover {lengths.sum()} pixels, not {width} x {height}")
  return lengths


def decode(rle: Rle) -> UInt8[np.ndarray, "h w"]:
  """A mask of 0 and 1 from its run lengths; raises as `runs`.

  The same as pycocotools' `decode`, which warns with NumPy 2.
  """
  height, width = rle["size"]
  lengths = runs(rle)
  inside = (np.arange(len(lengths)) % 2).astype(np.uint8)
  return np.repeat(inside, lengths).reshape(width, height).T


def encode(mask: Bool[np.ndarray, "h w"]) -> Rle:
  """A mask as compressed runs."""
  from pycocotools import mask as coco  # not at the top: it is slow to import

  api: Any = coco
  counts = api.encode(np.asfortranarray(mask, np.uint8))["counts"]
  return {"size": list(mask.shape), "counts": counts.decode("ascii")}


def bounds(rle: Rle) -> Box:
  """The box around a mask, of zeros if it is empty; raises as `runs`."""
  from pycocotools import mask as coco

  runs(rle)
  api: Any = coco
  x, y, w, h = api.toBbox(rle).tolist()
  return x, y, w, h


def compress(segmentation: Segmentation, height: int, width: int) -> Rle:
  """Any of COCO's three forms of a mask as compressed runs.

  Args:
    segmentation: a list of polygons [x0, y0, x1, y1, ...] in pixels, or {"size", "counts"} with
      counts as a list or a string.

  Raises:
    ValueError: it is none of them.
  """
  from pycocotools import mask as coco

  api: Any = coco
  if isinstance(segmentation, list):
    if not segmentation or not all(_polygon(one) for one in segmentation):
      raise ValueError(
        "its polygons must be lists of at least three points x, y, such as [[x0, y0, x1, y1, ...]]"
      )
    parts = [[float(value) for value in one] for one in segmentation]
    rle = api.merge(api.frPyObjects(parts, height, width))
  elif isinstance(segmentation, dict) and isinstance(segmentation.get("counts"), list):
    counts, (rows, columns) = segmentation["counts"], _size(segmentation)
    if not all(type(count) is int and count >= 0 for count in counts):
      raise ValueError("its run lengths must be whole numbers from 0")
    try:
      rle = api.frPyObjects({"size": [rows, columns], "counts": counts}, rows, columns)
    except OverflowError as error:
      raise ValueError(
        f"its run lengths and its mask's size must be below 2^32 ({error})"
      ) from error
  elif isinstance(segmentation, dict) and isinstance(segmentation.get("counts"), str):
    return {"size": list(_size(segmentation)), "counts": segmentation["counts"]}
  else:
    raise ValueError("it has no segmentation (polygons or run lengths), so no mask")
  return {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}


def finite(values: Iterable[Any]) -> bool:
  """Whether all are numbers that JSON may hold: no bool, no NaN, no infinity."""
  return all(type(value) in (int, float) and math.isfinite(value) for value in values)


def _lengths(counts: str | bytes) -> Int[np.ndarray, " n"]:
  """COCO's `rleFrString`; ValueError if the counts are no such string."""
  data = counts.encode("latin-1", "replace") if isinstance(counts, str) else bytes(counts)
  codes = np.frombuffer(data, np.uint8).astype(np.int64) - 48  # six bits, the first: one more comes
  if not len(codes):
    return codes
  ends = np.flatnonzero(codes < 32)
  if codes.min() < 0 or codes.max() > 63 or not len(ends) or ends[-1] != len(codes) - 1:
    raise ValueError("its mask's run lengths are damaged")
  starts = np.concatenate([[0], ends[:-1] + 1])
  place = np.arange(len(codes)) - np.repeat(starts, ends - starts + 1)
  if place.max() > 6:
    raise ValueError("its mask's run lengths are damaged")
  values = np.add.reduceat((codes & 31) << (5 * place), starts)
  negative = (codes[ends] & 16) > 0
  values[negative] -= np.left_shift(1, 5 * (ends - starts + 1))[negative]
  values[1::2] = np.cumsum(values[1::2])  # from the fourth on: the difference to the last but one
  values[2::2] = np.cumsum(values[2::2])
  return values


def _polygon(one: Any) -> bool:
  return isinstance(one, list) and len(one) >= 6 and len(one) % 2 == 0 and finite(one)


def _size(segmentation: dict[str, Any]) -> tuple[int, int]:
  match segmentation.get("size"):
    case [int(height), int(width)] if height > 0 and width > 0:
      return height, width
  raise ValueError(
    f"its mask's size must be [height, width] in pixels; got {segmentation.get('size')!r:.40}"
  )
