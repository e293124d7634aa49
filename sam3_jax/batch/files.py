"""Reads and writes the files of a job, local or objects; errors say how to resume it.

An object appears complete, or not at all. It is written into a scratch file on this machine first.
"""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self, TypeVar

from sam3_jax.storage.faults import ChangedError
from sam3_jax.storage.objects import object_path
from sam3_jax.utils import atomic_files
from sam3_jax.utils.json_text import parse
from sam3_jax.utils.lease import PARTIAL, create_exclusively, is_abandoned
from sam3_jax.utils.os_errors import error_text

_READERS = 16  # threads that read small objects
_Value = TypeVar("_Value")
_Result = TypeVar("_Result")


class Draft(atomic_files.Draft):
  """A file or an object that appears when it is committed; errors say how to resume the job."""

  def __new__(cls, path: Path) -> Self:
    kind: Any = cls if object_path(path) is None else _ObjectDraft
    return super().__new__(kind)

  def naming(self) -> contextlib.AbstractContextManager[None]:
    return _naming(self.path)


class _ObjectDraft(Draft):
  """A scratch file that is uploaded when it is committed."""

  def __init__(self, path: Path):
    super().__init__(scratch() / path.name)
    self.path = path

  def commit(self) -> None:
    with self.naming():
      if not self.file.closed:
        self.file.close()
      if (remote := object_path(self.path)) is not None:
        remote.upload(self._draft)
    self.discard()


def scratch() -> Path:
  """The directory on this machine for files of jobs whose results are in a bucket.

  Raises:
    OSError: it cannot be created, or belongs to another user.
  """
  folder = Path(tempfile.gettempdir()) / f"sam3-jax-{os.getuid()}"
  folder.mkdir(mode=0o700, parents=True, exist_ok=True)
  if folder.lstat().st_uid != os.getuid():
    raise OSError(f"{folder} belongs to another user; set TMPDIR to another directory.")
  return folder


def in_parallel(
  out: Path, function: Callable[[_Value], _Result], values: Iterable[_Value]
) -> Iterator[_Result]:
  """Applies a function that reads a small file of `out` to each value; in threads for objects."""
  if object_path(out) is None:
    yield from map(function, values)
    return
  with ThreadPoolExecutor(_READERS) as pool:
    yield from pool.map(function, values)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
  try:
    yield
  except OSError as error:
    raise OSError(
      f"cannot write {path}: {error_text(error)}; finished results are kept. Fix this and rerun "
      "the same command."
    ) from error


def write_json(path: Path, values: Any) -> None:
  """Writes plain values."""
  if (remote := object_path(path)) is not None:
    with _naming(path):
      remote.write(atomic_files.json_bytes(values))
    return
  with Draft(path) as draft:
    draft.write(atomic_files.json_bytes(values))
    draft.commit()


def create_json(path: Path, values: Any) -> bool:
  """Writes plain values unless the file exists, in one atomic step: if several processes try at the
  same time, one succeeds."""
  with _naming(path):
    if (remote := object_path(path)) is not None:
      try:
        remote.create(atomic_files.json_bytes(values))
      except ChangedError:
        return False
      return True
    path.parent.mkdir(parents=True, exist_ok=True)
    return create_exclusively(path, atomic_files.json_bytes(values))


def read_json(path: Path) -> dict[str, Any] | None:
  """A JSON object from a file; None if there is no such file.

  Raises:
    ValueError: it is not a JSON object, or cannot be read.
  """
  try:
    values = parse(path.read_bytes(), str(path))
  except (FileNotFoundError, NotADirectoryError):
    return None
  except OSError as error:
    raise ValueError(
      f"{path} cannot be read ({error_text(error)}); check its permissions and run batch again."
    ) from error
  except ValueError as error:
    raise ValueError(f"{error}; remove it and run batch again.") from error
  if not isinstance(values, dict):
    raise ValueError(f"{path} is not a JSON object; remove it and run batch again.")
  return values


def drafts(folder: Path) -> list[Path]:
  """The uncommitted drafts in a directory, of running and of killed processes; none in a bucket."""
  if object_path(folder) is not None:
    return []
  return list(folder.glob(f".*{PARTIAL}"))


def draft_of(draft: Path) -> str:
  """The name of the file that a draft becomes when it is committed."""
  return draft.name[1:].removesuffix(PARTIAL).rpartition(".")[0]


def remove_drafts(folder: Path, wanted: Callable[[str], bool]) -> None:
  """Removes drafts that killed processes left, of files whose names satisfy `wanted`."""
  for path in drafts(folder):
    if wanted(draft_of(path)) and is_abandoned(path):
      path.unlink(missing_ok=True)
