"""The parts of SAM 3, and which of them a file has.

A part is a module that training programs omit or replace as a whole: Meta's recipes without masks
save no segmentation head, and most recipes save no tracker.
"""

import functools
from collections.abc import Iterable

from .table import Table
from .wrappers import TABLES, canonical_names, normal, separator_of

# The words for each part, by the start of its paths in our tree. Parts in OPTIONAL may be absent
# from a complete model.
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
  "video": "the tracker's memory",
}
OPTIONAL = ("visual/neck", "visual", "video")
# Tensors that the model does not read, and whose names do not show their part.
LOOSE = {
  "tracker.no_mem_pos_enc": "video",
  "tracker_model.no_memory_positional_encoding": "video",
  "tracker_model.shared_image_embedding.positional_embedding": "visual",
}
DETECTOR = tuple(part for part in WORDS if part not in OPTIONAL)


class Parts:
  """Maps the names of a layout to parts of the model."""

  def __init__(self, table: Table):
    self.separator = separator_of(table.name)
    self.names: dict[str, set[str]] = {}
    self._above: dict[tuple[str, ...], set[str]] = {}
    paths = canonical_names(table)
    for name, path in paths.items():
      if path or name in LOOSE:
        self._add(name, LOOSE.get(name) or _part(path))
    for name, path in paths.items():
      if not path and name not in LOOSE:
        self.names.setdefault(self.of(name), set()).add(self._normal(name))

  def of(self, name: str) -> str:
    """The part of a canonical name, known or not: the part of the known names that share its
    longest prefix. Empty if these are of several parts."""
    segments = self._segments(name)
    for end in range(len(segments), 0, -1):
      if parts := self._above.get(segments[:end]):
        return next(iter(parts)) if len(parts) == 1 else ""
    return ""

  def count(self, names: Iterable[str]) -> dict[str, int]:
    """The number of known names of each part among these canonical names."""
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
  """The parts of a table, by its name."""
  return Parts(TABLES[name])


def list_words(parts: Iterable[str]) -> str:
  words = [WORDS[part] for part in parts]
  if len(words) < 2:
    return "".join(words)
  return f"{', '.join(words[:-1])} and {words[-1]}"


def _part(path: str) -> str:
  return "visual/neck" if path.startswith("visual/neck/") else path.partition("/")[0]
