"""Lists the images in files of records, in the order of the file."""

import os
import re
from collections.abc import Callable, Iterator

from sam3_jax.batch.record_files.array_record import list_array_record
from sam3_jax.batch.record_files.arrow import list_arrow
from sam3_jax.batch.record_files.columns import Columns, ListedRecord
from sam3_jax.batch.record_files.parquet import list_parquet
from sam3_jax.batch.record_files.tf_record import list_tf_records

_LISTS: dict[str, Callable[[str, Columns], Iterator[ListedRecord]]] = {
  "parquet": list_parquet,
  "arrow": list_arrow,
  "array_record": list_array_record,
  "tfrecord": list_tf_records,
}
# Shards may have their number after the suffix.
_SUFFIX = re.compile(
  r"\.(parquet|arrow|array_?record|tfrecord)s?(-\d+-of-\d+)?", re.IGNORECASE | re.ASCII
)
NAMES = "Parquet, Arrow, ArrayRecord and TFRecord files"
_ROW_NAME = re.compile(r".*" + _SUFFIX.pattern + r"#\d+", re.IGNORECASE | re.ASCII | re.DOTALL)


def record_format(path: str) -> str:
  """The format of a file of records, by its suffix; empty for other files."""
  base = os.path.basename(path)
  found = next((m for m in _SUFFIX.finditer(base) if m.end() == len(base)), None)
  return found[1].lower().replace("arrayrecord", "array_record") if found else ""


def row_name(file: str, row: int) -> str:
  """The name of an image that has no name of its own."""
  return f"{file}#{row}"


def is_row_name(name: str) -> bool:
  """Whether a name is one that `row_name` gives to a record."""
  return _ROW_NAME.fullmatch(name) is not None


def list_records(
  path: str, format: str, columns: Columns, rows: int | None = None
) -> Iterator[ListedRecord]:
  """The records of a file; unusable ones have a `fault`.

  Args:
    path: of the file.
    format: as `record_format` returns it.
    columns: to read.
    rows: number of records that the file must have; None if unknown.

  Raises:
    ImportError: the format needs a package that is not installed.
    ValueError: the file is damaged, truncated or lacks a column.
    OSError: the file cannot be read.
  """
  count = 0
  for record in _LISTS[format](path, columns):
    yield record
    count += 1
  if rows is not None and count != rows:
    has = "1 record" if count == 1 else f"{count:,} records"
    raise ValueError(
      f"it has {has}, but the description of its dataset says {rows:,}; prepare the dataset again"
    )
