"""Lists the images in Arrow files, which Hugging Face datasets consist of, with their offsets.

An uncompressed Arrow file has the bytes of an image in one piece. Therefore images are read without
pyarrow, like members of a tar file. Listing maps the file and reads only the positions of images
and the columns of names, prompts and paths.
"""

import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from sam3_jax.batch.record_files.columns import Columns, ListedRecord
from sam3_jax.batch.record_files.table_columns import (
  TableColumns,
  column_of,
  import_pyarrow,
  labels,
  table_columns,
)

_FILE_MAGIC = b"ARROW1"  # of the file format; streams have none
_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"


def list_arrow(path: str, columns: Columns) -> Iterator[ListedRecord]:
  """The rows of an Arrow file, in the stream format or the file format.

  Raises:
    ImportError: pyarrow is not installed.
    ValueError: the file is damaged, truncated or compressed, or lacks a column.
    OSError: the file cannot be read.
  """
  pyarrow = import_pyarrow()
  with open(path, "rb") as file:
    size = os.fstat(file.fileno()).st_size
    is_stream = file.read(len(_FILE_MAGIC)) != _FILE_MAGIC
    file.seek(max(0, size - len(_STREAM_END)))
    ends = file.read() == _STREAM_END
  count = 0
  try:
    with pyarrow.memory_map(path) as source:
      start = source.read_buffer(1).address
      source.seek(0)
      reader = pyarrow.ipc.open_stream(source) if is_stream else pyarrow.ipc.open_file(source)
      found = table_columns(reader.schema, columns)
      for batch in _batches(reader, is_stream):
        yield from _rows(batch, found, count, start, size)
        count += batch.num_rows
  except (pyarrow.ArrowException, OSError) as error:
    reason = " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno is not None:
      raise
    what = f"{count:,} rows, then {reason:.120}" if count else f"{reason:.120}"
    raise ValueError(
      f"it is not an Arrow file ({size:,} bytes), or is damaged or truncated ({what}); copy or "
      "create it again"
    ) from error
  if is_stream and not ends:
    raise ValueError(f"it is truncated: {count:,} rows, then no end mark; copy or create it again")


def _batches(reader: Any, is_stream: bool) -> Iterator[Any]:
  if is_stream:
    yield from reader
  else:
    for number in range(reader.num_record_batches):
      yield reader.get_batch(number)


def _rows(
  batch: Any, columns: TableColumns, first: int, start: int, size: int
) -> Iterator[ListedRecord]:
  """The rows of a batch.

  Args:
    batch: in the memory of the mapped file.
    columns: of the table.
    first: index in the file of the first row.
    start: address of the mapped file.
    size: of the file in bytes.
  """
  batch.validate()
  for name in filter(None, columns):
    column_of(batch, name).validate(full=True)  # a damaged file must not lead out of the mapping
  spans = _spans(column_of(batch, columns.data), start, size) if columns.data else None
  paths = [None] * batch.num_rows
  if columns.path is not None and (spans is None or (spans[:, 1] < 0).any()):
    paths = column_of(batch, columns.path).to_pylist()
  for i, (record, path) in enumerate(zip(labels(batch, columns, first), paths, strict=True)):
    if spans is not None and spans[i, 1] >= 0:
      yield record._replace(span=(int(spans[i, 0]), int(spans[i, 1])))
    elif path:
      yield record._replace(path=path)
    else:
      yield record._replace(span=(0, 0))


def _spans(values: Any, start: int, size: int) -> np.ndarray:
  """Offset in the file and number of bytes of each value; the number is -1 for null.

  Raises:
    ValueError: the values are not in the file, because it is compressed.
  """
  types = import_pyarrow().types
  _, offsets, data = values.buffers()
  dtype = np.int64 if types.is_large_binary(values.type) else np.int32
  ends = np.zeros(len(values) + 1, np.int64)
  if len(values):
    found = np.frombuffer(offsets, dtype, len(values) + 1, values.offset * np.dtype(dtype).itemsize)
    ends[:] = found
  counts = np.diff(ends)
  counts[values.is_null().to_numpy(zero_copy_only=False)] = -1
  first = 0 if data is None else data.address - start
  inside = first >= 0 and first + ends.max() <= size
  if (counts > 0).any() and not inside:
    raise ValueError("it is compressed; write it without compression")
  return np.stack([first + ends[:-1], counts], axis=1)
