"""The images that a directory, a pattern, JSON lines, a tar file or a file of records lists."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sam3_jax.batch.object_inputs import Listing, check_allowed, open_text
from sam3_jax.batch.prompt_schema import AnyPrompt, parse_json, parse_prompts
from sam3_jax.batch.record_files.columns import Columns, ListedRecord, RecordKey
from sam3_jax.batch.record_files.listing import NAMES, list_records, record_format, row_name
from sam3_jax.batch.record_files.named import HUGGING_FACE, TFDS, find_dataset, is_dataset
from sam3_jax.batch.webdataset import list_samples
from sam3_jax.inputs.image_listing import find_files
from sam3_jax.storage.urls import is_url, join, parent, redact
from sam3_jax.utils.identity import FileIdentity
from sam3_jax.utils.json_text import shown
from sam3_jax.utils.notes import ListingNotes
from sam3_jax.utils.os_errors import error_text

LINE_FORMAT = (
  '{"image": "a.jpg", "prompts": ["cat", {"text": "dog", "boxes": [[x0, y0, x1, y1]]}, '
  '{"points": [[x, y]]}]}'
)
SIDECAR_FORMAT = 'it must be {"prompts": [...]}'  # of the .json file beside an image in a tar file


class ListedImage(NamedTuple):
  """A listed image, or a `fault`; `prompts` is None for an image without its own.

  `position` tells images in one file apart; it is -1 if the file is the image.
  """

  name: str
  path: str
  prompts: tuple[AnyPrompt, ...] | None = None
  span: tuple[int, int] | None = None
  record: RecordKey | None = None
  position: int = -1
  fault: str = ""
  identity: FileIdentity | None = None


def list_images(
  images: str,
  listing: Listing | None,
  notes: ListingNotes,
  columns: Columns,
  allow_https: bool,
) -> Iterator[ListedImage]:
  """The images of a list, one after another.

  Args:
    images, notes, columns, allow_https: as for `inputs.list_inputs`.
    listing: of the bucket or web server, if `images` is there.
  """
  if is_dataset(images):
    files, columns = find_dataset(images, columns)
    for file in files:
      yield from _in_records(
        file.path.name, str(file.path), file.format, columns, notes, allow_https, file.rows
      )
    return
  if columns.split is not None:
    raise ValueError(f"--split is for datasets by name ({TFDS}, {HUGGING_FACE}); got {images}.")
  if listing is not None:
    for one in listing.objects:
      format = "" if listing.directory else record_format(redact(one.url))
      _check_options(columns, format, redact(images if listing.directory else one.url))
      if listing.directory:
        yield ListedImage(one.name, one.url, identity=one.identity)
      elif format:
        yield from _in_records(
          one.name, one.url, format, columns, notes, allow_https, identity=one.identity
        )
      else:
        yield from _in_file(one.name, one.url, notes, allow_https, one.identity)
    return
  directory = os.path.isdir(images)
  for found in find_files(images, notes):
    format = "" if directory else record_format(found.path)
    _check_options(columns, format, images if directory else found.path)
    if directory:  # lists, tar files and files of records in it are not opened
      yield ListedImage(found.name, found.path)
    elif format:
      yield from _in_records(found.name, found.path, format, columns, notes, allow_https)
    else:
      yield from _in_file(found.name, found.path, notes, allow_https)


def _check_options(columns: Columns, format: str, path: str) -> None:
  """Raises ValueError if columns are given for a file that has none."""
  if columns.options() and not format:
    raise ValueError(f"{columns.options()[0]} is for {NAMES}; leave it out for {path}.")


def _in_file(
  name: str,
  path: str,
  notes: ListingNotes,
  allow_https: bool,
  identity: FileIdentity | None = None,
) -> Iterator[ListedImage]:
  match Path(redact(path)).suffix.lower():
    case ".jsonl":
      yield from _in_lines(path, allow_https)
    case ".tar":
      yield from _in_tar(name, path, notes, identity)
    case ".gz" | ".tgz" | ".zst" | ".bz2" | ".xz" | ".zip":
      raise ValueError(f"{redact(path)} is compressed; unpack it, or give plain tar files.")
    case _:
      yield ListedImage(name, path, identity=identity)


def _in_lines(path: str, allow_https: bool) -> Iterator[ListedImage]:
  folder = parent(path) if is_url(path) else Path(path).parent
  with readable(path, "--images"), open_text(path) as file:
    for number, line in enumerate(file, start=1):
      if line.strip():
        try:
          image, prompts = _line(parse_json(line, f"a line must be {LINE_FORMAT}"))
          where = join(folder, image)
          if is_url(where):
            check_allowed(where, allow_https)
        except (ValueError, TypeError) as error:
          yield ListedImage(redact(path), "", fault=f"line {number}: {str(error).rstrip('.')}")
        else:
          yield ListedImage(redact(image), where, prompts)


def _line(values: Any) -> tuple[str, tuple[AnyPrompt, ...] | None]:
  if not isinstance(values, dict) or not isinstance(values.get("image"), str):
    raise ValueError(f"a line must be {LINE_FORMAT}; got {shown(values)}")
  check_name(values["image"])
  if unknown := set(values) - {"image", "prompts"}:
    raise ValueError(f"unknown {sorted(unknown)}; a line has only image and prompts")
  return values["image"], parse_prompts(values)


def check_name(name: str) -> None:
  """Raises ValueError for a string that cannot be the name of a file."""
  try:
    possible = bool(os.fsencode(name)) and "\0" not in name
  except UnicodeEncodeError:  # a surrogate that does not stand for a byte
    possible = False
  if not possible:
    raise ValueError(f"{shown(name)} cannot be the name of a file")


def _in_tar(
  name: str, path: str, notes: ListingNotes, identity: FileIdentity | None
) -> Iterator[ListedImage]:
  try:
    with readable(path, "--images"):
      samples = list(list_samples(path, notes))
  except ValueError as error:
    yield ListedImage(name, path, fault=str(error).rstrip("."))
    return
  for sample in samples:
    image = f"{name}/{sample.name}"
    try:
      prompts = _sidecar(sample.sidecar) if sample.sidecar else None
    except (ValueError, TypeError) as error:
      yield ListedImage(image, path, fault=f"{image}: its .json: {str(error).rstrip('.')}")
    else:
      member = identity and dataclasses.replace(identity, size=sample.span[1])
      yield ListedImage(image, path, prompts, sample.span, position=sample.span[0], identity=member)


def _in_records(
  name: str,
  path: str,
  format: str,
  columns: Columns,
  notes: ListingNotes,
  allow_https: bool,
  rows: int | None = None,
  identity: FileIdentity | None = None,
) -> Iterator[ListedImage]:
  empty = True
  try:
    if is_url(path) and format not in ("parquet", "tfrecord"):
      raise ValueError("such files are read from local disks only; copy it to one")
    with readable(path, "--images"):
      for record in list_records(path, format, columns, rows):
        empty = False
        yield _of_record(record, name, path, identity, allow_https)
  except ValueError as error:
    yield ListedImage(name, path, fault=f"{name}: {str(error).rstrip('.')}")
    return
  if empty:
    notes.remark("file has no records", "files have no records", name)


def _of_record(
  record: ListedRecord, file: str, path: str, identity: FileIdentity | None, allow_https: bool
) -> ListedImage:
  """A record of a file as a listed image; `identity` is that of an object."""
  row, fault, where, position = row_name(file, record.row), record.fault, path, record.row
  name = row if record.name is None else record.name
  try:
    check_name(name)
    if record.path is not None:
      check_name(record.path)
      where = join(parent(path) if is_url(path) else Path(path).parent, record.path)
      identity, position = None, -1
      if is_url(where):
        check_allowed(where, allow_https)
  except ValueError as error:
    fault = str(error)
  if identity is not None and record.span is not None:
    identity = dataclasses.replace(identity, size=record.span[1])
  fault = fault and f"{row}: {fault.rstrip('.')}"
  return ListedImage(
    name, where, record.prompts, record.span, record.key, position, fault, identity
  )


def _sidecar(data: bytes) -> tuple[AnyPrompt, ...] | None:
  values = parse_json(data, SIDECAR_FORMAT)
  if not isinstance(values, dict):
    raise ValueError(f"{SIDECAR_FORMAT}; got {shown(values)}")
  return parse_prompts(values)


@contextlib.contextmanager
def readable(path: str | Path, option: str) -> Iterator[None]:
  """Reading errors name the file and the option."""
  try:
    yield
  except OSError as error:
    what, why = error.filename or redact(path), error_text(error)
    raise ValueError(
      f"{what} cannot be read ({why}); check its permissions and {option}."
    ) from error
  except UnicodeDecodeError as error:
    raise ValueError(
      f"{redact(path)} is not UTF-8 text; save it as UTF-8, or check {option}."
    ) from error
