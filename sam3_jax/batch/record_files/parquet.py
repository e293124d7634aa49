"""Reads images from the rows of Parquet files.

Parquet has no offsets of single rows. The pages of a column are read in order, from the start of a
row group, so memory is bounded by a page and not by a row group. Rows asked for in order are
decoded once.
"""

import abc
import bisect
import collections
import contextlib
import errno
import io
import itertools
import os
import threading
from collections.abc import Iterator
from typing import Any

from sam3_jax.batch.record_files.columns import (
  Columns,
  DamagedRecordError,
  ListedRecord,
  RecordKey,
)
from sam3_jax.batch.record_files.table_columns import (
  TableColumns,
  column_of,
  import_pyarrow,
  labels,
  table_columns,
)
from sam3_jax.storage.store import locate
from sam3_jax.storage.urls import is_url

BATCH_BYTES = 2**22  # of images, approximately, that are decoded at a time
MAX_BATCH = 1024  # rows
# Rows kept for threads that ask a little later for an earlier row; there are half as many threads.
RECENT = os.cpu_count() or 1
_BUFFER = 2**20  # bytes read at a time from a column


class ParquetReader:
  """An open file. Methods may be called from several threads."""

  def __init__(self, path: str, column: str, version: str = ""):
    """Opens a file.

    Args:
      path: or URL of the file.
      column: has the bytes of images.
      version: of an object, if it has one.

    Raises:
      ValueError: the file is damaged.
      OSError: the file cannot be read.
    """
    self._file, self._column, self._lock = _open_ranges(path, version), column, threading.Lock()
    self._table = _open(self._file)
    groups = [self._table.metadata.row_group(i) for i in range(self._table.num_row_groups)]
    self._starts = [0, *itertools.accumulate(group.num_rows for group in groups)]
    self._group, self._next = -1, 0  # the open row group, and the row of its next batch
    self._batches: Iterator[Any] = iter(())
    self._recent: collections.deque[tuple[int, Any]] = collections.deque()  # first rows, batches
    self._damage: dict[int, tuple[int, str]] = {}  # by row group: its first unreadable row, and why

  def read(self, row: int) -> bytes:
    """The bytes of the image of a row; empty for null.

    Raises:
      DamagedRecordError: the row, or one before it in its row group, is damaged.
      OSError: the file cannot be read.
    """
    with self._lock:
      group = bisect.bisect_right(self._starts, row) - 1
      first_damaged, reason = self._damage.get(group, (row + 1, ""))
      if row < first_damaged:
        try:
          with _reading(self._file):
            value = self._value(row, group)
          return b"" if value is None else value
        except ValueError as error:
          self._damage[group], reason = (self._next, str(error)), str(error)
          self._group = -1
        except BaseException:
          self._group = -1
          raise
    raise DamagedRecordError(f"row group {group} of its file cannot be decoded ({reason})")

  def close(self) -> None:
    self._file.close()

  def _value(self, row: int, group: int) -> bytes | None:
    for first, values in self._recent:
      if first <= row < first + len(values):
        return values[row - first].as_py()
    if group != self._group or row < self._next:
      self._open_group(group)
    while True:
      batch = next(self._batches, None)
      if batch is None or not batch.num_rows:
        raise ValueError(f"fewer rows than the {self._starts[-1]:,} of its footer")
      first, values = self._next, column_of(batch, self._column)
      self._next += len(values)
      self._recent.append((first, values))
      while sum(len(one) for _, one in self._recent) - len(self._recent[0][1]) > RECENT:
        self._recent.popleft()
      if row < self._next:
        return values[row - first].as_py()

  def _open_group(self, group: int) -> None:
    metadata = self._table.metadata.row_group(group)
    sizes = (metadata.column(i) for i in range(metadata.num_columns))
    size = sum(one.total_uncompressed_size for one in sizes if one.path_in_schema == self._column)
    rows = metadata.num_rows * BATCH_BYTES // max(size, 1)
    self._batches = self._table.iter_batches(
      max(1, min(rows, MAX_BATCH)), row_groups=[group], columns=[self._column], use_threads=False
    )
    self._group, self._next = group, self._starts[group]


def list_parquet(path: str, columns: Columns) -> Iterator[ListedRecord]:
  """The rows of a Parquet file; reads its footer, and the columns of names, prompts and paths.

  Raises:
    ImportError: pyarrow is not installed.
    ValueError: the file is damaged or lacks a column.
    OSError: the file cannot be read.
  """
  import_pyarrow()
  with contextlib.closing(_open_ranges(path)) as file:
    table = _open(file)
    found = table_columns(table.schema_arrow, columns)
    first = 0
    for number in range(table.num_row_groups):
      group = table.metadata.row_group(number)
      by_path = found.data is None or _is_null(group, found.data)
      columns_here = found if by_path else found._replace(path=None)
      yield from _rows(file, table, number, first, columns_here)
      first += group.num_rows


