"""The bytes of an image, and the identity of what was read.

An image is read once: what is decoded, what is recorded and what is compared later are the same
bytes. If the file is not the one that was listed, or changes while it is read, it is not used.
"""

import hashlib
import os
import stat
from typing import NamedTuple

from sam3_jax.utils.identity import FileIdentity


class File(NamedTuple):
  """Where an image is.

  Attributes:
    name: what it is called in the results and messages.
    path: the file that it is in.
    span: where in that file, offset and bytes; None for all of it.
    expected: what it was when it was listed; None if that is not known.
  """

  name: str
  path: str
  span: tuple[int, int] | None = None
  expected: FileIdentity | None = None


class NotAFileError(ValueError):
  """Something else than a regular file."""

  def __init__(self, message: str, identity: FileIdentity):
    super().__init__(message)
    self.identity = identity


class ChangedError(OSError):
  """A file is not the one that was listed."""


def fetch(file: File) -> tuple[bytes, FileIdentity]:
  """Reads an image's bytes.

  Returns:
    The bytes, and their identity with the SHA-256. Of a member of a tar file: the member's size and
    content, the tar file's modification time.

  Raises:
    OSError: it cannot be read, or is not what was listed.
    NotAFileError: a directory, FIFO, socket or device, which is not opened for reading.
  """
  _check_kind(file, os.stat(file.path))
  # A FIFO that has replaced the file would block until someone writes to it.
  descriptor = os.open(file.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
  with open(descriptor, "rb", buffering=0) as source:
    before = os.fstat(descriptor)
    _check_kind(file, before)
    size = before.st_size if file.span is None else file.span[1]
    expected = file.expected
    if expected and (size, before.st_mtime_ns) != (expected.size, expected.modified):
      raise ChangedError(f"{file.name} has changed since it was listed")
    if file.span is not None:
      source.seek(file.span[0])
    data = _read(source, size)
    after = os.fstat(descriptor)
  if len(data) != size or (after.st_size, after.st_mtime_ns) != (
    before.st_size,
    before.st_mtime_ns,
  ):
    raise ChangedError(f"{file.name} changed while it was read, or its file ends before it")
  return data, FileIdentity(size, before.st_mtime_ns, hashlib.sha256(data).hexdigest())


def _read(source, size: int) -> bytes:
  data = bytearray()
  while len(data) < size and (some := source.read(size - len(data))):
    if len(some) == size:  # as ever, but on a few network mounts
      return some
    data += some
  return bytes(data)


def _check_kind(file: File, status: os.stat_result) -> None:
  if not stat.S_ISREG(status.st_mode):
    kinds = {stat.S_IFDIR: "directory", stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket"}
    kind = kinds.get(stat.S_IFMT(status.st_mode), "device")
    raise NotAFileError(
      f"{file.name} is a {kind}, not a file with an image", FileIdentity.from_stat(status)
    )
