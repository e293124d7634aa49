"""Files that appear under their name complete and on the disk, or not at all.

Everything that outlives the process is written with this module, or as a directory with
`writer.NewFolder`.
"""

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Self

from sam3_jax.utils.lease import draft_path, sync_directory

_NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS}  # of file systems that cannot


class Draft:
  """A file under another name until `commit`; leaving `with` before that leaves nothing behind.

  with Draft(path) as draft:
    draft.write(data)
    draft.commit()

  The other name says which process writes it, so no other process, on whichever host, writes to it,
  and what a killed process left can be told from what is in work. Errors name `path` and the
  reason.

  Attributes:
    path: the name that it will have.
    file: where it is written; by `write`, or by whatever takes a binary file.
  """

  def __init__(self, path: str | Path):
    """Opens the file under its other name, in the same directory, which is made if need be."""
    self.path = Path(path)
    self._draft, self._sum = draft_path(self.path), hashlib.sha256()
    with self.naming():
      self.path.parent.mkdir(parents=True, exist_ok=True)
      self.file: BinaryIO = self._draft.open("xb")

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self.discard()

  def write(self, data: bytes) -> int:
    with self.naming():
      self._sum.update(data)
      return self.file.write(data)

  def flush(self) -> None:
    with self.naming():
      self.file.flush()

  @property
  def closed(self) -> bool:
    return self.file.closed

  def read(self, offset: int, size: int) -> bytes:
    """What was written at an offset."""
    with self.naming():
      self.file.flush()
      with self._draft.open("rb") as file:
        file.seek(offset)
        return file.read(size)

  def sha256(self) -> str:
    """Hexadecimal digest of what was written by `write`."""
    return self._sum.hexdigest()

  def copy(self, path: Path) -> None:
    """Appends the content of a file."""
    with path.open("rb") as source:
      while data := source.read(2**20):
        self.write(data)

  def sync(self) -> None:
    """Has the disk know the content, under the other name."""
    with self.naming():
      self.file.flush()
      sync(self.file.fileno())
      self.file.close()

  def commit(self) -> None:
    """Makes the file appear, in place of the one that may be there."""
    with self.naming():
      if not self.file.closed:
        self.sync()
      self._draft.replace(self.path)
      sync_directory(self.path.parent)

  def discard(self) -> None:
    """Forgets what was not committed."""
    with contextlib.suppress(OSError):  # closing writes what is left; perhaps the disk is full
      self.file.close()
    with contextlib.suppress(OSError):
      self._draft.unlink()

  @contextlib.contextmanager
  def naming(self) -> Iterator[None]:
    """Errors of writing to `file` name `path`, not the draft."""
    try:
      yield
    except OSError as error:
      raise OSError(error.errno, error.strerror or str(error), str(self.path)) from error


def sync(descriptor: int) -> None:
  """Has the disk know a file's content; raises OSError unless the file system cannot do that."""
  try:
    os.fsync(descriptor)
  except OSError as error:
    if error.errno not in _NO_SYNC:
      raise


def write_bytes(path: str | Path, data: bytes) -> None:
  """Writes a file at once; raises OSError with its name and the reason."""
  with Draft(path) as draft:
    draft.write(data)
    draft.commit()


def write_json(path: str | Path, values: Any, *, indent: int | None = None) -> None:
  """Writes plain values at once; raises ValueError if a number is not finite."""
  write_bytes(path, json_bytes(values, indent=indent))


def json_bytes(values: Any, *, indent: int | None = None, allow_nan: bool = False) -> bytes:
  """Plain values as JSON, with a newline at the end."""
  return json.dumps(values, indent=indent, allow_nan=allow_nan).encode() + b"\n"
