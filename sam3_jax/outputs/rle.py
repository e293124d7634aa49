"""COCO's run-length encoding of masks: runs go down the columns, and the first run is background.

After COCO's `maskApi.c` (`rleFrString`, `rleDecode`), which validates nothing and reads beyond the
end of damaged data. Run lengths from users are validated here first, many masks at a time.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, UInt8

Rle = dict[str, Any]  # {"size": [height, width], "counts": str | bytes}: COCO's compressed runs
Box = tuple[float, float, float, float]  # x, y, width, height in pixels

MAX_PIXELS = 2**31 - 1  # of a mask; COCO's code counts pixels in 32 bits

_DAMAGED = "its mask's run lengths are damaged"


def runs(rle: Rle, size: tuple[int, int] | None = None) -> Int[np.ndarray, " n"]:
  """Decodes the run lengths of a mask and validates them.

  Args:
    rle: the mask.
    size: required height and width; None for any.

  Raises:
    ValueError: the mask has another size, its counts are damaged, or its runs do not cover its
      pixels.
  """
  height, width = rle["size"]
  if size is not None and (height, width) != size:
    raise ValueError(size_fault((height, width), size))
  lengths, _, damaged = _lengths([_encoded(rle["counts"])])
  if damaged[0]:
    raise ValueError(_DAMAGED)
  if (lengths < 0).any() or lengths.sum() != height * width:
    raise ValueError(f"its mask's runs cover {lengths.sum()} pixels, not {width} x {height}")
  return lengths


def decode(rle: Rle) -> UInt8[np.ndarray, "h w"]:
  """Decodes a mask of 0 and 1; raises like `runs`.

  Equal to pycocotools' `decode`, which warns with NumPy 2.
  """
  height, width = rle["size"]
  lengths = runs(rle)
  inside = (np.arange(len(lengths)) % 2).astype(np.uint8)
  return np.repeat(inside, lengths).reshape(width, height).T


def encode(mask: Bool[np.ndarray, "h w"]) -> Rle:
  """Encodes a mask as compressed run lengths."""
  counts = coco_api().encode(np.asfortranarray(mask, np.uint8))["counts"]
  return {"size": list(mask.shape), "counts": counts.decode("ascii")}


def bounds(rle: Rle) -> Box:
  """The bounding box of a mask, zeros if it is empty; raises like `runs`."""
  runs(rle)
  x, y, w, h = coco_api().toBbox(rle).tolist()
  return x, y, w, h


def areas(
  rles: Sequence[Rle], sizes: Sequence[tuple[int, int]]
) -> tuple[Int[np.ndarray, " n"], list[str]]:
  """Areas of masks in pixels.

  pycocotools' `area` accepts at most 255 masks with NumPy 2.

  Args:
    rles: the masks.
    sizes: height and width of each mask's image.

  Returns:
    The areas, and for each mask its fault or "".
  """
  faults = [
    "" if tuple(rle["size"]) == size else size_fault(rle["size"], size)
    for rle, size in zip(rles, sizes, strict=True)
  ]
  lengths, counts, damaged = _lengths([_encoded(rle["counts"]) for rle in rles])
  pixels = np.array([height * width for height, width in sizes], np.int64)
  owner = np.repeat(np.arange(len(rles)), counts)
  wrong = (lengths < 0) | (lengths > pixels[owner])
  number = np.arange(len(lengths)) - np.repeat(np.cumsum(counts) - counts, counts)
  inside = np.bincount(owner, lengths * (number % 2), minlength=len(rles)).astype(np.int64)
  covered = np.bincount(owner, lengths, minlength=len(rles)).astype(np.int64)
  unequal = covered != pixels
  unequal[owner[wrong]] = True
  for i in np.flatnonzero(damaged | unequal).tolist():
    height, width = sizes[i]
    wrong_sum = f"its mask's runs cover {covered[i]} pixels, not {width} x {height}"
    faults[i] = faults[i] or (_DAMAGED if damaged[i] else wrong_sum)
  return inside, faults


def coco_api() -> Any:
  from pycocotools import mask  # not at the top: it is slow to import

  return mask


def _encoded(counts: str | bytes) -> bytes:
  return counts.encode("latin-1", "replace") if isinstance(counts, str) else bytes(counts)


def _lengths(
  strings: Sequence[bytes],
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " s"], Bool[np.ndarray, " s"]]:
  """Decodes many strings of compressed run lengths, like COCO's `rleFrString`.

  Returns:
    The concatenated runs of all strings, the number of runs of each string, and whether each string
    is damaged; damaged strings have no runs.
  """
  sizes = np.array([len(one) for one in strings], np.int64)
  damaged = np.zeros(len(strings), bool)
  counts = np.zeros(len(strings), np.int64)
  codes = np.frombuffer(b"".join(strings), np.uint8).astype(np.int64) - 48
  owner = np.repeat(np.arange(len(strings)), sizes)
  last = codes < 32  # a character has six bits; the highest says that another character follows
  stops = np.cumsum(sizes)[sizes > 0] - 1
  damaged[owner[(codes < 0) | (codes > 63)]] = True
  damaged[owner[stops[~last[stops]]]] = True
  if damaged.any():
    kept = np.flatnonzero(~damaged)
    values, counts[kept], more = _lengths([strings[i] for i in kept.tolist()])
    damaged[kept] = more
    return values, counts, damaged
  if not len(codes):
    return codes, counts, damaged
  ends = np.flatnonzero(last)
  starts = np.concatenate([[0], ends[:-1] + 1])
  position = np.arange(len(codes)) - np.repeat(starts, ends - starts + 1)
  if position.max() > 6:
    damaged[owner[position > 6]] = True
    kept = np.flatnonzero(~damaged)
    values, counts[kept], _ = _lengths([strings[i] for i in kept.tolist()])
    return values, counts, damaged
  values = np.add.reduceat((codes & 31) << (5 * position), starts)
  negative = (codes[ends] & 16) > 0
  values[negative] -= np.left_shift(1, 5 * (ends - starts + 1))[negative]
  owner = owner[ends]
  counts += np.bincount(owner, minlength=len(strings))
  number = np.arange(len(values)) - np.repeat(np.cumsum(counts) - counts, counts)
  for chain in (number % 2 == 1, (number % 2 == 0) & (number > 0)):
    # From the fourth run on, a value is the difference to the run before the previous one.
    values[chain] = _cumulated(values[chain], owner[chain])
  return values, counts, damaged


def _cumulated(values: np.ndarray, owner: np.ndarray) -> np.ndarray:
  """Cumulative sums within each owner; values are grouped by owner."""

  if not len(values):
    return values
  sums = np.cumsum(values)
  firsts = np.flatnonzero(np.diff(owner, prepend=-1))
  before = sums[firsts] - values[firsts]
  return sums - np.repeat(before, np.diff(firsts, append=len(values)))


def size_fault(own: Iterable[int], size: Iterable[int]) -> str:
  return f"its mask's size is {[*own]}, but the image's [height, width] is {[*size]}"
