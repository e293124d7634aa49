"""Files that appear complete or not at all, and are on the disk before anyone relies on them."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

from sam3_jax.lease import PARTIAL, create_exclusively, draft_path, is_abandoned, sync_directory


class Draft:
  """A file under another name until `commit`; leaving `with` before that leaves nothing behind.

  Its name says which process writes it, so others can tell it from what a killed process left.
  Errors say which file could not be written, and why.
  """

  def __init__(self, path: Path):
    self.path = path
    self._path, self._sum = draft_path(path), hashlib.sha256()
    with self._named():
      path.parent.mkdir(parents=True, exist_ok=True)
      self._file = self._path.open("xb")

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_) -> None:
    self.discard()

  def write(self, data: bytes) -> int:
    with self._named():
      self._sum.update(data)
      return self._file.write(data)

  def flush(self) -> None:
    with self._named():
      self._file.flush()

  @property
  def closed(self) -> bool:
    return self._file.closed

  def read(self, offset: int, size: int) -> bytes:
    """What was written at an offset."""
    with self._named():
      self._file.flush()
      with self._path.open("rb") as file:
        file.seek(offset)
        return file.read(size)

  def sha256(self) -> str:
    """Hexadecimal digest of what was written."""
    return self._sum.hexdigest()

  def copy(self, path: Path) -> None:
    """Appends the content of a file."""
    with self._named(), path.open("rb") as source:
      while data := source.read(2**20):
        self.write(data)

  def commit(self) -> None:
    """Makes the file appear under its name, in place of what may be there."""
    with self._named():
      self._file.flush()
      os.fsync(self._file.fileno())
      self._file.close()
      self._path.replace(self.path)
      sync_directory(self.path.parent)

  def discard(self) -> None:
    """Forgets what was not committed."""
    with contextlib.suppress(OSError):  # closing writes what is left; perhaps the disk is full
      self._file.close()
    with contextlib.suppress(OSError):
      self._path.unlink()

  def _named(self) -> contextlib.AbstractContextManager[None]:
    return _naming(self.path)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
  try:
    yield
  except OSError as error:
    reason = error.strerror or str(error)
    raise OSError(
      f"cannot write {path}: {reason}; what is done stays: fix that and rerun the same command."
    ) from error


def write_json(path: Path, values: Any) -> None:
  """Writes plain values."""
  with Draft(path) as draft:
    draft.write(_json(values))
    draft.commit()


def create_json(path: Path, values: Any) -> bool:
  """Writes plain values unless there is a file of this name, which is one step: of several
  processes that do so at the same time, one succeeds."""
  with _naming(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    return create_exclusively(path, _json(values))


def _json(values: Any) -> bytes:
  return json.dumps(values, allow_nan=False).encode() + b"\n"


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
    raise ValueError(
      f"{path} cannot be read ({error.strerror}); check its permissions and run batch again."
    ) from error
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{path} is not JSON ({error}); remove it and run batch again.") from error
  if not isinstance(values, dict):
    raise ValueError(f"{path} holds no object; remove it and run batch again.")
  return values


def drafts(folder: Path) -> list[Path]:
  """What processes, alive or killed, have not committed of the files of a directory."""
  return list(folder.glob(f".*{PARTIAL}"))


def draft_of(draft: Path) -> str:
  """The name of the file that a draft is of."""
  return draft.name[1:].removesuffix(PARTIAL).rpartition(".")[0]


def remove_drafts(folder: Path, wanted: Callable[[str], bool]) -> None:
  """Removes what killed processes left of the files of whose names `wanted` is true."""
  for path in drafts(folder):
    if wanted(draft_of(path)) and is_abandoned(path):
      path.unlink(missing_ok=True)
