"""Reads the bytes of an image, and the identity of the file.

An image is read once: the bytes that are decoded are also the bytes whose identity is recorded and
compared later. A file that is not the listed one, or that changes while it is read, is not used.
"""

import contextlib
import dataclasses
import hashlib
import os
import stat
from collections.abc import Iterator
from typing import NamedTuple

from sam3_jax.batch.record_files.columns import DamagedRecordError, RecordKey
from sam3_jax.batch.record_files.example_columns import image_bytes
from sam3_jax.batch.record_files.open_files import read_record
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
    record: the record of that file that has the image; None if the file or the span is the image.
  """

  name: str
  path: str
  span: tuple[int, int] | None = None
  expected: FileIdentity | None = None
  record: RecordKey | None = None


class UnusableFileError(ValueError):
  """There is no image at the path, and another attempt will not help."""

  def __init__(self, message: str, identity: FileIdentity):
    super().__init__(message)
    self.identity = identity


class NotAFileError(UnusableFileError):
  """The path is not a regular file."""


class FileChangedError(OSError):
  """The file has changed since it was listed."""


def read_image_bytes(file: ImageFile) -> tuple[bytes, FileIdentity]:
  """Reads the bytes of an image.

  Returns:
    The bytes, and their identity with the SHA-256. For a member of a tar file: size and content of
    the member, modification time or version of the tar file. For a record: content of the image;
    size of the record if its span is known, else of the file; time or version of the file.

  Raises:
    OSError: the file cannot be read, or has changed since it was listed.
    NotAFileError: it is a directory, FIFO, socket or device, which is not opened for reading.
    UnusableFileError: the record is damaged.
  """
  if is_url(file.path):
    return _read_object(file)
  _check_kind(file, os.stat(file.path))
  if file.record is not None and file.span is None:
    return _read_record(file, file.record)
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
  if file.record is not None:
    with _naming_damage(file, FileIdentity(size, before.st_mtime_ns)):
      data = image_bytes(data, file.record.column)
  return data, FileIdentity(size, before.st_mtime_ns, hashlib.sha256(data).hexdigest())


def _read_record(file: ImageFile, record: RecordKey) -> tuple[bytes, FileIdentity]:
  """Reads an image from a record without a known span."""
  before = os.stat(file.path)
  listed = file.expected
  if listed and (before.st_size, before.st_mtime_ns) != (listed.size, listed.modified):
    raise FileChangedError(f"{file.name} has changed since it was listed")
  with _naming_damage(file, FileIdentity.from_stat(before)):
    version = f"{before.st_ino} {before.st_size} {before.st_mtime_ns}"
    data = read_record(file.path, record, version)
  after = os.stat(file.path)
  if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
    raise FileChangedError(f"{file.name} changed while it was read")
  return data, FileIdentity.from_stat(before, hashlib.sha256(data).hexdigest())


@contextlib.contextmanager
def _naming_damage(file: ImageFile, identity: FileIdentity) -> Iterator[None]:
  try:
    yield
  except DamagedRecordError as error:
    raise UnusableFileError(f"{file.name}: {error}", identity) from error


def _read_object_record(file: ImageFile, record: RecordKey) -> tuple[bytes, FileIdentity]:
  """Reads an image from a record of an object, without a known span."""
  expected = file.expected or FileIdentity(0, 0)
  identity = FileIdentity(expected.size, 0, "", expected.version)
  try:
    with _naming_damage(file, identity):
      data = read_record(file.path, record, expected.version)
  except ChangedError:
    raise FileChangedError(f"{file.name} has changed since it was listed") from None
  return data, dataclasses.replace(identity, sha256=hashlib.sha256(data).hexdigest())


def _read_object(file: ImageFile) -> tuple[bytes, FileIdentity]:
  if file.record is not None and file.span is None:
    return _read_object_record(file, file.record)
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
  if file.record is not None:
    with _naming_damage(file, FileIdentity(size, 0, "", version)):
      data = image_bytes(data, file.record.column)
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
