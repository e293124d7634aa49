"""Reads records of ArrayRecord files (https://github.com/google/array_record) by their index.

A record is decoded together with its group. Files for random access, such as those of TFDS, have
groups of one record.
"""

import contextlib
import functools
import os
import re
import threading
from collections.abc import Iterator
from typing import Any

from sam3_jax.batch.record_files import example_columns
from sam3_jax.batch.record_files.columns import (
  Columns,
  DamagedRecordError,
  ListedRecord,
  RecordKey,
)

MAX_GROUP = 2**27  # bytes of a group; decoding takes about three times as much
_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"  # for random access
_BUFFER = 2**15  # bytes that are read at a time


class ArrayRecordReader:
  """An open file. Methods may be called from several threads.

  Attributes:
    count: number of records.
  """

  def __init__(self, path: str, feature: str = "", version: str = ""):
    """Opens a file.

    Args:
      path: of the file.
      feature: of `tf.train.Example` with the image; empty if records are images.
      version: of an object; files in buckets cannot be read.

    Raises:
      ValueError: the file is damaged.
      OSError: the file cannot be read.
    """
    self._path, self._feature, self._lock = path, feature, threading.Lock()
    self._is_readable = False  # whether the whole file has been read, because a record was damaged
    self._reader = self._opened()
    if not self._reader.ok():
      _check_readable(path)
      size = os.stat(path).st_size
      raise ValueError(
        f"it is not an ArrayRecord file ({size:,} bytes), or is damaged or truncated; copy or "
        "create it again"
      )
    self.count: int = self._reader.num_records()

  @property
  def group_size(self) -> int:
    """Number of records in a group."""
    found = re.search(r"\bgroup_size:(\d+)", self._reader.writer_options_string() or "")
    return min(int(found[1]), self.count) if found else 1

  def record(self, row: int) -> bytes:
    """A record.

    Raises:
      DamagedRecordError: it is damaged.
      OSError: the file cannot be read.
    """
    with self._lock:
      try:
        # Reading in order decodes each group once; `read([row])` would do so for each record.
        self._reader.seek(row)
        return self._reader.read()
      except (RuntimeError, IndexError, ValueError) as error:
        reason = " ".join(str(error).split()).partition(" (")[0]
        self.close()  # after an error, a reader reads nothing more
        self._reader = self._opened()
      if not self._is_readable:
        _check_readable(self._path)
        self._is_readable = True
    raise DamagedRecordError(f"its record is damaged ({reason:.120})")

  def read(self, row: int) -> bytes:
    """The bytes of the image of a record; empty if it has none. Raises like `record`."""
    return example_columns.image_bytes(self.record(row), self._feature)

  def close(self) -> None:
    with contextlib.suppress(RuntimeError):  # it repeats the error of an earlier read
      self._reader.close()

  def _opened(self) -> Any:
    # Grain needs this package, which is slow to import.
    from array_record.python import array_record_module  # pyright: ignore

    # The library reports no error: a file that cannot be opened has no records.
    with open(self._path, "rb"):
      return array_record_module.ArrayRecordReader(
        self._path, _OPTIONS, file_reader_buffer_size=_BUFFER
      )


def list_array_record(path: str, columns: Columns) -> Iterator[ListedRecord]:
  """The records of an ArrayRecord file.

  The names and prompts of records are in the records, so these columns make it read the whole file.

  Raises:
    ValueError: the file is damaged, lacks a column, or has too large groups.
    OSError: the file cannot be read.
  """
  reader = ArrayRecordReader(path)
  try:
    if not reader.count:
      return
    groups = os.stat(path).st_size * reader.group_size // reader.count
    if groups > MAX_GROUP:
      raise ValueError(
        f"it has groups of {reader.group_size:,} records ({groups / 2**20:,.0f} MB), which are "
        "decoded together for each image; write it with ArrayRecordWriter(path, 'group_size:1')"
      )
    feature = example_columns.image_feature(_first_record(reader), columns)
    for row in range(reader.count):
      listed = ListedRecord(row, key=RecordKey("array_record", feature, row))
      if columns.has_labels:
        listed = example_columns.with_labels(listed, functools.partial(reader.record, row), columns)
      yield listed
  finally:
    reader.close()


def _first_record(reader: ArrayRecordReader) -> bytes:
  """The first record that is not damaged; raises DamagedRecordError if all are."""
  for row in range(reader.count):
    try:
      return reader.record(row)
    except DamagedRecordError:
      continue
  raise DamagedRecordError(f"all its {reader.count:,} records are damaged; copy it again")


def _check_readable(path: str) -> None:
  """Raises OSError if the file cannot be read to its end, so that no damage is recorded then."""
  with open(path, "rb", buffering=0) as file:
    while file.read(2**20):
      pass
