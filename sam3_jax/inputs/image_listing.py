"""Lists image files given by a path, a directory or a pattern, for `segment` and `batch`."""

import errno
import fnmatch
import glob
import heapq
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sam3_jax.inputs.image_file import IMAGE_SUFFIXES
from sam3_jax.utils.notes import ListingNotes
from sam3_jax.utils.os_errors import error_text

# Suffixes of the results of `sam3-jax segment`, unlikely in names of input files.
IMAGE, ANNOTATIONS = ".sam3.png", ".sam3.json"

_Key = tuple[int, int] | str
_Typed = tuple[os.DirEntry[str], int | None]  # an entry and its mode; None for a broken link


class Found(NamedTuple):
  """A file: its path, and its name as given or relative to the given directory."""

  name: str
  path: str


def find_files(given: str, notes: ListingNotes) -> Iterator[Found]:
  """Finds the files of a path or a pattern, in an order that depends only on names.

  Args:
    given: a directory, for all images in its tree by their suffixes (`IMAGE_SUFFIXES`), including
      linked directories but not hidden files; a file; or a pattern such as `a/*.jpg`, whose matches
      may have any suffix. Results of `sam3-jax segment` are skipped.
    notes: counts skipped files.

  Raises:
    FileNotFoundError: there is no such directory or file, and `given` is not a pattern.
    ValueError: a directory cannot be read.
  """
  if os.path.isdir(given):
    for name in sorted(_in_directory(given, notes)):
      yield Found(name, os.path.join(given, name))
  elif os.path.isfile(given):
    # A file given by name is used, unless it certainly is a result: both files of a result exist.
    # The shell may have expanded `*.png`.
    pairs = ((IMAGE, ANNOTATIONS), (ANNOTATIONS, IMAGE))
    others = [given[: -len(own)] + other for own, other in pairs if given.lower().endswith(own)]
    if not (any(map(os.path.exists, others)) and is_result(given, notes)):
      yield Found(given, given)
  elif glob.has_magic(given):
    yield from _matches(given, notes)
  else:
    raise FileNotFoundError(f"there is no directory, file or pattern {given}; check the spelling.")


def is_hidden(name: str, notes: ListingNotes) -> bool:
  """Whether a file, or a directory in its path, is hidden or macOS metadata; counts it if so."""
  if not name.startswith((".", "__MACOSX/")) and "/." not in name and "/__MACOSX/" not in name:
    return False  # the common case, fast
  parts = name.split("/")
  if "__MACOSX" in parts[:-1] or parts[-1].startswith("._"):
    notes.skip("macOS metadata")
  elif any(part.startswith(".") and part not in (".", "..") for part in parts):
    notes.skip("hidden")
  else:
    return False
  return True


def is_result(name: str, notes: ListingNotes) -> bool:
  """Whether a file is a result of `sam3-jax segment`, by its name; counts it if so."""
  if name.lower().endswith((IMAGE, ANNOTATIONS)):
    notes.skip("result of segment", "results of segment")
    return True
  return False


def is_image(name: str, notes: ListingNotes) -> bool:
  """Whether a file is an image by its name; counts it in `notes` if not."""
  if is_hidden(name, notes) or is_result(name, notes):
    return False
  if Path(name).suffix.lower() not in IMAGE_SUFFIXES:
    notes.skip_suffix(name)
    return False
  return True


def _in_directory(top: str, notes: ListingNotes) -> Iterator[str]:
  """Names of the images in a directory tree, relative to `top`."""
  for base, entries in walk(top, notes):
    for entry, mode in entries:
      if mode is None:
        notes.skip("broken link", "broken links")
      elif is_image(entry.name, notes):  # pipes and devices too: reading them raises an error
        yield f"{base}/{entry.name}" if base else entry.name


def walk(top: str, notes: ListingNotes) -> Iterator[tuple[str, list[_Typed]]]:
  """Yields each directory of a tree once, relative to `top`, with its entries except directories.

  Links to directories are followed last, so that files are found by a path without links if there
  is one.
  """
  above = {_key(str(path)) for path in Path(os.path.realpath(top)).parents}
  seen = {_key(top)}
  pending, links = [""], list[str]()  # heaps, so that the order is independent of the file system
  while pending or links:
    base = heapq.heappop(pending or links)
    if base:
      key = _key(os.path.join(top, base))
      if key in above or key in seen:  # a link to a parent, or to a directory with another path
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
  """The entries of a directory; none if permission is denied, unless it is the `first` one."""
  try:
    with os.scandir(path or ".") as entries:
      return list(entries)
  except OSError as error:
    # A denied permission is permanent. Other errors may be temporary, and a list without these
    # images would be taken for complete.
    if not first and isinstance(error, PermissionError):
      notes.remark(
        "directory is skipped, as permission to read it is denied",
        "directories are skipped, as permission to read them is denied",
        path,
      )
      return []
    raise ValueError(
      f"{path} cannot be read ({error_text(error)}); check the directory and its permissions."
    ) from error


def _mode(entry: os.DirEntry[str]) -> int | None:
  """The mode of a file or of a link's target; None if the link is broken. Avoids `stat`."""
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
      f"{entry.path} cannot be examined ({error_text(error)}); check the directory and its "
      "permissions."
    ) from error


def _key(path: str) -> _Key:
  """A key that identifies a directory under all its paths."""
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
      if "**" not in pattern:  # `**` matches all directories in between
        notes.skip_directory("matched by the pattern")
    elif not os.path.exists(name):
      notes.skip("broken link", "broken links")
    elif not os.path.isfile(name):
      notes.skip("not a regular file", "not regular files")
    elif not is_result(name, notes):
      folder, base = os.path.split(name)
      if folder not in folders:
        folders[folder] = _key(folder or ".")
      if (folders[folder], base) in seen:  # matched through a linked directory
        notes.skip("matched under another name too")
      else:
        seen.add((folders[folder], base))
        found.append(name)
  for name in sorted(found):
    yield Found(name, name)


def _expand(base: str, parts: list[str], notes: ListingNotes) -> Iterator[str]:
  """Expands a pattern like `glob.glob`, but notes unreadable directories and detects link cycles.

  Args:
    base: the path so far; empty for the working directory.
    parts: the remaining parts of the pattern.
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
    for below, others in walk(base or ".", notes):
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
