"""The files of records that this process reads, kept open between images."""

import collections
import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

from sam3_jax.batch.record_files.array_record import ArrayRecordReader
from sam3_jax.batch.record_files.columns import DamagedRecordError, RecordKey
from sam3_jax.batch.record_files.parquet import ParquetReader

MAX_OPEN = 4  # files; inputs are read in order


class _Reader(Protocol):
  def read(self, row: int) -> bytes: ...

  def close(self) -> None: ...


READERS: dict[str, Callable[[str, str, str], _Reader]] = {
  "array_record": ArrayRecordReader,
  "parquet": ParquetReader,
}


class _Version(NamedTuple):
  """One version of a file, and the column that is read."""

  path: str
  format: str
  column: str
  version: str


class _OpenFile:
  """A reader, and the number of threads that use it."""

  def __init__(self, reader: _Reader):
    self.reader, self.users = reader, 0


_lock = threading.Lock()
_open_files: collections.OrderedDict[_Version, _OpenFile] = collections.OrderedDict()


def read_record(path: str, key: RecordKey, version: str) -> bytes:
  """The bytes of the image of a record; empty if the record has none.

  Args:
    path: or URL of the file.
    key: of the record.
    version: of the file; another version is opened anew.

  Raises:
    DamagedRecordError: the record or the file is damaged.
    OSError: the file cannot be read.
  """
  with _borrowed(_Version(path, key.format, key.column, version)) as reader:
    return reader.read(key.row)


@contextlib.contextmanager
def _borrowed(version: _Version) -> Iterator[_Reader]:
  with _lock:
    found = _open_files.get(version)
    if found is not None:
      found.users += 1
      _open_files.move_to_end(version)
  if found is None:  # without the lock, as opening may hang
    try:
      reader = READERS[version.format](version.path, version.column, version.version)
    except ValueError as error:
      raise DamagedRecordError(str(error)) from error
    with _lock:
      found = _open_files.setdefault(version, _OpenFile(reader))
      found.users += 1
      if found.reader is not reader:  # another thread was faster
        reader.close()
      for other in list(_open_files):
        if len(_open_files) > MAX_OPEN and not _open_files[other].users:
          _open_files.pop(other).reader.close()
  try:
    yield found.reader
  finally:
    with _lock:
      found.users -= 1
