"""SHA256SUMS: the SHA-256 of every file in a directory, in the format of sha256sum.

It lists files by their paths from the directory, sorted, so that `sha256sum -c SHA256SUMS` checks
the directory without this package. It does not list itself, nor hidden files and directories of the
top level (.git/, .cache/, .DS_Store), which belong to other programs.
"""

import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path, PurePosixPath

from sam3_jax.utils.atomic_files import write_bytes
from sam3_jax.utils.os_errors import error_text
from sam3_jax.utils.paths import file_sizes, is_remote

FILE = "SHA256SUMS"
MAX_BYTES = 64 * 2**20  # of SHA256SUMS; 30 files have 4,000
BLOCK = 2**20  # bytes read at a time
THREADS = 8  # SHA-256 runs at 0.3 to 1.9 GB/s on a core; hashlib releases the GIL
TICK = 0.2  # seconds between two calls of `progress`

Progress = Callable[[float], None]  # called with the fraction of all bytes that were read

_LINE = re.compile(r"([0-9a-f]{64}) [ *](\S|\S.*\S)")


def read(folder: Path) -> dict[str, str] | None:
  """Reads the checksums in a directory's SHA256SUMS, by path; None if there is no such file.

  Raises:
    ValueError: sha256sum would not write a line like this, or the file cannot be read.
  """
  path = folder / FILE
  try:
    if not path.exists():
      return None
    with path.open("rb") as file:
      data = file.read(MAX_BYTES + 1)
    text = data.decode()
  except OSError as error:
    raise ValueError(f"{path} cannot be read: {error_text(error)}.") from error
  except UnicodeDecodeError as error:
    raise ValueError(f"{path} is damaged: byte {error.start:,} is not UTF-8.") from error
  if len(data) > MAX_BYTES:
    raise ValueError(f"{path} is damaged: it is larger than {MAX_BYTES // 2**20} MB.")
  *lines, rest = text.split("\n")
  sums: dict[str, str] = {}
  for number, line in enumerate([*lines, rest] if rest else lines, 1):
    match = _LINE.fullmatch(line)
    if not match or number > len(lines) or not _is_listable(match[2]) or match[2] in sums:
      raise ValueError(
        f"{path} is damaged: line {number} ({line!r:.90}) must be a SHA-256, two spaces and the "
        "path of another file, with a newline at the end."
      )
    sums[match[2]] = match[1]
  return sums


def write(
  folder: Path, known: Mapping[str, str] | None = None, progress: Progress | None = None
) -> dict[str, str]:
  """Writes SHA256SUMS for all files of a directory; returns the checksums by path.

  Args:
    folder: the directory.
    known: checksums that are already computed.
    progress: called with the fraction of all bytes that were read.

  Raises:
    ValueError: a name has a character that SHA256SUMS cannot hold, or a file cannot be read.
    OSError: SHA256SUMS cannot be written.
  """
  names = [name for name in file_sizes(folder) if name != FILE and not name.startswith(".")]
  if unlistable := [name for name in names if not _is_listable(name)]:
    raise ValueError(f"{folder} holds {unlistable[0]!r:.200}, which {FILE} cannot list; rename it.")
  sums = {name: digest for name, digest in (known or {}).items() if name in names}
  computed = compute(folder, [name for name in names if name not in sums], progress)
  for name, digest in computed.items():
    if isinstance(digest, OSError):
      raise ValueError(f"{folder / name} cannot be read: {error_text(digest)}.") from digest
    sums[name] = digest
  data = "".join(f"{sums[name]}  {name}\n" for name in sorted(sums)).encode()
  if is_remote(folder):  # an object appears when it is complete
    (folder / FILE).write_bytes(data)
  else:
    write_bytes(folder / FILE, data)
  return sums


def compare(folder: Path, wanted: Mapping[str, str], progress: Progress | None = None) -> list[str]:
  """The faults of a directory's files, one line each.

  Args:
    folder: the directory.
    wanted: checksums by path; other files are not read.
    progress: called with the fraction of all bytes that were read.
  """
  return [
    f"{folder / name} cannot be read: {error_text(found)}"
    if isinstance(found, OSError)
    else f"{folder / name} differs from its checksum"
    for name, found in compute(folder, wanted, progress).items()
    if found != wanted[name]
  ]


def compute(
  folder: Path, names: Iterable[str], progress: Progress | None = None
) -> dict[str, str | OSError]:
  """The SHA-256 of files of a directory, or the error of reading one, by path. Uses threads."""
  names = list(names)
  counter = _Counter(sum(map(_size, (folder / name for name in names))) if progress else 0)
  threads = max(1, min(THREADS, os.cpu_count() or 1, len(names)))
  pool = ThreadPoolExecutor(threads)
  try:
    futures = [pool.submit(_digest, folder / name, counter) for name in names]
    while progress and wait(futures, TICK).not_done:
      progress(counter.fraction())
    return {name: future.result() for name, future in zip(names, futures, strict=True)}
  finally:
    counter.stopped = True
    pool.shutdown(cancel_futures=True)


class _Counter:
  """Counts the bytes that all threads have read."""

  def __init__(self, total: int):
    self.total, self.done, self.stopped = total, 0, False
    self._lock = threading.Lock()

  def add(self, count: int) -> None:
    with self._lock:
      self.done += count

  def fraction(self) -> float:
    return min(1.0, self.done / max(1, self.total))


def _digest(path: Path, counter: _Counter) -> str | OSError:
  found = hashlib.sha256()
  try:
    with path.open("rb") as file:
      while not counter.stopped and (block := file.read(BLOCK)):
        found.update(block)
        counter.add(len(block))
  except OSError as error:
    return error
  return found.hexdigest()


def _size(path: Path) -> int:
  try:
    status = path.stat()
  except OSError:
    return 0
  return getattr(status, "st_size", None) or getattr(status, "length", 0)


def _is_listable(name: str) -> bool:
  """Whether a path is inside its directory, and sha256sum writes it without escapes."""
  path = PurePosixPath(name)
  return (
    name.isprintable()
    and "\\" not in name
    and name == name.strip()
    and path.as_posix() == name != "."
    and not path.is_absolute()
    and ".." not in path.parts
    and name != FILE
  )
