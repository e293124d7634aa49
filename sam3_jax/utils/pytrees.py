"""Base classes of the package's pytrees: slicing along the first axis, saving and loading."""

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import jax
import numpy as np
from jax.core import Tracer

from sam3_jax.utils.identity import Origin

# Version 1 has no header and does not name the checkpoint; version 2 has fields of older names.
FORMAT_VERSION = "3"
_OLD_VERSIONS = ("1", "2")


class Sliceable:
  """A pytree of arrays that share their first axis; `[...]` selects along it."""

  def __getitem__(self, index) -> Self:
    """Selects along the first axis, which stays. `index` is a slice, an integer array or a bool
    array.

    Raises:
      TypeError: `index` is a single integer.
      IndexError: an index out of range, or a bool array of the wrong length.
    """
    if not isinstance(index, slice):
      if isinstance(index, list):
        index = np.asarray(index, None if index else int)
      if np.ndim(index) == 0:
        raise TypeError(
          f"use [{index}:{index + 1}] rather than [{index}]: the first axis must stay."
        )
      _check_index(index, len(self))
    return jax.tree.map(lambda array: array[index], self)

  def __len__(self) -> int:
    return jax.tree.leaves(self)[0].shape[0]


def _check_index(index: Any, length: int) -> None:
  """Raises where JAX would silently clamp the index to the last row."""
  if isinstance(index, Tracer):
    return
  values = np.asarray(index)
  if values.dtype == bool and values.shape != (length,):
    raise IndexError(f"there are {length} rows; got bools of shape {list(values.shape)}.")
  if values.dtype.kind in "iu" and values.size:
    lowest, highest = values.min(), values.max()
    if not -length <= lowest <= highest < length:
      wrong = highest if highest >= length else lowest
      raise IndexError(f"there is no row {wrong}: there are {length}.")


class Saveable(Sliceable):
  """A sliceable pytree with `save` and `load`; some of its fields may be None.

  A file is safetensors with a header: the class, the version of the file format, and the checkpoint
  that made the arrays if the class has an `origin`.
  """

  # Fields that may be None: their class, or None for a single array.
  OPTIONAL: ClassVar[Mapping[str, type["Saveable"] | None]] = {}
  # Fields that had another name before version 3, by that name.
  RENAMED: ClassVar[Mapping[str, str]] = {}

  def save(self, path: str | Path) -> None:
    """Writes a safetensors file, bit for bit, any dtype."""
    from safetensors.flax import save_file

    arrays, header = self._content()
    save_file(arrays, str(path), header)

  @classmethod
  def load(cls, path: str | Path) -> Self:
    """Reads a file that `save` wrote.

    Warns (UserWarning) if the file is of version 1, which does not name its checkpoint.

    Raises:
      FileNotFoundError: no such file.
      ValueError: it holds something else, or a later version of sam3-jax wrote it.
    """
    header, arrays = cls._read(path)
    names = cls._names()
    parts = {
      part: {part} if kind is None else kind._names(f"{part}.")
      for part, kind in cls.OPTIONAL.items()
    }
    present = {part: inner for part, inner in parts.items() if inner <= set(arrays)}
    if set(arrays) != names.union(*present.values()):
      raise ValueError(
        f"{path} holds {sorted(arrays)}, but {cls.__name__} has {sorted(names)}; "
        "load it with the class that saved it."
      )
    fields: dict[str, Any] = {name: arrays[name] for name in names}
    for part, inner in present.items():
      values = {name.removeprefix(f"{part}."): arrays[name] for name in inner}
      kind = cls.OPTIONAL[part]
      fields[part] = arrays[part] if kind is None else kind(**values)
    loaded = cls(**fields, **cls._from_header(header))
    return loaded if header else loaded._upgrade(path)

  @classmethod
  def _read(cls, path: str | Path) -> tuple[dict[str, str], dict[str, Any]]:
    """The header and the arrays of a file, under the names of the current version."""
    from safetensors import SafetensorError, safe_open

    try:
      with safe_open(str(path), framework="flax") as file:
        header = file.metadata() or {}
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
      raise ValueError(f"{path} is not a file that {cls.__name__}.save wrote: {error}.") from error
    version = header.get("format_version", "1")
    if version == FORMAT_VERSION:
      return header, arrays
    if version not in _OLD_VERSIONS:
      raise ValueError(
        f"{path} has format version {version!r:.20}, and this sam3-jax reads versions up to "
        f"{FORMAT_VERSION}: update sam3-jax, or save the file again."
      )
    return header, {cls.RENAMED.get(name, name): array for name, array in arrays.items()}

  def _content(self) -> tuple[dict[str, Any], dict[str, str]]:
    """The arrays and the header of a file."""
    leaves = jax.tree_util.tree_leaves_with_path(self)
    keys = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    header = {"class": type(self).__name__, "format_version": FORMAT_VERSION}
    return keys, header | self._header()

  def _header(self) -> dict[str, str]:
    """The fields that are not arrays, as entries of the header."""
    if (origin := getattr(self, "origin", None)) is None:
      return {}
    return {"checkpoint": origin.identity, "checkpoint_name": origin.name}

  @classmethod
  def _from_header(cls, header: Mapping[str, str]) -> dict[str, Any]:
    """The inverse of `_header`."""
    if "origin" not in cls._fields():
      return {}
    return {"origin": Origin(header.get("checkpoint", ""), header.get("checkpoint_name", ""))}

  def _upgrade(self, path: str | Path) -> Self:
    """Converts the content of a file of version 1."""
    if "origin" in self._fields():
      warnings.warn(
        f"{path} does not name the checkpoint that made it, so decode cannot check that it is its "
        "own: encode again with this version of sam3-jax, and save.",
        stacklevel=3,
      )
    return self

  @classmethod
  def _fields(cls) -> dict[str, bool]:
    """Whether each field is an array, by name."""
    fields = dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]
    return {field.name: field.metadata.get("pytree_node", True) for field in fields}

  @classmethod
  def _names(cls, prefix: str = "") -> set[str]:
    """The names of the arrays that a file must hold."""
    fields = (name for name, is_array in cls._fields().items() if is_array)
    return {prefix + name for name in fields if name not in cls.OPTIONAL}
