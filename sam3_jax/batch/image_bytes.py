"""Reads the bytes of an image, and the identity of the file.

An image is read once: the bytes that are decoded are also the bytes whose identity is recorded and
compared later. A file that is not the listed one, or that changes while it is read, is not used.
"""

import hashlib
import os
import stat
from typing import NamedTuple

from sam3_jax.storage.faults import ChangedError
from sam3_jax.storage.store import locate
from sam3_jax.storage.urls import is_url
from sam3_jax.utils.identity import FileIdentity


class ImageFile(NamedTuple):
  """Where an image is stored.

  Attributes:
    name: used in results and messages.
    path: the path or URL of the file that contains it.
    span: offset and number of bytes in that file; None for the whole file.
    expected: identity of the file when it was listed; None if unknown.
  """

  name: str
  path: str
  span: tuple[int, int] | None = None
  expected: FileIdentity | None = None


class NotAFileError(ValueError):
  """The path is not a regular file."""

  def __init__(self, message: str, identity: FileIdentity):
    super().__init__(message)
    self.identity = identity


class FileChangedError(OSError):
  """The file has changed since it was listed."""


def read_image_bytes(file: ImageFile) -> tuple[bytes, FileIdentity]:
  """Reads the bytes of an image.

  Returns:
    The bytes, and their identity with the SHA-256. For a member of a tar file: size and content of
    the member, modification time or version of the tar file.

  Raises:
    OSError: the file cannot be read, or has changed since it was listed.
    NotAFileError: it is a directory, FIFO, socket or device, which is not opened for reading.
  """
  if is_url(file.path):
    return _read_object(file)
  _check_kind(file, os.stat(file.path))
  # Without O_NONBLOCK, a FIFO that has replaced the file would block until someone writes to it.
  descriptor = os.open(file.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
  with open(descriptor, "rb", buffering=0) as source:
    before = os.fstat(descriptor)
    _check_kind(file, before)
    size = before.st_size if file.span is None else file.span[1]
    expected = file.expected
    if expected and (size, before.st_mtime_ns) != (expected.size, expected.modified):
      raise FileChangedError(f"{file.name} has changed since it was listed")
    if file.span is not None:
      source.seek(file.span[0])
    data = _read(source, size)
    after = os.fstat(descriptor)
  if len(data) != size or (after.st_size, after.st_mtime_ns) != (
    before.st_size,
    before.st_mtime_ns,
  ):
    raise FileChangedError(f"{file.name} changed while it was read, or its file ends before it")
  return data, FileIdentity(size, before.st_mtime_ns, hashlib.sha256(data).hexdigest())


def _read_object(file: ImageFile) -> tuple[bytes, FileIdentity]:
  store, where = locate(file.path)
  start, stop = (0, None) if file.span is None else (file.span[0], sum(file.span))
  version = file.expected.version if file.expected else ""
  try:
    data, version = store.read(where, start, stop, version)
  except ChangedError:
    raise FileChangedError(f"{file.name} has changed since it was listed") from None
  size = len(data) if file.span is None else file.span[1]
  if len(data) != size or (file.expected and size != file.expected.size):
    raise FileChangedError(f"{file.name} has changed since it was listed")
  return data, FileIdentity(size, 0, hashlib.sha256(data).hexdigest(), version)


def _read(source, size: int) -> bytes:
  data = bytearray()
  while len(data) < size and (chunk := source.read(size - len(data))):
    if len(chunk) == size:  # the usual case; only some network mounts return less
      return chunk
    data += chunk
  return bytes(data)


def _check_kind(file: ImageFile, status: os.stat_result) -> None:
  if not stat.S_ISREG(status.st_mode):
    kinds = {stat.S_IFDIR: "directory", stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket"}
    kind = kinds.get(stat.S_IFMT(status.st_mode), "device")
    raise NotAFileError(
      f"{file.name} is a {kind}, not a file with an image", FileIdentity.from_stat(status)
    )
