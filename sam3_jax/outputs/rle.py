"""Masks as run lengths, COCO's way: down the columns, the first run outside.

After COCO's `maskApi.c` (`rleFrString`, `rleDecode`, `rleFrPoly`), which checks nothing: it reads
past the end of what does not add up, and draws a polygon of any extent into memory. Whatever is not
our own is checked here before that code sees it, many masks at a time.
"""

import math
from array import array
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

Rle = dict[str, Any]  # {"size": [height, width], "counts": str | bytes}: COCO's compressed runs
Segmentation = Any  # polygons, or runs compressed or not
Box = tuple[float, float, float, float]  # x, y, width, height in pixels

MAX_PIXELS = 2**31 - 1  # of a mask: COCO's code counts them in 32 bits
# `rleFrPoly` takes time and memory for each fifth of a pixel along a polygon, also outside the
# image. A vertex may be one width or height of the image outside; real files round by a pixel.
MAX_OUTLINE = 4e6  # pixels along a polygon: below 500 MB, a second
MAX_COORDINATE = 1e8  # pixels: five times as much still is an int of C
ROUNDING = 1.0  # pixels outside the image up to which a vertex is only rounded

_BAD_POLYGONS = (
  "its polygons must be lists of at least three points x, y, such as [[x0, y0, x1, y1, ...]]"
)
_DAMAGED = "its mask's run lengths are damaged"


class Compressed(NamedTuple):
  """Masks as compressed runs, checked.

  Attributes:
    rles: the masks; None where there is a fault.
    faults: what is wrong, or "".
    bounds: x, y, width, height of each mask, of zeros if it is empty.
    extents: likewise of the vertices of polygons, in and outside the image; else the bounds.
    outside: a vertex is more than `ROUNDING` outside the image: the mask is clipped there.
  """

  rles: list[Rle | None]
  faults: list[str]
  bounds: Float[np.ndarray, "n 4"]
  extents: Float[np.ndarray, "n 4"]
  outside: Bool[np.ndarray, " n"]

  @property
  def empty(self) -> Bool[np.ndarray, " n"]:
    """Which masks have no pixel, or a fault."""
    return self.bounds[:, 2] == 0


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
    raise ValueError(_other_size((height, width), size))
  lengths, _, damaged = _lengths([_encoded(rle["counts"])])
  if damaged[0]:
    raise ValueError(_DAMAGED)
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
  counts = _api().encode(np.asfortranarray(mask, np.uint8))["counts"]
  return {"size": list(mask.shape), "counts": counts.decode("ascii")}


def bounds(rle: Rle) -> Box:
  """The box around a mask, of zeros if it is empty; raises as `runs`."""
  runs(rle)
  x, y, w, h = _api().toBbox(rle).tolist()
  return x, y, w, h


def compress(segmentation: Segmentation, height: int, width: int) -> Rle:
  """Any of COCO's three forms of a mask as compressed runs.

  Args:
    segmentation: a list of polygons [x0, y0, x1, y1, ...] in pixels, or {"size", "counts"} with
      counts as a list or a string.
    height, width: of the image, in pixels.

  Raises:
    ValueError: it is none of them, or is not a mask of such an image.
  """
  found = compress_all([segmentation], [(height, width)])
  if found.rles[0] is None:
    raise ValueError(found.faults[0])
  return found.rles[0]


def compress_all(
  segmentations: Sequence[Segmentation], sizes: Sequence[tuple[int, int]]
) -> Compressed:
  """`compress` of many masks at a time, with the fault of each in place of an exception.

  Args:
    segmentations: as of `compress`; a polygon may also be an `array.array` of doubles.
    sizes: height and width of each mask's image.
  """
  count = len(segmentations)
  found = Compressed(
    rles=[None] * count,
    faults=[""] * count,
    bounds=np.zeros((count, 4)),
    extents=np.zeros((count, 4)),
    outside=np.zeros(count, bool),
  )
  polygons = [i for i, one in enumerate(segmentations) if isinstance(one, list)]
  _fill_polygons(found, polygons, segmentations, sizes)
  others = sorted(set(range(count)) - set(polygons))
  _fill_runs(found, others, segmentations, sizes)
  good = [i for i, rle in enumerate(found.rles) if rle is not None]
  if good:
    rles = [rle for rle in found.rles if rle is not None]
    found.bounds[good] = _api().toBbox(rles)
  found.extents[others] = found.bounds[others]
  return found


