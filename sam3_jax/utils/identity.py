"""Identities of files and checkpoints, and differences between two lists of files.

Jobs, runs, cache entries and saved embeddings may outlive the files they were made from. Each
stores the identities of its inputs and compares them before it is resumed or used.

- File: size and modification time, and the SHA-256 of its content if it was read.
- Object in a bucket: the same, with its generation or ETag in place of the time.
- List of files: their identities by name, and one digest over all of them.
- Checkpoint: one digest over parameters, configuration and tokenizer. Two conversions of the same
  weights have the same digest, whatever their paths and names.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

SHOWN = 3  # files named in a message
SHORT = 12  # characters of an identity in a message


@dataclasses.dataclass(frozen=True, slots=True)
class FileIdentity:
  """The identity of one version of a file.

  Attributes:
    size: bytes.
    modified: modification time in nanoseconds since the epoch; 0 for an object in a bucket.
    sha256: hexadecimal digest of the content; empty if it was not read.
    version: generation or ETag of an object in a bucket; empty for a local file.
  """

  size: int
  modified: int
  sha256: str = ""
  version: str = ""

  @classmethod
  def from_stat(cls, status: os.stat_result, sha256: str = "") -> Self:
    return cls(status.st_size, status.st_mtime_ns, sha256)

  def matches(self, other: "FileIdentity | None") -> bool:
    """Whether both are the same version: by content if both were read, or else by `stat`."""
    if other is None:
      return False
    if self.sha256 and other.sha256:
      return self.sha256 == other.sha256
    return self.same_stat(other)

  def same_stat(self, other: "FileIdentity") -> bool:
    """Whether size, time and version are equal."""
    return (self.size, self.modified, self.version) == (other.size, other.modified, other.version)


def identify(path: str | Path, *, content: bool = False) -> FileIdentity | None:
  """The identity of a local file; None if there is no such file.

  Args:
    path: of the file; symbolic links are followed.
    content: read the file and add the SHA-256 of its content.

  Raises:
    OSError: the file cannot be examined or read.
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
  """One digest of everything in a checkpoint that determines its results.

  Args:
    parameters: `shape`, `dtype` and `sha256` of each parameter, by path, as in the manifest.
    model: the model configuration as plain values.
    tokenizer: the bytes of tokenizer.model.
  """
  arrays = {
    name: [list(entry["shape"]), entry["dtype"], entry["sha256"]]
    for name, entry in parameters.items()
  }
  return digest([arrays, model, hashlib.sha256(tokenizer).hexdigest()])


def changes(
  before: Mapping[str, FileIdentity | None], after: Mapping[str, FileIdentity | None]
) -> list[str]:
  """Describes the differences between two lists of files, one clause for each kind of change.

  Args:
    before, after: identities by name; None for a file that did not exist.

  Returns:
    Clauses such as `2 files added (c.jpg, d.jpg)`; an empty list if all files are the same.
  """
  common = before.keys() & after.keys()
  kinds = (
    ("added", sorted(after.keys() - before.keys())),
    ("removed", sorted(before.keys() - after.keys())),
    ("modified", sorted(name for name in common if not _same(before[name], after[name]))),
  )
  return [named(f"file {kind}", f"files {kind}", names) for kind, names in kinds if names]


def named(singular: str, plural: str, names: Sequence[str]) -> str:
  """A count with the first `SHOWN` names, such as `2 images (a.jpg, b.jpg)`."""
  more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
  what = f"1 {singular}" if len(names) == 1 else f"{len(names):,} {plural}"
  return f"{what} ({', '.join(names[:SHOWN])}{more})"


def _same(before: FileIdentity | None, after: FileIdentity | None) -> bool:
  return after is None if before is None else before.matches(after)


@dataclasses.dataclass(frozen=True)
class Origin:
  """The checkpoint that computed an embedding. Two origins are equal if their identities are.

  Attributes:
    identity: the checkpoint's digest; empty if unknown.
    name: the checkpoint's name, for messages.
  """

  identity: str = ""
  name: str = dataclasses.field(default="", compare=False)

  def __str__(self) -> str:
    return f"{self.name or 'a checkpoint without a name'} ({self.identity[:SHORT]})"
