"""Reads and writes the files of a job; errors say how to resume it."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sam3_jax.utils import atomic_files
from sam3_jax.utils.json_text import parse
from sam3_jax.utils.lease import PARTIAL, create_exclusively, is_abandoned
from sam3_jax.utils.os_errors import error_text


class Draft(atomic_files.Draft):
  """A file that appears when it is committed; errors say how to resume the job."""

  def naming(self) -> contextlib.AbstractContextManager[None]:
    return _naming(self.path)


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
  with Draft(path) as draft:
    draft.write(atomic_files.json_bytes(values))
    draft.commit()


def create_json(path: Path, values: Any) -> bool:
  """Writes plain values unless the file exists, in one atomic step: if several processes try at the
  same time, one succeeds."""
  with _naming(path):
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
  """The uncommitted drafts in a directory, of running and of killed processes."""
  return list(folder.glob(f".*{PARTIAL}"))


def draft_of(draft: Path) -> str:
  """The name of the file that a draft becomes when it is committed."""
  return draft.name[1:].removesuffix(PARTIAL).rpartition(".")[0]


def remove_drafts(folder: Path, wanted: Callable[[str], bool]) -> None:
  """Removes drafts that killed processes left, of files whose names satisfy `wanted`."""
  for path in drafts(folder):
    if wanted(draft_of(path)) and is_abandoned(path):
      path.unlink(missing_ok=True)
