"""Files that appear under their name complete and on the disk, or not at all; and JSON, read with
care.

Everything that outlives the process is written with this module, or as a directory with
`writer.NewFolder`.
"""

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Self

from sam3_jax.lease import draft_path, sync_directory

MAX_JSON = 64 * 2**20  # bytes; the manifest of the released model has 0.7 million
_NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS}  # of file systems that cannot


class Draft:
  """A file under another name until `commit`; leaving `with` before that leaves nothing behind.

  with Draft(path) as draft:
    draft.file.write(data)
    draft.commit()

  The other name has a random part: no other process writes to it, on whichever host. Errors name
  `path` and the reason.
  """

  def __init__(self, path: str | Path):
    """Opens the file under its other name, in the same directory, which is made if need be."""
    self.path = Path(path)
    self._draft = draft_path(self.path)
    with self.naming():
      self.path.parent.mkdir(parents=True, exist_ok=True)
      self.file: BinaryIO = self._draft.open("xb")

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self.discard()

  def write(self, data: bytes) -> None:
    with self.naming():
      self.file.write(data)

  def sync(self) -> None:
    """Has the disk know the content, under the other name."""
    with self.naming():
      self.file.flush()
      sync(self.file.fileno())
      self.file.close()

  def commit(self) -> None:
    """Makes the file appear, in place of the one that may be there."""
    with self.naming():
      if not self.file.closed:
        self.sync()
      self._draft.replace(self.path)
      sync_directory(self.path.parent)

  def discard(self) -> None:
    """Forgets what was not committed."""
    with contextlib.suppress(OSError):  # closing writes what is left; perhaps the disk is full
      self.file.close()
    with contextlib.suppress(OSError):
      self._draft.unlink()

  @contextlib.contextmanager
  def naming(self) -> Iterator[None]:
    """Gives an OSError the name of the file that was to be written."""
    try:
      yield
    except OSError as error:  # which names the draft, or nothing
      raise OSError(error.errno, error.strerror or str(error), str(self.path)) from error


def sync(descriptor: int) -> None:
  """Has the disk know a file's content; raises OSError unless the file system cannot do that."""
  try:
    os.fsync(descriptor)
  except OSError as error:
    if error.errno not in _NO_SYNC:
      raise


def write_bytes(path: str | Path, data: bytes) -> None:
  """Writes a file at once; raises OSError with its name and the reason."""
  with Draft(path) as draft:
    draft.write(data)
    draft.commit()


def write_json(path: str | Path, values: Any, *, indent: int | None = None) -> None:
  """Writes plain values at once; raises ValueError if a number is not finite."""
  write_bytes(path, json_bytes(values, indent=indent))


def json_bytes(values: Any, *, indent: int | None = None, allow_nan: bool = False) -> bytes:
  """Plain values as JSON, with a newline at the end."""
  return json.dumps(values, indent=indent, allow_nan=allow_nan).encode() + b"\n"


def parse_json(data: bytes | str) -> Any:
  """Plain values of a JSON text.

  Raises:
    ValueError: it is not JSON, too large, nested too deeply, or has a key twice in an object.
  """
  if len(data) > MAX_JSON:
    raise ValueError(f"it is larger than {MAX_JSON // 2**20} MB")
  try:
    return json.loads(data, object_pairs_hook=_unique)
  except RecursionError:
    raise ValueError("it is nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  values = dict(pairs)
  if len(values) < len(pairs):
    seen: set[str] = set()
    twice = next(key for key, _ in pairs if key in seen or seen.add(key))
    raise ValueError(f"the key {twice!r:.80} occurs twice in an object")
  return values
