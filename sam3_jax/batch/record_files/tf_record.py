"""Lists the records of TFRecord files with their offsets, so that any order can be read.

A record is its length (8 bytes, little-endian), a checksum of the length, the data, and a checksum
of the data (https://www.tensorflow.org/tutorials/load_data/tfrecord). Listing reads only lengths
and their checksums, and so finds damaged and truncated files.
"""

import functools
import os
import struct
from collections.abc import Iterator
from typing import BinaryIO

from sam3_jax.batch.record_files import example_columns
from sam3_jax.batch.record_files.columns import Columns, ListedRecord, RecordKey
from sam3_jax.storage.objects import open_binary

_HEADER, _FOOTER = 12, 4  # bytes around the data
_MASK_DELTA = 0xA282EAD8  # added to rotated checksums
_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x78\x01": "zlib", b"\x78\x9c": "zlib", b"\x78\xda": "zlib"}


def list_tf_records(path: str, columns: Columns) -> Iterator[ListedRecord]:
  """The records of an uncompressed TFRecord file.

  The names and prompts of records are in the records, so these columns make it read the whole file.

  Raises:
    ValueError: the file is damaged, truncated or compressed, or lacks a column.
    OSError: the file cannot be read.
  """
  with open_binary(path) as file:
    feature = ""
    for row, span in enumerate(_spans(file)):
      read = functools.partial(_read, file, *span)
      if not row:
        feature = example_columns.image_feature(read(), columns)
      key = RecordKey("tfrecord", feature, row) if feature else None
      listed = ListedRecord(row, span=span, key=key)
      yield example_columns.with_labels(listed, read, columns) if columns.has_labels else listed


def _read(file: BinaryIO, offset: int, size: int) -> bytes:
  file.seek(offset)
  return file.read(size)


def _spans(file: BinaryIO) -> Iterator[tuple[int, int]]:
  """Offset and number of bytes of each record's data."""
  total, at, count = file.seek(0, os.SEEK_END), 0, 0
  while at < total:
    file.seek(at)
    header = file.read(_HEADER)
    problem = ""
    if len(header) < _HEADER:
      problem = "the end of the file inside a header"
    elif struct.unpack("<I", header[8:])[0] != _masked_crc(header[:8]):
      problem = f"a damaged header at byte {at:,}"
    else:
      (size,) = struct.unpack("<Q", header[:8])
      if at + _HEADER + size + _FOOTER > total:
        problem = f"the end of the file, at byte {total:,}, inside a record"
    if problem and not at:
      kind = _COMPRESSED.get(header[:2])
      how = (
        f"but compressed ({kind}); write it without compression"
        if kind
        else "or is damaged; copy or create it again"
      )
      raise ValueError(f"it is not a TFRecord file ({total:,} bytes), {how}")
    if problem:
      good = "1 record" if count == 1 else f"{count:,} records"
      raise ValueError(
        f"it is damaged or truncated: {good}, then {problem}; copy or create it again"
      )
    yield at + _HEADER, size
    at, count = at + _HEADER + size + _FOOTER, count + 1


def _table() -> tuple[int, ...]:
  values = []
  for value in range(256):
    for _ in range(8):
      value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)  # Castagnoli's polynomial, reversed
    values.append(value)
  return tuple(values)


_TABLE = _table()


def _masked_crc(data: bytes) -> int:
  """The checksum of TFRecord files: CRC-32C, rotated, plus a constant."""
  crc = 0xFFFFFFFF
  for byte in data:
    crc = _TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
  crc ^= 0xFFFFFFFF
  return ((crc >> 15 | crc << 17) + _MASK_DELTA) & 0xFFFFFFFF
