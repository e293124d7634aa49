"""The operations on objects. One implementation for each kind of store.

The methods of `Store` block, may be called from any thread, and follow the policy of `retries`.
Implementations override the coroutines, which make one request each and run on the event loop of
fsspec.
"""

import abc
import asyncio
import functools
import importlib
import importlib.util
from collections.abc import AsyncIterable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sam3_jax.storage import retries
from sam3_jax.storage.faults import ChangedError, StoreError
from sam3_jax.storage.urls import WRITABLE, Location, parse

PAGE = 1000  # entries of a listing in one request
# Scheme: module, class, packages and extra.
_STORES = {
  "gs": ("gcs", "CloudStorage", ("gcsfs",), "gcs"),
  "s3": ("s3", "S3", ("s3fs",), "s3"),
  "hf": ("hub", "Hub", ("huggingface_hub", "aiohttp"), "hub"),
  "https": ("web", "Web", ("aiohttp",), "https"),
  "http": ("web", "Web", ("aiohttp",), "https"),
}
ABSENT = ""  # the version of an object that must not exist


class Entry(NamedTuple):
  """An object.

  Attributes:
    name: in its bucket.
    size: bytes.
    version: the generation in Cloud Storage, the ETag elsewhere; empty if the server has none.
    age: seconds since it was written, by the clock of the server; None if unknown.
  """

  name: str
  size: int
  version: str
  age: float | None = None


class Store(abc.ABC):
  """Objects of one scheme.

  Attributes:
    ordered: whether listings are ordered by name.
  """

  ordered = True

  def pin(self, where: Location) -> Location:
    """The location that always has the same content; where there are revisions."""
    return where

  def stat(self, where: Location) -> Entry | None:
    """Describes an object; None if there is none."""
    try:
      return self._attempt(where, lambda _: self._stat(where))
    except FileNotFoundError:
      return None

  def read(
    self, where: Location, start: int = 0, stop: int | None = None, version: str = ""
  ) -> tuple[bytes, str]:
    """Reads bytes `start` to `stop` of an object, and its version.

    Raises:
      FileNotFoundError: there is no such object.
      ChangedError: it has another version than `version`, if that is given.
      StoreError: it cannot be read.
    """
    if stop is not None and stop <= start:
      return b"", version
    data, found = self._attempt(where, lambda _: self._read(where, start, stop, version))
    if version and found and found != version:
      raise ChangedError(where)
    return data, found

  def entries(self, where: Location) -> Iterator[Entry]:
    """The objects whose names begin with `where.name`, a page at a time."""
    token: str | None = ""
    while token is not None:
      request = functools.partial(self._page, where, token)
      found, token = self._attempt(where, lambda _, request=request: request())
      yield from found

  def write(self, where: Location, data: bytes, expected: str | None = None) -> str:
    """Writes an object at once.

    Args:
      where: its location.
      data: its content.
      expected: the version that is replaced; `ABSENT` if there must be none; None for any.

    Returns:
      Its version.

    Raises:
      ChangedError: the object does not have the expected version.
      StoreError: it cannot be written.
    """

    def request(repeated: bool) -> str:
      try:
        return self._run(self._write(where, data, expected))
      except Exception as error:
        # An earlier attempt may have been successful although its answer was lost.
        if repeated and getattr(error, "status", 0) == 412:
          retries.count(1)
          found, version = self._run(self._read(where, 0, None, ""))
          if found == data:
            return version
        raise

    return retries.attempt(where, request)

  def upload(self, where: Location, path: Path) -> None:
    """Writes a file of any size to an object, replacing an existing one."""
    self._attempt(where, lambda _: self._upload(where, path))

  def delete(self, where: Location, version: str = "") -> None:
    """Deletes an object, if it exists and has the version."""
    try:
      self._attempt(where, lambda _: self._delete(where, version))
    except (FileNotFoundError, ChangedError):
      return

  def _attempt(self, where: Location, request: Callable[[bool], Coroutine[Any, Any, Any]]) -> Any:
    return retries.attempt(where, lambda repeated: self._run(request(repeated)))

  def _run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
    from fsspec.asyn import get_loop

    return asyncio.run_coroutine_threadsafe(coroutine, get_loop()).result()

  @abc.abstractmethod
  async def _stat(self, where: Location) -> Entry: ...

  @abc.abstractmethod
  async def _read(
    self, where: Location, start: int, stop: int | None, version: str
  ) -> tuple[bytes, str]: ...

  async def _page(self, where: Location, token: str) -> tuple[list[Entry], str | None]:
    """A page of a listing, and the token of the next one; None if it is the last one."""
    raise StoreError(where, "a web server lists no files; give the address of a file")

  async def _write(self, where: Location, data: bytes, expected: str | None) -> str:
    raise StoreError(where, f"it is read only; write to {' or '.join(f'{s}://' for s in WRITABLE)}")

  async def _upload(self, where: Location, path: Path) -> None:
    await self._write(where, b"", None)

  async def _delete(self, where: Location, version: str) -> None:
    await self._write(where, b"", None)


def store_of(where: Location) -> Store:
  """The store of a location.

  Raises:
    ImportError: its package is missing; names the extra.
  """
  return _store(where.scheme, str(where))


def locate(url: str) -> tuple[Store, Location]:
  """The store and the location of a URL."""
  where = parse(url)
  return store_of(where), where


@functools.cache
def _open(scheme: str) -> Store:
  module, name, _, _ = _STORES[scheme]
  return getattr(importlib.import_module(f"sam3_jax.storage.{module}"), name)()


def _store(scheme: str, url: str) -> Store:
  _, _, packages, extra = _STORES[scheme]
  for package in packages:
    if importlib.util.find_spec(package) is None:
      raise ImportError(f"{url} needs the package {package}: pip install 'sam3-jax[{extra}]'.")
  return _open(scheme)


async def pieces(path: Path, size: int = 2**20) -> AsyncIterable[bytes]:
  """The content of a file, for the body of a request."""
  with path.open("rb") as file:
    while data := file.read(size):
      yield data


def only_once(session: Any) -> None:
  """Keeps aiohttp from repeating a request whose connection was closed, which it does not count."""
  session._retry_connection = False
