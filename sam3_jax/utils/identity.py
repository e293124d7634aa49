"""Identities: which content a name stood for, and what changed between two lists of files.

A job, a run, a cache entry and a saved embedding outlive the files that they were made of. Each
keeps the identities of its inputs and compares them, never names or counts, before it is continued.

- A file: size and modification time, from one `stat`; the SHA-256 of the content where it was read.
- A list of files: their identities by name, and one digest over all of them.
- A checkpoint: one digest over parameters, configuration and tokenizer. Two conversions of the same
  weights have the same one, wherever they are and whatever they are called.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

SHOWN = 3  # files that a message names; the others are counted
SHORT = 12  # characters of an identity in a message


@dataclasses.dataclass(frozen=True, slots=True)
class FileIdentity:
  """Which version of a file a name stood for.

  Attributes:
    size: bytes.
    modified: modification time in nanoseconds since the epoch.
    sha256: hexadecimal digest of the content; empty where it was not read.
  """

  size: int
  modified: int
  sha256: str = ""

  @classmethod
  def from_stat(cls, status: os.stat_result, sha256: str = "") -> Self:
    return cls(status.st_size, status.st_mtime_ns, sha256)

  def matches(self, other: "FileIdentity | None") -> bool:
    """Whether both are the same version: by content where both were read, else by `stat`."""
    if other is None:
      return False
    if self.sha256 and other.sha256:
      return self.sha256 == other.sha256
    return (self.size, self.modified) == (other.size, other.modified)


def identify(path: str | Path, *, content: bool = False) -> FileIdentity | None:
  """The identity of a local file; None if there is no such file.

  Args:
    path: follows links.
    content: read the file and add the SHA-256 of its content.

  Raises:
    OSError: it cannot be examined or read.
  """
  try:
    status = os.stat(path)
    return FileIdentity.from_stat(status, file_sha256(path) if content else "")
  except (FileNotFoundError, NotADirectoryError):
    return None


def file_sha256(path: str | Path) -> str:
  """Hexadecimal SHA-256 of a file's content."""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def digest(values: Any) -> str:
  """Hexadecimal SHA-256 of plain values (numbers, strings, lists, dicts with string keys)."""
  text = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
  return hashlib.sha256(text.encode()).hexdigest()


def checkpoint_identity(
  parameters: Mapping[str, Mapping[str, Any]], model: Mapping[str, Any], tokenizer: bytes
) -> str:
  """One digest for everything in a checkpoint that decides its results.

  Args:
    parameters: `shape`, `dtype` and `sha256` of each, by path, as the manifest has them.
    model: the model configuration as plain values.
    tokenizer: the bytes of tokenizer.model.
  """
  arrays = {
    name: [list(entry["shape"]), entry["dtype"], entry["sha256"]]
    for name, entry in parameters.items()
  }
  return digest([arrays, model, hashlib.sha256(tokenizer).hexdigest()])


def changes(
  then: Mapping[str, FileIdentity | None], now: Mapping[str, FileIdentity | None]
) -> list[str]:
  """What changed between two lists of files, in words, a clause a kind of change.

  Args:
    then, now: identities by name; None for a file that was not there.

  Returns:
    Such as `2 files added (c.jpg, d.jpg)`; an empty list if all names stand for the same content.
  """
  modified = [name for name in then.keys() & now.keys() if not _same(then[name], now[name])]
  modified.sort()
  kinds = (
    ("added", sorted(now.keys() - then.keys())),
    ("removed", sorted(then.keys() - now.keys())),
    ("modified", modified),
  )
  return [named(f"file {kind}", f"files {kind}", names) for kind, names in kinds if names]


def named(one: str, many: str, names: Sequence[str]) -> str:
  """Such as `2 images (a.jpg, b.jpg)`, with the first `SHOWN` names."""
  more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
  what = f"1 {one}" if len(names) == 1 else f"{len(names):,} {many}"
  return f"{what} ({', '.join(names[:SHOWN])}{more})"


def _same(then: FileIdentity | None, now: FileIdentity | None) -> bool:
  return now is None if then is None else then.matches(now)


@dataclasses.dataclass(frozen=True)
class Origin:
  """Which checkpoint made an embedding. Two are equal if their identities are.

  Attributes:
    identity: of the checkpoint; empty if unknown.
    name: of the checkpoint, for messages.
  """

  identity: str = ""
  name: str = dataclasses.field(default="", compare=False)

  def __str__(self) -> str:
    return f"{self.name or 'a checkpoint without a name'} ({self.identity[:SHORT]})"
