"""Files that appear complete or not at all, and are on the disk before anyone relies on them."""

import contextlib
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Self

_PARTIAL = ".partial"


class Draft:
  """A file under another name until `commit`; leaving `with` before that leaves nothing behind.

  While it is open it is locked, so that others can tell it from what a killed process left. Errors
  say which file could not be written, and why.
  """

  def __init__(self, path: Path):
    self.path = path
    host = socket.gethostname().partition(".")[0]
    self._path = path.with_name(f".{path.name}.{host}.{os.getpid()}{_PARTIAL}")
    with self._named():
      path.parent.mkdir(parents=True, exist_ok=True)
      self._file = self._path.open("wb")
    _lock(self._file)

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_) -> None:
    self.discard()

  def write(self, data: bytes) -> int:
    with self._named():
      return self._file.write(data)

  def flush(self) -> None:
    with self._named():
      self._file.flush()

  @property
  def closed(self) -> bool:
    return self._file.closed

  def copy(self, path: Path) -> None:
    """Appends the content of a file."""
    with self._named(), path.open("rb") as source:
      shutil.copyfileobj(source, self._file, 2**20)

  def commit(self) -> None:
    """Makes the file appear under its name, in place of what may be there."""
    with self._named():
      self._file.flush()
      os.fsync(self._file.fileno())
      self._file.close()
      self._path.replace(self.path)
      _sync(self.path.parent)

  def discard(self) -> None:
    """Forgets what was not committed."""
    with contextlib.suppress(OSError):  # closing writes what is left; perhaps there is no room
      self._file.close()
    with contextlib.suppress(OSError):
      self._path.unlink()

  @contextlib.contextmanager
  def _named(self) -> Iterator[None]:
    try:
      yield
    except OSError as error:
      reason = error.strerror or str(error)
      raise OSError(
        f"cannot write {self.path}: {reason}; what is done stays: put that right and give the "
        "same command again."
      ) from error


def write_json(path: Path, values: Any) -> None:
  """Writes plain values."""
  with Draft(path) as draft:
    draft.write(json.dumps(values, allow_nan=False).encode() + b"\n")
    draft.commit()


def read_json(path: Path) -> dict[str, Any] | None:
  """An object from a file; None if there is no such file.

  Raises:
    ValueError: it holds something else, or cannot be read.
  """
  try:
    values = json.loads(path.read_bytes())
  except (FileNotFoundError, NotADirectoryError):
    return None
  except OSError as error:
    raise ValueError(f"{path} cannot be read ({error.strerror}); check its rights.") from error
  except ValueError as error:
    raise ValueError(f"{path} is not JSON ({error}); remove it and run batch again.") from error
  if not isinstance(values, dict):
    raise ValueError(f"{path} holds no object; remove it and run batch again.")
  return values


def remove_drafts(folder: Path, wanted: Callable[[str], bool]) -> list[Path]:
  """Removes what killed processes left of the files of whose names `wanted` is true.

  Returns:
    What stays, as living processes are writing it.
  """
  busy = []
  for path in folder.glob(f".*{_PARTIAL}"):
    if wanted(path.name[1:].rsplit(".", 3)[0]):
      with contextlib.suppress(FileNotFoundError), path.open("rb+") as file:
        if _lock(file):
          path.unlink()
        else:
          busy.append(path)
  return busy


def _lock(file: BinaryIO) -> bool:
  """Takes a file until it is closed or this process ends; false if another one has it."""
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    return False
  except OSError:  # some file systems know no locks: then all that is left counts as left behind
    pass
  return True


def _sync(folder: Path) -> None:
  descriptor = os.open(folder, os.O_RDONLY)
  try:
    with contextlib.suppress(OSError):  # some file systems know no such thing, as gcsfuse
      os.fsync(descriptor)
  finally:
    os.close(descriptor)
