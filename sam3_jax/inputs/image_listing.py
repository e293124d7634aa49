"""Image files named by a path, a directory or a pattern, and a count of what was left out.

`segment` and `batch` list their images here, so that both find the same files in a directory.
"""

import errno
import fnmatch
import glob
import heapq
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sam3_jax.inputs.image_file import IMAGE_SUFFIXES

IMAGE, ANNOTATIONS = ".sam3.png", ".sam3.json"  # endings of our own results, which are skipped
SHOWN_KINDS = 8  # of skipped files, in the note; the others are summed up

_Key = tuple[int, int] | str
_Typed = tuple[os.DirEntry[str], int | None]  # with the mode of its target, if it has one


class Found(NamedTuple):
  """A file: its name as given, or relative to the directory given, and its path."""

  name: str
  path: str


class ListingNotes:
  """What a listing skipped, and what else a user may not expect: one line, or a refusal."""

  def __init__(self):
    self._files: Counter[tuple[str, str]] = Counter()
    self._directories: Counter[tuple[str, str]] = Counter()
    self._remarks: dict[str, tuple[int, str, str]] = {}

  def skip(self, kind: str, plural: str = "", count: int = 1) -> None:
    """Counts files that are left out, such as "label image", "label images"."""
    self._files[kind, plural or kind] += count

  def skip_suffix(self, name: str) -> None:
    """Counts a file that is left out because of its ending."""
    suffix = Path(name).suffix.lower()
    odd = "without an extension" if not suffix else "with other extensions"
    self.skip(suffix if re.fullmatch(r"\.\w{1,10}", suffix, re.ASCII) else odd)

  def skip_directory(self, kind: str) -> None:
    """Counts a directory that is left out, with all that is in it."""
    self._directories[kind, kind] += 1

  def remark(self, one: str, several: str, example: str) -> None:
    """Counts what is not skipped but surprising.

    Args:
      one, several: such as "image is empty", "images are empty".
      example: the first one is named.
    """
    if not example.isprintable():
      example = ascii(example)[1:-1]
    count, first, _ = self._remarks.get(one, (0, example, several))
    self._remarks[one] = count + 1, first, several

  def line(self) -> str:
    """All of it in one line, such as `skipped 12 files: 8 .txt, 3 hidden, 1 label image`; empty if
    there is nothing to say."""
    skipped = [
      f"{_count(sum(kinds.values()), *what)}: {_kinds(kinds)}"
      for kinds, what in (
        (self._files, ("file", "files")),
        (self._directories, ("directory", "directories")),
      )
      if kinds
    ]
    clauses = ["skipped " + " and ".join(skipped)] if skipped else []
    for one, (count, example, several) in self._remarks.items():
      more = "" if count == 1 else "such as "
      clauses.append(f"{_count(count, one, several)} ({more}{example:.100})")
    return "; ".join(clauses)

  def refuse(self) -> None:
    """Raises ValueError if there is anything to say: what --strict asks for."""
    if line := self.line():
      raise ValueError(f"--strict: {line}. Remove or name these files, or leave out --strict.")


def find_files(given: str, notes: ListingNotes) -> Iterator[Found]:
  """The files that a path or a pattern stands for, in an order that depends on names alone.

  Args:
    given: a directory, for all images in and below it by their endings (`IMAGE_SUFFIXES`), linked
      directories too, hidden files not; a file; or a pattern such as `a/*.jpg`, whose matches may
      have any ending. Results of `sam3-jax segment` are not taken as images.
    notes: counts what is left out.

  Raises:
    FileNotFoundError: there is no such directory or file, and it is no pattern.
    ValueError: a directory cannot be read.
  """
  if os.path.isdir(given):
    for name in sorted(_in_directory(given, notes)):
      yield Found(name, os.path.join(given, name))
  elif os.path.isfile(given):
    # Named by itself, a file is taken as it is, unless it surely is a result, as of `*.png`, which
    # the shell puts the names in place of.
    pairs = ((IMAGE, ANNOTATIONS), (ANNOTATIONS, IMAGE))
    beside = [given[: -len(own)] + other for own, other in pairs if given.lower().endswith(own)]
    if not (any(map(os.path.exists, beside)) and is_result(given, notes)):
      yield Found(given, given)
  elif glob.has_magic(given):
    yield from _matches(given, notes)
  else:
    raise FileNotFoundError(f"there is no folder, file or pattern {given}; check the spelling.")


def is_hidden(name: str, notes: ListingNotes) -> bool:
  """Whether a file, by its name or that of a directory above it, is hidden or macOS's metadata;
  counted if so."""
  if not name.startswith((".", "__MACOSX/")) and "/." not in name and "/__MACOSX/" not in name:
    return False  # as most
  parts = name.split("/")
  if "__MACOSX" in parts[:-1] or parts[-1].startswith("._"):
    notes.skip("macOS metadata")
  elif any(part.startswith(".") and part not in (".", "..") for part in parts):
    notes.skip("hidden")
  else:
    return False
  return True


def is_result(name: str, notes: ListingNotes) -> bool:
  """Whether a file is what `sam3-jax segment` wrote, by its name; counted if so."""
  if name.lower().endswith((IMAGE, ANNOTATIONS)):
    notes.skip("result of segment", "results of segment")
    return True
  return False


def is_image(name: str, notes: ListingNotes) -> bool:
  """Whether a file counts as an image by its name, which is counted in `notes` if not."""
  if is_hidden(name, notes) or is_result(name, notes):
    return False
  if Path(name).suffix.lower() not in IMAGE_SUFFIXES:
    notes.skip_suffix(name)
    return False
  return True


