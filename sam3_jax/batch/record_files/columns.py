"""Which columns of a dataset have the image, its name and its prompts.

Formats differ in what a record is: a row of a table (Parquet, Arrow) or a `tf.train.Example`
(ArrayRecord, TFRecord). A column of the latter is a feature.
"""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

from sam3_jax.batch.prompt_schema import AnyPrompt, parse_prompts

IMAGE_NAMES = ("image", "image/encoded")  # tried in this order if --image-column is not given


@dataclasses.dataclass(frozen=True)
class Columns:
  """The columns to read, and the split.

  Attributes:
    image: has the images; None to find it by its name and type.
    name: has the names that results use; None for FILE#ROW.
    prompts: has phrases or prompts; None if all images have the same.
    split: of a dataset given by name; None if it has only one.
  """

  image: str | None = None
  name: str | None = None
  prompts: str | None = None
  split: str | None = None

  @property
  def has_labels(self) -> bool:
    """Whether names or prompts are to be read."""
    return self.name is not None or self.prompts is not None

  def options(self) -> list[str]:
    """The options of the command line that were given."""
    given = dataclasses.asdict(self)
    return [
      "--split" if key == "split" else f"--{key}-column" for key in given if given[key] is not None
    ]


class RecordKey(NamedTuple):
  """An image in a file of records.

  Attributes:
    format: of the file; see `listing.record_format`.
    column: with the image; empty if the record itself is the image.
    row: index of the record in the file.
  """

  format: str
  column: str
  row: int


class ListedRecord(NamedTuple):
  """A record with an image.

  Attributes:
    row: index of the record in the file.
    name: from the column of names; None without this column.
    prompts: from the column of prompts; None without prompts of its own.
    span: offset and number of bytes in the file, if these are known.
    key: how to read the image; None if `span` are the bytes of the image.
    path: of the image, if the record refers to a file: absolute, a URL, or relative to the
      directory of the file of records. None if the record has the bytes.
    fault: why the record cannot be used; empty if it can.
  """

  row: int
  name: str | None = None
  prompts: tuple[AnyPrompt, ...] | None = None
  span: tuple[int, int] | None = None
  key: RecordKey | None = None
  path: str | None = None
  fault: str = ""


class DamagedRecordError(ValueError):
  """A record was read, but has no usable image."""


def choose_image(candidates: Iterable[str], all_columns: Iterable[str], given: str | None) -> str:
  """The column with the images.

  Args:
    candidates: columns whose type can be an image.
    all_columns: all columns, for messages.
    given: the value of --image-column.

  Raises:
    ValueError: there is none, or several without one of the usual names; names the columns.
  """
  candidates, all_columns = list(candidates), list(all_columns)
  if given is not None:
    if given not in all_columns:
      raise ValueError(f"there is no column {given!r}; {_named(all_columns)}; check --image-column")
    return given
  for name in IMAGE_NAMES:
    if name in candidates:
      return name
  if len(candidates) == 1:
    return candidates[0]
  if candidates:
    raise ValueError(
      f"several columns can have the images: {', '.join(candidates):.200}; choose one with "
      "--image-column"
    )
  raise ValueError(f"no column has images; {_named(all_columns)}")


def check_column(option: str, given: str | None, all_columns: Iterable[str]) -> None:
  """Raises ValueError if a given column does not exist."""
  if given is not None and given not in (all_columns := list(all_columns)):
    raise ValueError(f"there is no column {given!r}; {_named(all_columns)}; check {option}")


def record_prompts(value: Any) -> tuple[AnyPrompt, ...] | None:
  """The prompts of a record; None if it has none.

  Args:
    value: a phrase, or a list of phrases or of prompts as in a JSON list of inputs.

  Raises:
    ValueError, TypeError: they are not prompts.
  """
  if value is None or value == [] or value == "":
    return None
  given = [value] if isinstance(value, str) else value
  if isinstance(given, list) and all(isinstance(one, str) for one in given):
    return _phrases(tuple(given))
  return parse_prompts({"prompts": given})


@functools.lru_cache(maxsize=2**16)
def _phrases(phrases: tuple[str, ...]) -> tuple[AnyPrompt, ...] | None:
  """One object for all records with the same phrases, so that a list of inputs stays small."""
  return parse_prompts({"prompts": list(phrases)})


def _named(columns: list[str]) -> str:
  return f"the columns are {', '.join(columns) or '(none)':.300}"
