"""Lists images and videos in buckets, datasets and on web servers, with their versions."""

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TextIO

from sam3_jax.inputs.image_listing import is_image, is_result
from sam3_jax.storage.find import find_objects
from sam3_jax.storage.objects import open_binary
from sam3_jax.storage.store import Entry, locate
from sam3_jax.storage.urls import is_url, parse, redact
from sam3_jax.utils.identity import FileIdentity
from sam3_jax.utils.notes import ListingNotes

READERS = 32  # threads that ask for the versions of listed objects
ALLOW_HTTPS = "--allow-https"


class ListedObject(NamedTuple):
  """A listed object: its name in the results, its URL, and its identity."""

  name: str
  url: str
  identity: FileIdentity


class Listing(NamedTuple):
  """The objects that a URL names, and whether it is a prefix of their names."""

  objects: Iterator[ListedObject]
  directory: bool


def list_objects(
  url: str,
  notes: ListingNotes,
  *,
  allow_https: bool,
  wanted: Callable[[str, ListingNotes], bool] = is_image,
  option: str = "--images",
) -> Listing:
  """The images below a prefix, matches of a pattern, or one object, in the order of their names.

  Args:
    url: see `find_objects`.
    notes: counts objects that are left out.
    allow_https: whether web servers may be asked.
    wanted: tells by their names which objects below a prefix are inputs, and counts the others.
    option: named in errors.

  Raises:
    FileNotFoundError: there is no such object or prefix.
    ValueError: the listing fails, or `allow_https` is needed.
  """
  check_allowed(url, allow_https)
  try:
    found = find_objects(url)
  except FileNotFoundError:
    raise
  except OSError as error:
    raise ValueError(f"{error}; check {option}.") from error
  wanted = wanted if found.directory else _is_input
  objects = (
    ListedObject(one.name, one.where.url, identity_of(one.entry))
    for one in found.objects
    if wanted(one.name, notes)
  )
  return Listing(_named(objects, option), found.directory)


def check_allowed(url: str, allow_https: bool) -> None:
  """Raises ValueError if the URL is not supported, or is on a web server and those may not be
  asked."""
  if parse(url).scheme in ("http", "https") and not allow_https:
    raise ValueError(f"{redact(url)} is on a web server; add {ALLOW_HTTPS} to read it from there.")


def identify_objects(urls: Sequence[str]) -> list[tuple[str, FileIdentity | None]]:
  """For each URL: the URL that always has the same content, and the identity of its object.

  The identity is None if there is no object or it cannot be examined. Local paths are returned with
  None.
  """
  if not any(map(is_url, urls)):
    return [(url, None) for url in urls]
  with ThreadPoolExecutor(READERS) as pool:
    return list(pool.map(_identify, urls))


def identity_of(entry: Entry) -> FileIdentity:
  """The identity of a listed object."""
  return FileIdentity(entry.size, 0, "", entry.version)


def open_text(path: str | Path) -> TextIO:
  """Opens a local text file, or an object with text, in UTF-8."""
  return io.TextIOWrapper(open_binary(path), encoding="utf-8-sig")


def _identify(url: str) -> tuple[str, FileIdentity | None]:
  if not is_url(url):
    return url, None
  try:
    store, where = locate(url)
    where = store.pin(where)
    entry = store.stat(where)
    return where.url, None if entry is None else identity_of(entry)
  except OSError:  # like a missing image, it stays pending until it can be read
    return url, None


def _is_input(name: str, notes: ListingNotes) -> bool:
  return not is_result(name, notes)


def _named(objects: Iterable[ListedObject], option: str) -> Iterator[ListedObject]:
  try:
    yield from objects
  except FileNotFoundError as error:
    raise ValueError(f"{error.filename}: the listing ended early; run again.") from error
  except OSError as error:
    raise ValueError(f"{error}; check {option}.") from error