def _in_directory(top: str, notes: ListingNotes) -> Iterator[str]:
  """Names relative to `top` of the images in and below it."""
  for base, entries in _walk(top, notes):
    for entry, mode in entries:
      if mode is None:
        notes.skip("broken link", "broken links")
      elif is_image(entry.name, notes):  # reading refuses pipes and devices, by name
        yield f"{base}/{entry.name}" if base else entry.name


def _walk(top: str, notes: ListingNotes) -> Iterator[tuple[str, list[_Typed]]]:
  """Each directory at and below `top` once, relative to it, with what it holds but directories.

  Links to directories are followed after all directories that need none, so that a file has the
  name without a link if it has one, whatever the order of names.
  """
  above = {_key(str(path)) for path in Path(os.path.realpath(top)).parents}
  seen = {_key(top)}
  pending, links = [""], list[str]()  # heaps: the order must not depend on the file system
  while pending or links:
    base = heapq.heappop(pending or links)
    if base:
      key = _key(os.path.join(top, base))
      if key in above or key in seen:  # a link may lead back, or to what has another name too
        notes.skip_directory("link to a directory " + ("above" if key in above else "listed too"))
        continue
      seen.add(key)
    others: list[_Typed] = []
    for entry in _entries(os.path.join(top, base) if base else top, notes, first=not base):
      mode = _mode(entry)
      if mode is None or not stat.S_ISDIR(mode):
        others.append((entry, mode))
      elif entry.name.startswith("."):
        notes.skip_directory("hidden")
      else:
        name = f"{base}/{entry.name}" if base else entry.name
        heapq.heappush(links if entry.is_symlink() else pending, name)
    yield base, others


def _entries(path: str, notes: ListingNotes, *, first: bool) -> list[os.DirEntry[str]]:
  """What a directory holds; of one that may not be read nothing, unless it is the `first`."""
  try:
    with os.scandir(path or ".") as entries:
      return list(entries)
  except OSError as error:
    # A directory without permission stays so; other errors pass, and a list without its images
    # would be taken for the whole.
    if not first and isinstance(error, PermissionError):
      notes.remark(
        "directory without permission to read it is left out",
        "directories without permission to read them are left out",
        path,
      )
      return []
    raise ValueError(
      f"{path} cannot be read ({error.strerror}); check the directory and its permissions."
    ) from error


def _mode(entry: os.DirEntry[str]) -> int | None:
  """Type of a file, of a link's target; None if the link is broken. Mostly without a `stat`."""
  if not entry.is_symlink():
    if entry.is_dir(follow_symlinks=False):
      return stat.S_IFDIR
    if entry.is_file(follow_symlinks=False):
      return stat.S_IFREG
  try:
    return entry.stat().st_mode
  except OSError as error:
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES):
      return None
    raise ValueError(
      f"{entry.path} cannot be examined ({error.strerror}); check the directory and its "
      "permissions."
    ) from error


def _key(path: str) -> _Key:
  """What a directory is recognized by, under whatever name."""
  try:
    status = os.stat(path)
  except OSError:
    return os.path.realpath(path)
  # Some network file systems have no inode numbers.
  return (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(path)


def _matches(pattern: str, notes: ListingNotes) -> Iterator[Found]:
  seen: set[tuple[_Key, str]] = set()
  folders: dict[str, _Key] = {}
  found: list[str] = []
  base = "/" if pattern.startswith("/") else ""
  names = set(_expand(base, [part for part in pattern.split("/") if part], notes))
  for name in sorted(names, key=lambda name: (name.count("/"), name)):
    if os.path.isdir(name):
      if "**" not in pattern:  # which matches each directory on the way
        notes.skip_directory("matched by the pattern")
    elif not os.path.exists(name):
      notes.skip("broken link", "broken links")
    elif not os.path.isfile(name):
      notes.skip("not a regular file", "not regular files")
    elif not is_result(name, notes):
      folder, base = os.path.split(name)
      if folder not in folders:
        folders[folder] = _key(folder or ".")
      if (folders[folder], base) in seen:  # through a link to a directory
        notes.skip("matched under another name too")
      else:
        seen.add((folders[folder], base))
        found.append(name)
  for name in sorted(found):
    yield Found(name, name)


def _expand(base: str, parts: list[str], notes: ListingNotes) -> Iterator[str]:
  """`glob.glob`, which leaves out what it cannot read without a word, and follows circles of links.

  Args:
    base: the path so far; empty for the working directory.
    parts: the pattern's parts below it.
    notes: counts directories that cannot be read.
  """
  if not parts:
    yield base
    return
  part, rest = parts[0], parts[1:]
  if not glob.has_magic(part):
    path = os.path.join(base, part)
    if os.path.lexists(path):
      yield from _expand(path, rest, notes)
  elif not os.path.isdir(base or "."):
    return
  elif part == "**":
    for below, others in _walk(base or ".", notes):
      folder = os.path.join(base, below) if below else base
      if rest:
        yield from _expand(folder, rest, notes)
      else:
        yield from (os.path.join(folder, one.name) for one, _ in others if one.name[0] != ".")
  else:
    for entry in _entries(base, notes, first=False):
      hidden = entry.name.startswith(".") and not part.startswith(".")
      if not hidden and fnmatch.fnmatchcase(entry.name, part):
        yield from _expand(os.path.join(base, entry.name), rest, notes)


def _count(number: int, one: str, several: str) -> str:
  return f"{number:,} {one if number == 1 else several}"


def _kinds(kinds: Counter[tuple[str, str]]) -> str:
  ordered = sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
  shown = [_count(number, *names) for names, number in ordered[:SHOWN_KINDS]]
  if rest := sum(number for _, number in ordered[SHOWN_KINDS:]):
    shown.append(f"{rest:,} of other kinds")
  return ", ".join(shown)
