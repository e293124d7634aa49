"""Parses URLs of objects, and removes secrets from them."""

import posixpath
import re
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from sam3_jax.utils.paths import scheme_of

WRITABLE = ("gs", "s3")
SCHEMES = (*WRITABLE, "hf", "https", "http")
_LOCALHOST = ("localhost", "127.0.0.1")
_DATASET = re.compile(r"datasets/([\w.-]+/[\w.-]+)(?:@([^/]+))?", re.ASCII)


class Location(NamedTuple):
  """Where an object is.

  Attributes:
    scheme: one of `SCHEMES`.
    bucket: the bucket; `org/name@revision` of a dataset; the host of a web server.
    name: of the object, or a prefix of names; the path and query of a web address.
  """

  scheme: str
  bucket: str
  name: str

  def __str__(self) -> str:
    """The URL, without secrets."""
    return redact(self.url)

  @property
  def url(self) -> str:
    dataset = "datasets/" if self.scheme == "hf" else ""
    return f"{self.scheme}://{dataset}{self.bucket}/{self.name}".rstrip("/")


def is_url(path: str | Path) -> bool:
  """Whether a path has a scheme, supported or not."""
  return scheme_of(path) is not None


def is_object(path: Any) -> bool:
  """Whether a string or a path names an object that may be read without asking: in a bucket or in
  a dataset, also with slashes that `pathlib` has joined (`gs:/bucket/name`)."""
  return isinstance(path, str | Path) and scheme_of(path) in (*WRITABLE, "hf")


def parse(url: str | Path) -> Location:
  """Splits a URL, also one whose slashes `pathlib` has joined (`gs:/bucket/name`).

  Raises:
    ValueError: the scheme is not supported, or there is no bucket.
  """
  scheme = scheme_of(url)
  if scheme not in SCHEMES:
    raise ValueError(
      f"{redact(url)} has an unsupported scheme; give a local path, gs://, s3://, hf://datasets/ "
      "or https://."
    )
  rest = str(url).partition(":")[2].lstrip("/")
  if scheme == "hf":
    found = _DATASET.match(rest)
    if not found or rest[found.end() :][:1] not in ("", "/"):
      raise ValueError(
        f"{redact(url)} does not name a dataset; expected hf://datasets/ORG/NAME, with @REVISION "
        "for another revision than main, and a path in it."
      )
    bucket = f"{found[1]}@{found[2] or 'main'}"
    return Location(scheme, bucket, rest[found.end() + 1 :])
  bucket, _, name = rest.partition("/")
  if not bucket:
    raise ValueError(f"{redact(url)} names no bucket; expected {scheme}://BUCKET/NAME.")
  host = bucket.rpartition("@")[2].partition(":")[0]
  if scheme == "http" and host not in _LOCALHOST:
    raise ValueError(f"{redact(url)} is not encrypted; use https://.")
  return Location(scheme, bucket, name)


def redact(url: str | Path) -> str:
  """A URL without user, password, query and fragment, which may hold signatures; local paths are
  returned as they are."""
  text = str(url)
  if not is_url(text):
    return text
  scheme, _, rest = text.partition(":")
  rest = rest.lstrip("/")
  if scheme.lower() in ("http", "https"):
    parts = urlsplit(f"https://{rest}")
    rest = parts.netloc.rpartition("@")[2] + parts.path
  return f"{scheme}://{rest}"


def join(base: str | Path, name: str) -> str:
  """The path or URL of a name in a list, relative to the directory or prefix of the list.

  Raises:
    ValueError: the list is not local, and the name is an absolute local path.
  """
  if is_url(name):
    return name
  if not is_url(base):
    return str(Path(base) / name)
  if name.startswith("/"):
    raise ValueError(f"{name} is a local path, but the list is in {redact(base)}")
  scheme, _, rest = str(base).partition(":")
  name, question, query = name.partition("?")
  path = posixpath.normpath(f"{rest.strip('/')}/{name}")
  return f"{scheme}://{path}{question}{query}"


def parent(url: str) -> str:
  """The URL of the prefix or directory that holds an object, without a query."""
  return url.partition("?")[0].rpartition("/")[0]