def _rows(
  file: "_RangeFile",
  table: Any,
  number: int,
  first: int,
  columns: TableColumns,
) -> Iterator[ListedRecord]:
  """The rows of a row group; images are paths if there is a column of paths, else bytes."""
  wanted = [columns.name, columns.prompts, columns.path]
  wanted = list(dict.fromkeys(name for name in wanted if name is not None))
  count = table.metadata.row_group(number).num_rows
  if not wanted:
    keys = (RecordKey("parquet", columns.data or "", row) for row in range(first, first + count))
    yield from (ListedRecord(key.row, key=key) for key in keys)
    return
  batches = table.iter_batches(MAX_BATCH, row_groups=[number], columns=wanted, use_threads=False)
  end = first + count
  while True:
    with _reading(file):
      batch = next(batches, None)
      if batch is None:
        break
      listed = list(labels(batch, columns, first))
      paths = column_of(batch, columns.path).to_pylist() if columns.path else [None] * len(listed)
    first += len(listed)
    for record, given in zip(listed, paths, strict=True):
      if columns.path is None:
        yield record._replace(key=RecordKey("parquet", columns.data or "", record.row))
      elif given:
        yield record._replace(path=given)
      else:
        yield record._replace(span=(0, 0))
  if first != end:
    raise ValueError(f"it is damaged: row group {number:,} has fewer rows than its footer says")


def _is_null(group: Any, column: str) -> bool:
  """Whether a column of a row group has only nulls, by its statistics."""
  for index in range(group.num_columns):
    chunk = group.column(index)
    if chunk.path_in_schema == column:
      found = chunk.statistics if chunk.is_stats_set else None
      return found is not None and found.has_null_count and found.null_count == group.num_rows
  return False


def _open(file: "_RangeFile") -> Any:
  """A `pyarrow.parquet.ParquetFile`; raises ValueError if the file is damaged."""
  from pyarrow import parquet  # pyright: ignore[reportMissingImports]

  try:
    with _reading(file):
      return parquet.ParquetFile(file, buffer_size=_BUFFER, pre_buffer=False)
  except ValueError as error:
    raise ValueError(
      f"it is not a Parquet file ({file.size:,} bytes), or is damaged or truncated ({error}); copy "
      "or create it again"
    ) from error


@contextlib.contextmanager
def _reading(file: "_RangeFile") -> Iterator[None]:
  """Tells faults of the storage (OSError) from damaged data (ValueError).

  pyarrow raises OSError for both. It also raises MemoryError, which is neither.
  """
  file.error = None
  try:
    yield
  except MemoryError:
    raise
  except Exception as error:
    if file.error is not None:
      raise file.error from None
    raise ValueError(f"{' '.join(str(error).split()):.120}") from error


class _RangeFile(io.RawIOBase):
  """A file for pyarrow, which reads ranges of it. Records the last error of reading."""

  def __init__(self, size: int):
    super().__init__()
    self._at, self.size = 0, size
    self.error: OSError | None = None

  def readable(self) -> bool:
    return True

  def seekable(self) -> bool:
    return True

  def tell(self) -> int:
    return self._at

  def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
    self._at = max(0, {os.SEEK_SET: 0, os.SEEK_CUR: self._at}.get(whence, self.size) + offset)
    return self._at

  def read(self, size: int | None = -1) -> bytes:
    stop = self.size if size is None or size < 0 else min(self._at + size, self.size)
    try:
      data = self._range(self._at, stop) if self._at < stop else b""
    except OSError as error:
      self.error = error
      raise
    self._at += len(data)
    return data

  @abc.abstractmethod
  def _range(self, start: int, stop: int) -> bytes:
    """The bytes from `start` up to `stop`."""


class _LocalFile(_RangeFile):
  _descriptor = -1  # `close` is called even if it cannot be opened

  def __init__(self, path: str):
    self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    super().__init__(os.fstat(self._descriptor).st_size)

  def _range(self, start: int, stop: int) -> bytes:
    parts = []
    while start < stop and (part := os.pread(self._descriptor, stop - start, start)):
      parts.append(part)
      start += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)

  def close(self) -> None:
    if self._descriptor >= 0:
      os.close(self._descriptor)
      self._descriptor = -1
    super().close()


class _Object(_RangeFile):
  """One version of an object, by default the present one."""

  def __init__(self, url: str, version: str):
    self._store, self._where = locate(url)
    entry = self._store.stat(self._where)
    if entry is None:
      raise FileNotFoundError(errno.ENOENT, "there is no such object", str(self._where))
    self._version = version or entry.version
    super().__init__(entry.size)

  def _range(self, start: int, stop: int) -> bytes:
    data, _ = self._store.read(self._where, start, stop, self._version)
    return data


def _open_ranges(path: str, version: str = "") -> _RangeFile:
  return _Object(path, version) if is_url(path) else _LocalFile(path)
