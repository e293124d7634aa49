"""The parts of SAM 3, and which of them a file has.

A part is what training programs leave out or replace as a whole: Meta's recipes without masks save
no segmentation head, and most save no tracker.
"""

import functools
from collections.abc import Iterable

from .rules import Table
from .wrappers import TABLES, canonical_names, normal, separator_of

# By the top of the place in our tree. A model without those of OPTIONAL is complete.
WORDS = {
  "trunk": "the image encoder",
  "neck": "the image encoder's neck",
  "text": "the text encoder",
  "geometry": "the geometry encoder",
  "fusion": "the DETR encoder",
  "decoder": "the DETR decoder",
  "scoring": "the scoring head",
  "masks": "the segmentation head",
  "visual/neck": "the tracker's neck",
  "visual": "the tracker",
}
OPTIONAL = ("visual/neck", "visual")
DETECTOR = tuple(part for part in WORDS if part not in OPTIONAL)


class Parts:
  """Which part of the model a name of a layout belongs to."""

  def __init__(self, table: Table):
    self.separator = separator_of(table.name)
    self.names: dict[str, set[str]] = {}
    self._above: dict[tuple[str, ...], set[str]] = {}
    places = canonical_names(table)
    for name, place in places.items():
      if place:
        self._add(name, _part(place))
    for name, place in places.items():
      if not place:
        self.names.setdefault(self.of(name), set()).add(self._normal(name))

  def of(self, name: str) -> str:
    """The part of a canonical name, known or not: that of what has the longest beginning in common
    with it. Empty where that is of several parts."""
    segments = self._segments(name)
    for end in range(len(segments), 0, -1):
      if parts := self._above.get(segments[:end]):
        return next(iter(parts)) if len(parts) == 1 else ""
    return ""

  def in_file(self, names: Iterable[str]) -> dict[str, int]:
    """How many of these canonical names are of each part and known."""
    counts = dict.fromkeys(WORDS, 0)
    for name in names:
      part = self.of(name)
      if part and self._normal(name) in self.names.get(part, ()):
        counts[part] += 1
    return counts

  def _add(self, name: str, part: str) -> None:
    self.names.setdefault(part, set()).add(self._normal(name))
    segments = self._segments(name)
    for end in range(1, len(segments) + 1):
      self._above.setdefault(segments[:end], set()).add(part)

  def _segments(self, name: str) -> tuple[str, ...]:
    return tuple(normal(segment) for segment in name.split(self.separator))

  def _normal(self, name: str) -> str:
    return self.separator.join(self._segments(name))


@functools.cache
def parts_of(name: str) -> Parts:
  """Of a table, by its name."""
  return Parts(TABLES[name])


def list_words(parts: Iterable[str]) -> str:
  words = [WORDS[part] for part in parts]
  if len(words) < 2:
    return "".join(words)
  return f"{', '.join(words[:-1])} and {words[-1]}"


def _part(place: str) -> str:
  return "visual/neck" if place.startswith("visual/neck/") else place.partition("/")[0]
