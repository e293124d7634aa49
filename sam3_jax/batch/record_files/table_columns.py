"""The image, name and prompts columns of a table (Parquet, Arrow), by its schema.

A column of images has the bytes of image files, as binary or as the struct of `bytes` and `path`
that Hugging Face datasets write, or it has paths of image files. A column in a struct is called
`struct.column`.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from sam3_jax.batch.record_files.columns import (
  Columns,
  ListedRecord,
  check_column,
  choose_image,
  record_prompts,
)


class TableColumns(NamedTuple):
  """The columns of a table that are read.

  Attributes:
    data: has the bytes of images; None if there are only paths.
    path: has paths of image files; None if there are only bytes.
    name, prompts: as given by the user.
  """

  data: str | None
  path: str | None
  name: str | None
  prompts: str | None


def import_pyarrow() -> Any:
  """The package `pyarrow`.

  Raises:
    ImportError: it is not installed.
  """
  try:
    import pyarrow  # pyright: ignore[reportMissingImports]
  except ImportError as error:
    raise ImportError(
      "Parquet and Arrow files need pyarrow: pip install 'sam3-jax[parquet]'."
    ) from error
  return pyarrow


def table_columns(schema: Any, columns: Columns) -> TableColumns:
  """The columns to read of a table with a `pyarrow.Schema`.

  Raises:
    ValueError: no column has images, or a given column does not exist or has another type.
  """
  types = _types(schema)
  check_column("--name-column", columns.name, types)
  check_column("--prompts-column", columns.prompts, types)
  candidates = [name for name in schema.names if _has_bytes(types[name])]
  if not candidates and "image" in types and _is_text(types["image"]):
    candidates = ["image"]  # other columns of strings are paths only if the user says so
  image = choose_image(candidates, types, columns.image)
  found = types[image]
  if not (_has_bytes(found) or _is_text(found)):
    raise ValueError(
      f"column {image!r} has the type {found!s:.60}, but images are bytes (binary), bytes and "
      "path (struct), or paths (string); check --image-column"
    )
  if columns.name is not None:
    kind = types[columns.name]
    if not (_is_text(kind) or import_pyarrow().types.is_integer(kind)):
      raise ValueError(
        f"column {columns.name!r} has the type {kind!s:.60}, but names are strings or integers; "
        "check --name-column"
      )
  if _is_text(found):
    return TableColumns(None, image, columns.name, columns.prompts)
  if _is_binary(found):
    return TableColumns(image, None, columns.name, columns.prompts)
  path = f"{image}.path"
  has_path = path in types and _is_text(types[path])
  return TableColumns(f"{image}.bytes", path if has_path else None, columns.name, columns.prompts)


def column_of(batch: Any, name: str) -> Any:
  """A column of a `pyarrow.RecordBatch`, or a field of a struct, with the nulls of the struct."""
  if name in batch.schema.names:
    return batch.column(name)
  # The name of a column may have dots too.
  top = max((n for n in batch.schema.names if name.startswith(f"{n}.")), key=len)
  array, rest = batch.column(top), name[len(top) + 1 :]
  while rest:
    field = max((one.name for one in array.type if f"{rest}.".startswith(f"{one.name}.")), key=len)
    array, rest = array.flatten()[array.type.get_field_index(field)], rest[len(field) + 1 :]
  return array


def labels(batch: Any, columns: TableColumns, first: int) -> Iterator[ListedRecord]:
  """The rows of a batch with names and prompts, without images.

  Args:
    batch: a `pyarrow.RecordBatch` that has the columns of names and prompts.
    columns: of the table.
    first: index in the file of the first row.
  """
  nothing = [None] * batch.num_rows
  names = column_of(batch, columns.name).to_pylist() if columns.name else nothing
  prompts = column_of(batch, columns.prompts).to_pylist() if columns.prompts else nothing
  for row, (name, given) in enumerate(zip(names, prompts, strict=True), start=first):
    listed = ListedRecord(row)
    try:
      if columns.name is not None and name in (None, ""):
        raise ValueError(f"{columns.name!r} is empty")
      name = None if columns.name is None else str(name)
      yield listed._replace(name=name, prompts=record_prompts(given))
    except (ValueError, TypeError) as error:
      yield listed._replace(fault=str(error))


def _types(schema: Any) -> dict[str, Any]:
  """The types of all columns, and of the fields of structs, by name."""
  found = {field.name: field.type for field in schema}
  pending = list(found.items())
  while pending:
    name, kind = pending.pop()
    if import_pyarrow().types.is_struct(kind):
      fields = {f"{name}.{field.name}": field.type for field in kind}
      pending += fields.items()
      found |= {key: value for key, value in fields.items() if key not in found}
  return found


def _has_bytes(kind: Any) -> bool:
  """Whether values are the bytes of files, or structs with them."""
  if import_pyarrow().types.is_struct(kind):
    index = kind.get_field_index("bytes")
    return index >= 0 and _is_binary(kind.field(index).type)
  return _is_binary(kind)


def _is_binary(kind: Any) -> bool:
  types = import_pyarrow().types
  return types.is_binary(kind) or types.is_large_binary(kind)


def _is_text(kind: Any) -> bool:
  types = import_pyarrow().types
  return types.is_string(kind) or types.is_large_string(kind)
