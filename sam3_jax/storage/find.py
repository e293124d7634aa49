"""Lists the images of a prefix or a pattern, as `image_listing` does for local directories."""

import glob
import re
from collections.abc import Iterator
from typing import NamedTuple

from sam3_jax.storage.store import Entry, Store, locate
from sam3_jax.storage.urls import Location

_TOKEN = re.compile(r"\[!?\]?[^\]]*\]|.", re.DOTALL)


class FoundObject(NamedTuple):
  """An object: its name relative to the prefix, or else its URL; where it is; and what it is."""

  name: str
  where: Location
  entry: Entry


class Prefix(NamedTuple):
  """What a URL names.

  Attributes:
    objects: in the order of their names.
    directory: whether the URL is a prefix of other names.
  """

  objects: Iterator[FoundObject]
  directory: bool


def find_objects(url: str) -> Prefix:
  """Finds the objects that a URL names: one object, all below a prefix, or matches of a pattern.

  The listing is read in pages while the result is iterated. Names are in the order of `sorted`.
  In a pattern, `*` and `?` match no slash, and `**` matches any number of directories.

  Raises:
    FileNotFoundError: there is no such object or prefix, and the URL is not a pattern.
    StoreError: the bucket cannot be listed.
  """
  store, where = locate(url)
  where = store.pin(where)
  web = where.scheme in ("http", "https")
  if glob.has_magic(where.name) and not web:
    return Prefix(_matches(store, where), directory=False)
  if where.name and not where.name.endswith("/") and (entry := store.stat(where)) is not None:
    return Prefix(iter([FoundObject(str(where), where, entry)]), directory=False)
  if web:
    raise FileNotFoundError(f"there is no file {where}; check the address.")
  prefix = where._replace(name=f"{where.name.rstrip('/')}/".lstrip("/"))
  listed = _listed(store, prefix)
  first = next(listed, None)
  if first is None:
    raise FileNotFoundError(f"there is no object or prefix {where}; check the spelling.")
  return Prefix(_below(prefix, first, listed), directory=True)


def _below(prefix: Location, first: Entry, others: Iterator[Entry]) -> Iterator[FoundObject]:
  for entries in ([first], others):
    for entry in entries:
      yield FoundObject(entry.name[len(prefix.name) :], prefix._replace(name=entry.name), entry)


def _matches(store: Store, pattern: Location) -> Iterator[FoundObject]:
  """The objects that match a pattern."""
  start = re.split(r"[*?\[]", pattern.name, maxsplit=1)[0]
  match = re.compile(_translate(pattern.name)).fullmatch
  for entry in _listed(store, pattern._replace(name=start)):
    if match(entry.name):
      where = pattern._replace(name=entry.name)
      yield FoundObject(str(where), where, entry)


def _listed(store: Store, prefix: Location) -> Iterator[Entry]:
  """The objects below a prefix, without those that stand for directories, ordered by name."""
  try:
    files = (entry for entry in store.entries(prefix) if not entry.name.endswith("/"))
    yield from files if store.ordered else sorted(files)
  except FileNotFoundError:  # the hub says so for a directory
    return


def _translate(pattern: str) -> str:
  """A regular expression for a pattern of `glob`."""
  parts = []
  if pattern.endswith("**"):
    pattern += "/*"
  for part in pattern.split("/"):
    if part == "**":
      parts.append("(?:[^/.][^/]*/)*")
    else:
      tokens = _TOKEN.findall(part)
      hidden = "" if part.startswith(".") else r"(?!\.)"
      parts.append(hidden + "".join(map(_token, tokens)) + "/")
  return "".join(parts).removesuffix("/")


def _token(token: str) -> str:
  match token:
    case "*":
      return "[^/]*"
    case "?":
      return "[^/]"
    case _ if len(token) > 2:  # a set such as [a-z] or [!a]
      inner = token[1:-1].replace("\\", r"\\")
      return f"[^/{inner[1:]}]" if inner.startswith("!") else f"[{inner}]"
    case _:
      return re.escape(token)
