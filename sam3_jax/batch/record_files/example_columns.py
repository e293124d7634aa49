"""The image, name and prompts of a record that is a `tf.train.Example`, or an image itself."""

from collections.abc import Callable, Mapping

from sam3_jax.batch.record_files.columns import (
  Columns,
  DamagedRecordError,
  ListedRecord,
  check_column,
  choose_image,
  record_prompts,
)
from sam3_jax.batch.record_files.example import Feature, read_example


def image_feature(first: bytes, columns: Columns) -> str:
  """The feature with the images; empty if the records themselves are images.

  Args:
    first: the first record of the file.
    columns: as given by the user.

  Raises:
    ValueError: no feature has images, or a given column does not exist.
  """
  try:
    features = read_example(first)
  except ValueError as error:
    if given := [option for option in columns.options() if option != "--split"]:
      raise ValueError(
        f"its records are not tf.train.Example, so they have no columns; leave out {given[0]}"
      ) from error
    return ""
  check_column("--name-column", columns.name, features)
  check_column("--prompts-column", columns.prompts, features)
  candidates = [name for name, one in features.items() if one.kind == "bytes"]
  chosen = choose_image(candidates, features, columns.image)
  if chosen not in candidates:
    kind = features[chosen].kind or "no values"
    raise ValueError(
      f"column {chosen!r} has {kind}, not the bytes of image files; check --image-column"
    )
  return chosen


def image_bytes(record: bytes, feature: str) -> bytes:
  """The bytes of the image in a record; empty if the record has none.

  Raises:
    DamagedRecordError: the record is not an Example, or has several images.
  """
  if not feature:
    return record
  found = _features(record).get(feature)
  if found is None or not found.kind:
    return b""
  if found.kind != "bytes" or len(found.values) > 1:
    what = f"{len(found.values):,} values" if found.kind == "bytes" else found.kind
    raise DamagedRecordError(f"its feature {feature!r} has {what}, not one image")
  return bytes(found.values[0]) if found.values else b""


def with_labels(listed: ListedRecord, read: Callable[[], bytes], columns: Columns) -> ListedRecord:
  """A listed record with its name and prompts, or with the fault of these.

  Args:
    listed: the record.
    read: reads it.
    columns: as given by the user.

  Raises:
    OSError: the record cannot be read.
  """
  try:
    features, name, prompts = _features(read()), None, None
    if columns.name is not None:
      texts = _texts(features, columns.name)
      if len(texts) != 1 or not texts[0]:
        raise ValueError(f"{columns.name!r} has {len(texts)} values, not one name")
      name = texts[0]
    if columns.prompts is not None:
      prompts = record_prompts(_texts(features, columns.prompts))
    return listed._replace(name=name, prompts=prompts)
  except DamagedRecordError as error:
    # Reading the image will fail too. That is recorded, and the other images are processed.
    return listed if columns.prompts is None else listed._replace(fault=str(error))
  except (ValueError, TypeError) as error:
    return listed._replace(fault=str(error))


def _features(record: bytes) -> Mapping[str, Feature]:
  try:
    return read_example(record)
  except ValueError as error:
    raise DamagedRecordError(f"its record is {error}") from error


def _texts(features: Mapping[str, Feature], name: str) -> list[str]:
  found = features.get(name, Feature("", []))
  if found.kind not in ("bytes", ""):
    raise ValueError(f"{name!r} has values of type {found.kind}, not text")
  try:
    return [bytes(value).decode() for value in found.values]
  except UnicodeDecodeError:
    raise ValueError(f"{name!r} is not UTF-8 text") from None
