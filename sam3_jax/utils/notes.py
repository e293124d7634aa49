"""Notes: what was skipped, cut or surprising, counted, one line for each kind at the end.

A fault stops the work with an error; a note does not, but is never left out: where nobody shows the
notes, they are issued as warnings.
"""

import warnings

SHOWN = 3  # examples that a line names; the others are only counted


class Notes:
  """Counts by kind of what is worth a line, with the first few examples of each."""

  def __init__(self):
    self._counts: dict[str, int] = {}
    self._examples: dict[str, dict[str, None]] = {}

  def add(self, what: str, example: str = "", count: int = 1) -> None:
    """Counts something.

    Args:
      what: the kind, in the plural, such as "instances without a pixel, left out".
      example: names this one, such as "annotation 7".
      count: how many there are of them; nothing is noted if it is 0.
    """
    if not count:
      return
    self._counts[what] = self._counts.get(what, 0) + count
    examples = self._examples.setdefault(what, {})
    if example and len(examples) <= SHOWN:
      examples[example] = None

  def lines(self) -> list[str]:
    """One line a kind, in the order in which they first came up."""
    return [f"note: {what}: {count:,}{self._named(what)}" for what, count in self._counts.items()]

  def warn(self) -> None:
    """Issues the lines as warnings, for callers who show no notes themselves."""
    for line in self.lines():
      warnings.warn(line.removeprefix("note: "), UserWarning, stacklevel=4)

  def _named(self, what: str) -> str:
    examples = list(self._examples[what])
    if not examples:
      return ""
    return f" ({', '.join(examples[:SHOWN])}{', ...' if len(examples) > SHOWN else ''})"
