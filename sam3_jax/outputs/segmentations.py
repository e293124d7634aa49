"""COCO segmentations: polygons or run lengths, validated and converted to compressed run lengths.

After COCO's `maskApi.c` (`rleFrPoly`), which would draw a polygon of any extent into memory. Many
masks are processed at a time.
"""

from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from sam3_jax.outputs.rle import MAX_PIXELS, Rle, areas, coco_api, size_fault

Segmentation = Any  # polygons, or run lengths, compressed or not

# `rleFrPoly` takes time and memory for each fifth of a pixel along a polygon, even outside the
# image. A vertex may be outside by the width or height of the image; annotators round by a pixel.
MAX_OUTLINE = 4e6  # pixels along a polygon: less than 500 MB and a second
MAX_COORDINATE = 1e8  # pixels; five times as much still fits into an int of C
ROUNDING = 1.0  # pixels outside the image that are attributed to rounding

_NUMBERS = {int, float}
_BAD_POLYGONS = (
  "its polygons must be lists of at least three points x, y, such as [[x0, y0, x1, y1, ...]]"
)


class Compressed(NamedTuple):
  """Validated masks as compressed run lengths.

  Attributes:
    rles: the masks; None for an invalid mask.
    faults: what is wrong with each mask, or "".
    bounds: bounding box x, y, width, height of each mask; zeros if it is empty.
    extents: bounding box of the vertices of polygons, which may exceed the image; otherwise equal
      to `bounds`.
    outside: whether a vertex is more than `ROUNDING` pixels outside the image, where the mask is
      clipped.
  """

  rles: list[Rle | None]
  faults: list[str]
  bounds: Float[np.ndarray, "n 4"]
  extents: Float[np.ndarray, "n 4"]
  outside: Bool[np.ndarray, " n"]

  @property
  def empty(self) -> Bool[np.ndarray, " n"]:
    """Which masks have no pixel or are invalid."""
    return self.bounds[:, 2] == 0


def compress(segmentation: Segmentation, height: int, width: int) -> Rle:
  """Converts a mask in any of COCO's three forms to compressed run lengths.

  Args:
    segmentation: a list of polygons [x0, y0, x1, y1, ...] in pixels, or {"size", "counts"} with
      counts as a list or a string.
    height, width: size of the image in pixels.

  Raises:
    ValueError: the segmentation is invalid or has another size.
  """
  found = compress_all([segmentation], [(height, width)])
  if found.rles[0] is None:
    raise ValueError(found.faults[0])
  return found.rles[0]


def compress_all(
  segmentations: Sequence[Segmentation], sizes: Sequence[tuple[int, int]]
) -> Compressed:
  """Converts many masks like `compress`, but returns their faults instead of raising.

  Args:
    segmentations: as for `compress`; a polygon may also be an `array.array` of doubles.
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
    found.bounds[good] = coco_api().toBbox(rles)
  found.extents[others] = found.bounds[others]
  return found


def pack(polygon: Any) -> Any:
  """Converts a polygon to an array of doubles, a quarter of the memory of a list.

  Returns anything that is not a list of numbers unchanged.
  """
  if type(polygon) is not list or not _NUMBERS.issuperset(map(type, polygon)):
    return polygon
  try:
    return array("d", polygon)
  except OverflowError:  # an integer over 1e308
    return polygon


def _fill_runs(
  found: Compressed,
  chosen: Sequence[int],
  segmentations: Sequence[Segmentation],
  sizes: Sequence[tuple[int, int]],
) -> None:
  """Converts the masks given as run lengths."""
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
  own = _valid_size(segmentation)
  if isinstance(counts, str):
    return {"size": [*own], "counts": counts}
  if not all(type(count) is int and count >= 0 for count in counts):
    raise ValueError("its run lengths must be whole numbers from 0")
  if own != size:
    raise ValueError(size_fault(own, size))
  if sum(counts) != own[0] * own[1]:
    raise ValueError(f"its mask's runs cover {sum(counts)} pixels, not {own[1]} x {own[0]}")
  rle = coco_api().frPyObjects({"size": [*own], "counts": counts}, *own)
  return {"size": [*own], "counts": rle["counts"].decode("ascii")}


def _fill_polygons(
  found: Compressed,
  chosen: Sequence[int],
  segmentations: Sequence[Segmentation],
  sizes: Sequence[tuple[int, int]],
) -> None:
  """Converts the masks given as polygons; measures all of them before drawing any."""
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
  """Records the faults of polygons; returns their bounding boxes x0, y0, x1, y1."""
  points = np.frombuffer(b"".join(parts)).reshape(-1, 2)
  counts = np.array([len(one) // 2 for one in parts])
  firsts = np.cumsum(counts) - counts
  low, high = np.minimum.reduceat(points, firsts), np.maximum.reduceat(points, firsts)
  extent = size[:, ::-1].astype(np.float64)
  with np.errstate(invalid="ignore", over="ignore"):  # from invalid vertices
    following = np.empty_like(points)
    following[:-1] = points[1:]
    following[firsts + counts - 1] = points[firsts]
    outline = np.add.reduceat(np.abs(following - points).max(axis=1), firsts)
  reach = np.minimum(extent, MAX_COORDINATE / 2)
  most = np.minimum(extent + reach, MAX_COORDINATE)
  near = ((low >= -reach) & (high <= most)).all(axis=1)  # False for NaN
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
  """Draws the valid polygons; merges those of the same mask."""

  by_size: dict[tuple[int, int], list[int]] = {}
  for k, i in enumerate(owners):
    if not found.faults[i]:
      by_size.setdefault(sizes[i], []).append(k)
  api = coco_api()
  for (height, width), several in by_size.items():
    drawn: dict[int, list[Rle]] = {}
    rles = api.frPyObjects([parts[k] for k in several], height, width)
    for k, rle in zip(several, rles, strict=True):
      drawn.setdefault(owners[k], []).append(rle)
    for i, own in drawn.items():
      rle = own[0] if len(own) == 1 else api.merge(own)
      found.rles[i] = {"size": [height, width], "counts": rle["counts"].decode("ascii")}


def _valid_size(segmentation: dict[str, Any]) -> tuple[int, int]:
  match segmentation.get("size"):
    case [height, width] if type(height) is type(width) is int and min(height, width) > 0:
      if height * width > MAX_PIXELS:
        raise ValueError(f"its mask has {height} x {width} pixels, more than {MAX_PIXELS:,}")
      return height, width
  raise ValueError(
    f"its mask's size must be [height, width] in pixels; got {segmentation.get('size')!r:.40}"
  )
