"""Notes: what was skipped, changed or unexpected in the input, summarized by kind.

Faults raise errors; notes do not. They are never dropped: callers that do not show them issue them
as warnings. `Notes` has a line for each kind; `ListingNotes` has one line for all files of a
listing, and can refuse them.
"""

import re
import warnings
from collections import Counter
from pathlib import Path

SHOWN = 3  # examples named in a line
SHOWN_KINDS = 8  # kinds of skipped files named in a line; the others are summed up


class Notes:
  """Counts by kind, each with its first few examples."""

  def __init__(self):
    self._counts: dict[str, int] = {}
    self._examples: dict[str, dict[str, None]] = {}

  def add(self, what: str, example: str = "", count: int = 1) -> None:
    """Adds to the count of a kind.

    Args:
      what: the kind, in the plural, such as "instances without a pixel, left out".
      example: such as "annotation 7".
      count: nothing is noted if it is 0.
    """
    if not count:
      return
    self._counts[what] = self._counts.get(what, 0) + count
    examples = self._examples.setdefault(what, {})
    if example and len(examples) <= SHOWN:
      examples[example] = None

  def lines(self) -> list[str]:
    """One line for each kind, in the order in which they were first added."""
    return [f"note: {what}: {count:,}{self._named(what)}" for what, count in self._counts.items()]

  def warn(self) -> None:
    """Issues the lines as warnings."""

    for line in self.lines():
      warnings.warn(line.removeprefix("note: "), UserWarning, stacklevel=4)

  def _named(self, what: str) -> str:
    examples = list(self._examples[what])
    if not examples:
      return ""
    return f" ({', '.join(examples[:SHOWN])}{', ...' if len(examples) > SHOWN else ''})"


class ListingNotes:
  """Counts of files that a listing skipped, and remarks: one line, or an error with --strict."""

  def __init__(self):
    self._files: Counter[tuple[str, str]] = Counter()
    self._directories: Counter[tuple[str, str]] = Counter()
    self._remarks: dict[str, tuple[int, str, str]] = {}

  def skip(self, kind: str, plural: str = "", count: int = 1) -> None:
    """Counts skipped files by kind, such as "label image", "label images"."""
    self._files[kind, plural or kind] += count

  def skip_suffix(self, name: str) -> None:
    """Counts a file that is skipped because of its suffix."""
    suffix = Path(name).suffix.lower()
    other = "without an extension" if not suffix else "with other extensions"
    self.skip(suffix if re.fullmatch(r"\.\w{1,10}", suffix, re.ASCII) else other)

  def skip_directory(self, kind: str) -> None:
    """Counts a directory that is skipped with its content."""
    self._directories[kind, kind] += 1

  def remark(self, singular: str, plural: str, example: str) -> None:
    """Counts something unexpected that is not skipped.

    Args:
      singular, plural: such as "image is empty", "images are empty".
      example: a name; only the first one is shown.
    """
    if not example.isprintable():
      example = ascii(example)[1:-1]
    count, first, _ = self._remarks.get(singular, (0, example, plural))
    self._remarks[singular] = count + 1, first, plural

  def line(self) -> str:
    """A summary such as `skipped 12 files: 8 .txt, 3 hidden, 1 label image`; "" without notes."""
    skipped = [
      f"{_count(sum(kinds.values()), *what)}: {_kinds(kinds)}"
      for kinds, what in (
        (self._files, ("file", "files")),
        (self._directories, ("directory", "directories")),
      )
      if kinds
    ]
    clauses = ["skipped " + " and ".join(skipped)] if skipped else []
    for singular, (count, example, plural) in self._remarks.items():
      more = "" if count == 1 else "such as "
      clauses.append(f"{_count(count, singular, plural)} ({more}{example:.100})")
    return "; ".join(clauses)

  def refuse(self) -> None:
    """Raises ValueError if there are any notes, for --strict."""
    if line := self.line():
      raise ValueError(f"--strict: {line}. Remove or name these files, or leave out --strict.")


def _count(number: int, singular: str, plural: str) -> str:
  return f"{number:,} {singular if number == 1 else plural}"


def _kinds(kinds: Counter[tuple[str, str]]) -> str:
  ordered = sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
  shown = [_count(number, *names) for names, number in ordered[:SHOWN_KINDS]]
  if rest := sum(number for _, number in ordered[SHOWN_KINDS:]):
    shown.append(f"{rest:,} of other kinds")
  return ", ".join(shown)
