"""Merges what overlapping windows of an image show of the same objects.

Two masks in overlapping windows are of the same object if they agree where both windows look: the
pixels in both masks are more than half of the smaller mask there. Pairs with high scores and high
agreement are joined first. An object that some window shows whole gets the best such mask; an
object that every window cuts gets the union of its parts.

The whole image at once shows objects that are larger than a window, with coarse masks. What the
windows show of such an object are parts of it, unless a window shows an object whole.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from sam3_jax.inputs.tiling import Window
from sam3_jax.outputs.column_runs import ColumnRuns, union

SAME = 0.5  # least agreement of two masks of the same object, exclusive
COVERED = 0.5  # a result is a duplicate if a better one has more of its pixels than this fraction
Rect = tuple[float, float, float, float]


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
  """What one window shows of an object.

  Attributes:
    runs: the mask, over the whole image; not empty.
    score: of the detection.
    box: of the detection, xyxy in pixels of the whole image.
    window: index of the window; None for the whole image at once.
    cut: whether the object may extend beyond the window.
  """

  runs: ColumnRuns
  score: float
  box: Rect
  window: int | None
  cut: bool


def is_cut(runs: ColumnRuns, window: Window, margin: float) -> bool:
  """Whether a mask comes close to a side of its window that is not a side of the image.

  Args:
    runs: the mask, over the whole image.
    window: in which it was found.
    margin: the distance in pixels.
  """
  height, width = runs.size
  x0, y0, x1, y1 = runs.box
  return (
    (window.x0 > 0 and x0 - window.x0 < margin)
    or (window.y0 > 0 and y0 - window.y0 < margin)
    or (window.x1 < width and window.x1 - x1 < margin)
    or (window.y1 < height and window.y1 - y1 < margin)
  )


def merge(parts: Sequence[Part], windows: Sequence[Window], coarse: Sequence[Part]) -> list[Part]:
  """The distinct objects, best first.

  Args:
    parts: of one prompt, from all windows.
    windows: of the image.
    coarse: of the same prompt, from the whole image at once.
  """
  groups = _Groups(parts)
  for _, a, b in sorted(_pairs(parts, windows), reverse=True):
    groups.join(a, b)
  found = [_combine([parts[i] for i in members]) for members in groups.members()]
  for large in sorted(coarse, key=lambda part: -part.score):
    found = _add_coarse(found, large)
  return _distinct(found)


class _Groups:
  """Sets of parts of the same object (union-find).

  Two parts of one window are of the same object only if both are cut, like the legs of a chair
  whose seat is in the next window. Otherwise the window has shown that the objects are different.
  """

  def __init__(self, parts: Sequence[Part]):
    self._parents = list(range(len(parts)))
    self._windows = [{part.window: part.cut} for part in parts]

  def join(self, a: int, b: int) -> None:
    """Unites the sets of two parts, unless a window shows that they are different objects."""
    a, b = sorted((self._root(a), self._root(b)))
    own, other = self._windows[a], self._windows[b]
    if a == b or not all(own[window] and other[window] for window in own.keys() & other.keys()):
      return
    self._parents[b] = a
    self._windows[a] = own | other

  def members(self) -> list[list[int]]:
    """The sets, in the order of their first members."""
    found: dict[int, list[int]] = {}
    for i in range(len(self._parents)):
      found.setdefault(self._root(i), []).append(i)
    return list(found.values())

  def _root(self, i: int) -> int:
    while self._parents[i] != i:
      self._parents[i] = i = self._parents[self._parents[i]]
    return i


def _pairs(parts: Sequence[Part], windows: Sequence[Window]) -> Iterator[tuple[float, int, int]]:
  """Yields pairs of parts of the same object with their rank: agreement times lower score."""
  by_window: dict[int, list[int]] = {}
  for i, part in enumerate(parts):
    if part.window is not None:
      by_window.setdefault(part.window, []).append(i)
  boxes = np.array([part.runs.box for part in parts]).reshape(-1, 4)
  for first, second in _neighbors(sorted(by_window), windows):
    one, two = (np.array(by_window[window]) for window in (first, second))
    low = np.maximum(boxes[one][:, None, :2], boxes[two][None, :, :2])
    high = np.minimum(boxes[one][:, None, 2:], boxes[two][None, :, 2:])
    for i, j in np.argwhere((low < high).all(axis=2)).tolist():
      a, b = int(one[i]), int(two[j])
      agreement = _agreement(parts[a], parts[b], windows[first], windows[second])
      if agreement > SAME:
        yield agreement * min(parts[a].score, parts[b].score), a, b


def _neighbors(chosen: Sequence[int], windows: Sequence[Window]) -> Iterator[tuple[int, int]]:
  """Yields pairs of overlapping windows among the chosen ones."""
  corners = np.array([windows[i] for i in chosen]).reshape(-1, 4)
  for row, i in enumerate(chosen):
    later = corners[row + 1 :]
    touching = (later[:, :2] < corners[row, 2:]).all(axis=1)
    touching &= (corners[row, :2] < later[:, 2:]).all(axis=1)
    for k in np.flatnonzero(touching).tolist():
      yield i, chosen[row + 1 + k]


def _agreement(a: Part, b: Part, first: Window, second: Window) -> float:
  """The fraction of the smaller mask, where both windows look, that is in both masks."""
  both = max(first.x0, second.x0), max(first.y0, second.y0)
  both += min(first.x1, second.x1), min(first.y1, second.y1)
  one, two = a.runs.crop(both), b.runs.crop(both)
  smaller = min(one.area, two.area)
  return one.shared(two) / smaller if smaller else 0.0


def _combine(group: Sequence[Part]) -> Part:
  """One part from the parts of an object."""
  whole = [part for part in group if not part.cut]
  if whole:
    return max(whole, key=lambda part: part.score)
  best = max(group, key=lambda part: part.score)
  if len(group) == 1:
    return best
  boxes = np.array([part.box for part in group])
  box = *boxes[:, :2].min(axis=0).tolist(), *boxes[:, 2:].max(axis=0).tolist()
  return dataclasses.replace(best, runs=union([part.runs for part in group]), box=box)


def _add_coarse(found: list[Part], large: Part) -> list[Part]:
  """Adds an object of the whole image, with its parts, unless the windows show it whole."""
  shared = [part.runs.shared(large.runs) for part in found]
  whole = sum(pixels for pixels, part in zip(shared, found, strict=True) if not part.cut)
  if whole > COVERED * large.runs.area:  # the same object, or a blur of several
    return found
  of_large = [
    part.cut and pixels > SAME * min(part.runs.area, large.runs.area)
    for pixels, part in zip(shared, found, strict=True)
  ]
  parts = [part for part, inside in zip(found, of_large, strict=True) if inside]
  others = [part for part, inside in zip(found, of_large, strict=True) if not inside]
  if not parts:
    return [*others, large]
  fine = union([part.runs for part in parts])
  both = fine.shared(large.runs)
  complete = both > SAME * (fine.area + large.runs.area - both)
  score = max(part.score for part in (large, *parts))
  return [*others, dataclasses.replace(large, runs=fine if complete else large.runs, score=score)]


def _distinct(found: Sequence[Part]) -> list[Part]:
  """Drops results that are mostly covered by a better one: whole before cut, then by score."""
  order = sorted(range(len(found)), key=lambda i: (found[i].cut, -found[i].score))
  boxes = np.array([part.runs.box for part in found]).reshape(-1, 4)
  kept: list[int] = []
  for i in order:
    others = boxes[kept]
    near = (others[:, :2] < boxes[i, 2:]).all(axis=1) & (boxes[i, :2] < others[:, 2:]).all(axis=1)
    limit = COVERED * found[i].runs.area
    if all(found[i].runs.shared(found[kept[k]].runs) <= limit for k in np.flatnonzero(near)):
      kept.append(i)
  return sorted((found[i] for i in kept), key=lambda part: -part.score)
