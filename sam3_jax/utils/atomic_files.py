"""Atomic writing of files: a file appears complete and synced to disk, or not at all.

All output files are written with this module; output directories with `writer.NewFolder`.
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
from sam3_jax.utils.os_errors import error_text

_PIECE = 2**20  # bytes read at a time
_NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS}  # file systems without fsync


class Draft:
  """A file with a temporary name until `commit`; leaving `with` before that deletes it.

  with Draft(path) as draft:
    draft.write(data)
    draft.commit()

  The temporary name identifies the process that writes it. No other process, on any host, writes to
  the same file, and files left by killed processes can be recognized. Errors name `path` and the
  reason.

  Attributes:
    path: the final name.
    file: the open binary file; write to it directly or with `write`.
  """

  def __init__(self, path: str | Path):
    """Opens the temporary file in the directory of `path`, which is created if needed."""
    self.path = Path(path)
    self._draft, self._sum = draft_path(self.path), hashlib.sha256()
    with self.naming():
      self.path.parent.mkdir(parents=True, exist_ok=True)
      self.file: BinaryIO = self._draft.open("xb")

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self.discard()

  @property
  def temporary(self) -> Path:
    """The file until it is committed; `flush` before reading it."""
    return self._draft

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
    """Reads back up to `size` bytes written at an offset."""
    with self.naming():
      self.file.flush()
      with self._draft.open("rb") as file:
        file.seek(offset)
        return file.read(size)

  def pieces(self, offset: int = 0, size: int | None = None) -> Iterator[bytes]:
    """Reads back `size` bytes written at an offset, or all of them, up to 1 MB at a time."""
    stop = self.file.tell() if size is None else offset + size
    for start in range(offset, stop, _PIECE):
      yield self.read(start, min(_PIECE, stop - start))

  def sha256(self) -> str:
    """Hexadecimal digest of the bytes written by `write`."""
    return self._sum.hexdigest()

  def copy(self, path: Path) -> None:
    """Appends the content of a file."""
    with path.open("rb") as source:
      while data := source.read(_PIECE):
        self.write(data)

  def sync(self) -> None:
    """Syncs the content to disk and closes the file, still under its temporary name."""
    with self.naming():
      self.file.flush()
      sync(self.file.fileno())
      self.file.close()

  def commit(self) -> None:
    """Renames the file to `path`, replacing an existing file."""
    with self.naming():
      if not self.file.closed:
        self.sync()
      self._draft.replace(self.path)
      sync_directory(self.path.parent)

  def discard(self) -> None:
    """Deletes the temporary file, if it was not committed."""
    with contextlib.suppress(OSError):  # closing flushes the buffer, and the disk may be full
      self.file.close()
    with contextlib.suppress(OSError):
      self._draft.unlink()

  @contextlib.contextmanager
  def naming(self) -> Iterator[None]:
    """Makes errors of writing to `file` name `path` instead of the temporary name."""
    try:
      yield
    except OSError as error:
      raise OSError(error.errno, error_text(error), str(self.path)) from error


def sync(descriptor: int) -> None:
  """Syncs a file's content to disk; ignores file systems that do not support it."""
  try:
    os.fsync(descriptor)
  except OSError as error:
    if error.errno not in _NO_SYNC:
      raise


def write_bytes(path: str | Path, data: bytes) -> None:
  """Writes a file atomically; raises OSError with its name and the reason."""
  with Draft(path) as draft:
    draft.write(data)
    draft.commit()


def write_json(path: str | Path, values: Any, *, indent: int | None = None) -> None:
  """Writes JSON values atomically; raises ValueError if a number is not finite."""
  write_bytes(path, json_bytes(values, indent=indent))


def json_bytes(values: Any, *, indent: int | None = None, allow_nan: bool = False) -> bytes:
  """Serializes values as JSON, with a newline at the end."""

  return json.dumps(values, indent=indent, allow_nan=allow_nan).encode() + b"\n"
