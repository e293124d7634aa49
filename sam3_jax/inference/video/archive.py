"""Archives of arrays: NumPy's npz files, written array by array, with bfloat16 as its bits."""

import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

from sam3_jax.utils.atomic_files import Draft

_BITS = ".bfloat16"  # ends the names of arrays whose type NumPy's files cannot name


def write_archive(path: str | Path, arrays: Iterable[tuple[str, Any]]) -> None:
  """Writes named arrays; the file appears complete or not at all.

  Raises:
    OSError: the disk is full, or the directory cannot be written; the message names the file.
  """
  with Draft(path) as draft, draft.naming():
    write_arrays(draft.file, arrays)
    draft.commit()


def write_arrays(target: BinaryIO, arrays: Iterable[tuple[str, Any]]) -> None:
  """Writes named arrays to an open file."""
  with zipfile.ZipFile(target, "w") as archive:
    for name, array in arrays:
      array = np.asarray(array)
      if array.dtype == jnp.bfloat16:
        name, array = name + _BITS, array.view(np.uint16)
      with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
        np.lib.format.write_array(file, np.ascontiguousarray(array), allow_pickle=False)


class Archive:
  """A file that `write_archive` wrote, read array by array.

  Raises:
    FileNotFoundError: no such file.
    ValueError: it is not such a file, or an array in it is damaged.
  """

  def __init__(self, path: str | Path):
    self._path = path
    try:
      self._stream = Path(path).open("rb")  # noqa: SIM115, closed by `__exit__`
    except FileNotFoundError:
      raise FileNotFoundError(f"there is no file {path}: check the path.") from None
    try:
      self._file: Any = np.load(self._stream, allow_pickle=False)
      self._names = {name.removesuffix(_BITS): name for name in self._file.files}
    except (ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
      self._stream.close()
      raise ValueError(f"{path} is damaged, or is not the file of a video session.") from error

  def __enter__(self) -> "Archive":
    return self

  def __exit__(self, *_: object) -> None:
    self._file.close()
    self._stream.close()

  def __iter__(self) -> Iterator[str]:
    return iter(self._names)

  def __contains__(self, name: str) -> bool:
    return name in self._names

  def __getitem__(self, name: str) -> np.ndarray:
    stored = self._names[name]
    try:
      array = self._file[stored]
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
      raise ValueError(
        f"{self._path} is damaged at {stored} ({error}): remove it to start again."
      ) from error
    return array.view(jnp.bfloat16) if stored.endswith(_BITS) else array