def areas(
  rles: Sequence[Rle], sizes: Sequence[tuple[int, int]]
) -> tuple[Int[np.ndarray, " n"], list[str]]:
  """Pixels of masks, and the fault of each or ""; sizes are height and width of their images.

  pycocotools' `area` takes no more than 255 masks with NumPy 2.
  """
  faults = [
    "" if tuple(rle["size"]) == size else _other_size(rle["size"], size)
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
    words = f"its mask's runs cover {covered[i]} pixels, not {width} x {height}"
    faults[i] = faults[i] or (_DAMAGED if damaged[i] else words)
  return inside, faults


def finite(values: Iterable[Any]) -> bool:
  """Whether all are numbers that JSON may hold and float64 too: no bool, no NaN, no infinity."""
  try:
    return all(type(value) in (int, float) and math.isfinite(value) for value in values)
  except OverflowError:  # a whole number over 1e308
    return False


def pack(polygon: Any) -> Any:
  """A polygon as an array of doubles, which takes a quarter of a list's memory; anything that is no
  list of numbers stays what it is."""
  if type(polygon) is not list or not _NUMBERS.issuperset(map(type, polygon)):
    return polygon
  try:
    return array("d", polygon)
  except OverflowError:  # a whole number over 1e308
    return polygon


_NUMBERS = {int, float}


def _api() -> Any:
  from pycocotools import mask  # not at the top: it is slow to import

  return mask


def _fill_runs(
  found: Compressed,
  chosen: Sequence[int],
  segmentations: Sequence[Segmentation],
  sizes: Sequence[tuple[int, int]],
) -> None:
  """Masks that are runs already."""
  rles: dict[int, Rle] = {}
  for i in chosen:
    try:
      rles[i] = _from_runs(segmentations[i], sizes[i])
    except ValueError as error:
      found.faults[i] = str(error)
  _, faults = areas(list(rles.values()), [sizes[i] for i in rles])
  for (i, rle), fault in zip(rles.items(), faults, strict=True):
    found.faults[i] = fault
    found.rles[i] = None if fault else rle


def _from_runs(segmentation: Segmentation, size: tuple[int, int]) -> Rle:
  counts = segmentation.get("counts") if isinstance(segmentation, dict) else None
  if not isinstance(counts, list | str):
    raise ValueError("it has no segmentation (polygons or run lengths), so no mask")
  own = _size(segmentation)
  if isinstance(counts, str):
    return {"size": [*own], "counts": counts}
  if not all(type(count) is int and count >= 0 for count in counts):
    raise ValueError("its run lengths must be whole numbers from 0")
  if own != size:
    raise ValueError(_other_size(own, size))
  if sum(counts) != own[0] * own[1]:
    raise ValueError(f"its mask's runs cover {sum(counts)} pixels, not {own[1]} x {own[0]}")
  rle = _api().frPyObjects({"size": [*own], "counts": counts}, *own)
  return {"size": [*own], "counts": rle["counts"].decode("ascii")}


def _fill_polygons(
  found: Compressed,
  chosen: Sequence[int],
  segmentations: Sequence[Segmentation],
  sizes: Sequence[tuple[int, int]],
) -> None:
  """Masks that are polygons: all are measured before any is drawn."""
  parts: list[array] = []
  owners: list[int] = []
  for i in chosen:
    packed = [one if type(one) is array else pack(one) for one in segmentations[i]]
    if packed and all(type(one) is array and len(one) >= 6 and len(one) % 2 == 0 for one in packed):
      parts += packed
      owners += [i] * len(packed)
    else:
      found.faults[i] = _BAD_POLYGONS
  if not parts:
    return
  owner = np.array(owners)
  extents = _measure(found, parts, owner, np.array(sizes)[owner])
  firsts = np.flatnonzero(np.diff(owner, prepend=-1))
  low = np.minimum.reduceat(extents[:, :2], firsts)
  high = np.maximum.reduceat(extents[:, 2:], firsts)
  found.extents[owner[firsts]] = np.concatenate([low, high - low], axis=1)
  _draw(found, parts, owners, sizes)


def _measure(
  found: Compressed,
  parts: Sequence[array],
  owner: Int[np.ndarray, " k"],
  size: Int[np.ndarray, "k 2"],
) -> Float[np.ndarray, "k 4"]:
  """Notes the faults of polygons; returns their corners x0, y0, x1, y1."""
  points = np.frombuffer(b"".join(parts)).reshape(-1, 2)
  counts = np.array([len(one) // 2 for one in parts])
  firsts = np.cumsum(counts) - counts
  low, high = np.minimum.reduceat(points, firsts), np.maximum.reduceat(points, firsts)
  extent = size[:, ::-1].astype(np.float64)
  with np.errstate(invalid="ignore", over="ignore"):  # of vertices that are refused
    following = np.empty_like(points)
    following[:-1] = points[1:]
    following[firsts + counts - 1] = points[firsts]
    outline = np.add.reduceat(np.abs(following - points).max(axis=1), firsts)
  reach = np.minimum(extent, MAX_COORDINATE / 2)
  most = np.minimum(extent + reach, MAX_COORDINATE)
  near = ((low >= -reach) & (high <= most)).all(axis=1)  # false of NaN
  long = outline > MAX_OUTLINE
  for k in np.flatnonzero(~near | long):
    own = points[firsts[k] : firsts[k] + counts[k]]
    found.faults[owner[k]] = found.faults[owner[k]] or _polygon_fault(
      own, -reach[k], most[k], extent[k]
    )
  found.outside[owner[((low < -ROUNDING) | (high > extent + ROUNDING)).any(axis=1)]] = True
  return np.concatenate([low, high], axis=1)


def _polygon_fault(
  points: np.ndarray, least: np.ndarray, most: np.ndarray, extent: np.ndarray
) -> str:
  if not np.isfinite(points).all():
    return _BAD_POLYGONS
  far = ((points < least) | (points > most)).any(axis=1)
  width, height = extent.astype(int)
  if not far.any():
    return f"its polygon is over {MAX_OUTLINE:,.0f} pixels long, in an image of {width} x {height}"
  x, y = points[far.argmax()]
  return f"its polygon has a vertex at {x:g}, {y:g}, far outside the {width} x {height} image"


def _draw(
  found: Compressed,
  parts: Sequence[array],
  owners: Sequence[int],
  sizes: Sequence[tuple[int, int]],
) -> None:
  """Runs of polygons without fault; those of one mask are joined."""
  by_size: dict[tuple[int, int], list[int]] = {}
  for k, i in enumerate(owners):
    if not found.faults[i]:
      by_size.setdefault(sizes[i], []).append(k)
  api = _api()
  for (height, width), several in by_size.items():
    drawn: dict[int, list[Rle]] = {}
    rles = api.frPyObjects([parts[k] for k in several], height, width)
    for k, rle in zip(several, rles, strict=True):
      drawn.setdefault(owners[k], []).append(rle)
    for i, own in drawn.items():
      rle = own[0] if len(own) == 1 else api.merge(own)
      found.rles[i] = {"size": [height, width], "counts": rle["counts"].decode("ascii")}


def _encoded(counts: str | bytes) -> bytes:
  return counts.encode("latin-1", "replace") if isinstance(counts, str) else bytes(counts)


def _lengths(
  strings: Sequence[bytes],
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " s"], Bool[np.ndarray, " s"]]:
  """COCO's `rleFrString` of many strings.

  Returns:
    The runs of all strings one after another, how many each has, and which strings are damaged:
    those have none.
  """
  sizes = np.array([len(one) for one in strings], np.int64)
  damaged = np.zeros(len(strings), bool)
  counts = np.zeros(len(strings), np.int64)
  codes = np.frombuffer(b"".join(strings), np.uint8).astype(np.int64) - 48
  owner = np.repeat(np.arange(len(strings)), sizes)
  last = codes < 32  # six bits a character, the first says that another one follows
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
  place = np.arange(len(codes)) - np.repeat(starts, ends - starts + 1)
  if place.max() > 6:
    damaged[owner[place > 6]] = True
    kept = np.flatnonzero(~damaged)
    values, counts[kept], _ = _lengths([strings[i] for i in kept.tolist()])
    return values, counts, damaged
  values = np.add.reduceat((codes & 31) << (5 * place), starts)
  negative = (codes[ends] & 16) > 0
  values[negative] -= np.left_shift(1, 5 * (ends - starts + 1))[negative]
  owner = owner[ends]
  counts += np.bincount(owner, minlength=len(strings))
  number = np.arange(len(values)) - np.repeat(np.cumsum(counts) - counts, counts)
  for chain in (number % 2 == 1, (number % 2 == 0) & (number > 0)):
    # From the fourth run on a value is the difference to the last but one.
    values[chain] = _cumulated(values[chain], owner[chain])
  return values, counts, damaged


def _cumulated(values: np.ndarray, owner: np.ndarray) -> np.ndarray:
  """Sums up to each value within its owner's, which follow each other."""
  if not len(values):
    return values
  sums = np.cumsum(values)
  firsts = np.flatnonzero(np.diff(owner, prepend=-1))
  before = sums[firsts] - values[firsts]
  return sums - np.repeat(before, np.diff(firsts, append=len(values)))


def _size(segmentation: dict[str, Any]) -> tuple[int, int]:
  match segmentation.get("size"):
    case [height, width] if type(height) is type(width) is int and min(height, width) > 0:
      if height * width > MAX_PIXELS:
        raise ValueError(f"its mask has {height} x {width} pixels, more than {MAX_PIXELS:,}")
      return height, width
  raise ValueError(
    f"its mask's size must be [height, width] in pixels; got {segmentation.get('size')!r:.40}"
  )


def _other_size(own: Iterable[int], size: Iterable[int]) -> str:
  return f"its mask's size is {[*own]}, but the image's [height, width] is {[*size]}"
