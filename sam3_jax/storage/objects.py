"""Objects and prefixes with the methods of `pathlib` that a job needs."""

import fnmatch
import io
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Self

from sam3_jax.storage.store import ABSENT, Entry, Store, locate
from sam3_jax.storage.urls import Location, is_url, parse
from sam3_jax.utils.paths import resolve_path

BUFFER = 2**20  # bytes read at a time


class ObjectPath:
  """An object, or a prefix of objects, that may not exist. Typed as `Path` where both are used."""

  def __init__(self, url: "str | ObjectPath"):
    self._store, self.location = locate(str(url))

  @classmethod
  def _at(cls, store: Store, location: Location) -> Self:
    path = cls.__new__(cls)
    path._store, path.location = store, location
    return path

  def __truediv__(self, name: str) -> Self:
    return self._at(
      self._store, self.location._replace(name=f"{self.location.name}/{name}".strip("/"))
    )

  def __str__(self) -> str:
    return str(self.location)

  def __repr__(self) -> str:
    return f"ObjectPath({str(self)!r})"

  def __eq__(self, other: object) -> bool:
    return isinstance(other, ObjectPath) and self.location == other.location

  def __reduce__(self):
    return ObjectPath, (self.location.url,)

  def __hash__(self) -> int:
    return hash(self.location)

  @property
  def name(self) -> str:
    return PurePosixPath(self.location.name).name

  @property
  def suffix(self) -> str:
    return PurePosixPath(self.location.name).suffix

  @property
  def parent(self) -> Self:
    return self._at(self._store, self.location._replace(name=self.location.name.rpartition("/")[0]))

  def with_name(self, name: str) -> Self:
    return self.parent / name

  def with_suffix(self, suffix: str) -> Self:
    return self.with_name(str(PurePosixPath(self.name).with_suffix(suffix)))

  def entry(self) -> Entry | None:
    """Describes the object; None if there is none."""
    return self._store.stat(self.location)

  def exists(self) -> bool:
    return self.entry() is not None

  is_file = exists

  def read_bytes(self) -> bytes:
    return self._store.read(self.location)[0]

  def read_versioned(self) -> tuple[bytes, str]:
    """The content and its version."""
    return self._store.read(self.location)

  def read_range(self, start: int, stop: int, version: str = "") -> bytes:
    """Bytes of a version of the object; raises `ChangedError` if it has another one."""
    return self._store.read(self.location, start, stop, version)[0]

  def open(self, mode: str = "rb", buffering: int = BUFFER) -> BinaryIO:
    """Opens the object to read one version of it, `buffering` bytes at a time."""
    if mode != "rb":
      raise ValueError(f"objects are opened with mode 'rb'; got {mode!r}")
    return io.BufferedReader(_Reader(self._store, self.location), buffering)

  def glob(self, pattern: str) -> Iterator[Self]:
    """The objects directly below the prefix whose names match, at one moment."""
    start = re.split(r"[*?\[]", pattern, maxsplit=1)[0]
    prefix = f"{self.location.name}/".lstrip("/")
    where = self.location._replace(name=prefix + start)
    for entry in self._store.entries(where):
      name = entry.name[len(prefix) :]
      if "/" not in name and fnmatch.fnmatchcase(name, pattern):
        yield self / name

  def write(self, data: bytes, expected: str | None = None) -> str:
    """Writes the object; see `Store.write`."""
    return self._store.write(self.location, data, expected)

  def create(self, data: bytes) -> str:
    """Writes the object unless it exists; raises `ChangedError` if it does."""
    return self._store.write(self.location, data, ABSENT)

  def upload(self, file: Path) -> None:
    self._store.upload(self.location, file)

  def unlink(self, missing_ok: bool = True, version: str = "") -> None:
    """Deletes the object, or does nothing if it does not exist or has another version."""
    self._store.delete(self.location, version)

  def mkdir(self, **_: Any) -> None:
    """Does nothing: prefixes need not be created."""


class _Reader(io.RawIOBase):
  """Reads one version of an object by ranges."""

  def __init__(self, store: Store, location: Location):
    entry = store.stat(location)
    if entry is None:
      raise FileNotFoundError(2, "there is no such object", str(location))
    self._store, self._location, self._entry, self._offset = store, location, entry, 0

  def readable(self) -> bool:
    return True

  def seekable(self) -> bool:
    return True

  def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
    start = {io.SEEK_SET: 0, io.SEEK_CUR: self._offset, io.SEEK_END: self._entry.size}[whence]
    self._offset = max(0, start + offset)
    return self._offset

  def tell(self) -> int:
    return self._offset

  def readinto(self, buffer: Any) -> int:
    stop = min(self._offset + len(buffer), self._entry.size)
    data, _ = self._store.read(self._location, self._offset, stop, self._entry.version)
    buffer[: len(data)] = data
    self._offset += len(data)
    return len(data)


def open_binary(path: str | Path) -> BinaryIO:
  """Opens a local file or an object to read it."""
  return ObjectPath(str(path)).open() if is_url(path) else open(path, "rb")


def read_file(path: str | Path) -> bytes:
  """The content of a local file or an object."""
  return ObjectPath(str(path)).read_bytes() if is_url(path) else Path(path).read_bytes()


def resolve(path: str | Path) -> Path:
  """A local path, or an `ObjectPath`, typed as `Path`.

  Raises:
    ImportError: the package for the scheme is missing.
    ValueError: the scheme is not supported.
  """
  if not is_url(path):
    return resolve_path(path)
  remote: Any = ObjectPath(parse(path).url)
  return remote


def object_path(path: Any) -> ObjectPath | None:
  """The path if it is an object, or else None."""
  return path if isinstance(path, ObjectPath) else None
