"""The list of inputs, from a directory, a pattern, JSON lines, tar files or files of records.

The list and its order are the same for every process. Each image is in it once: an image that was
given several times has the prompts of all occurrences. Files that are left out are counted.
"""

import collections
import contextlib
import dataclasses
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sam3_jax.batch.input_list import Input, PrefixInputs
from sam3_jax.batch.object_inputs import (
  Listing,
  check_allowed,
  identify_objects,
  list_objects,
  open_text,
)
from sam3_jax.batch.prompt_schema import (
  AnyPrompt,
  check_unicode,
  concept_prompts,
  parse_json,
  parse_prompts,
  unique_prompts,
)
from sam3_jax.batch.record_files.columns import Columns, ListedRecord, RecordKey
from sam3_jax.batch.record_files.listing import NAMES, list_records, record_format, row_name
from sam3_jax.batch.record_files.named import HUGGING_FACE, TFDS, find_dataset, is_dataset
from sam3_jax.batch.webdataset import list_samples
from sam3_jax.inputs.concept import ConceptFile
from sam3_jax.inputs.image_listing import find_files
from sam3_jax.inputs.prompts import Prompt
from sam3_jax.inputs.tokenizer import SHORTEN, Tokenizer
from sam3_jax.storage.store import locate
from sam3_jax.storage.urls import is_url, join, parent, redact
from sam3_jax.utils.identity import FileIdentity, identify, named
from sam3_jax.utils.json_text import shown
from sam3_jax.utils.notes import ListingNotes
from sam3_jax.utils.os_errors import error_text
from sam3_jax.utils.param_tree import raise_faults

LINE_FORMAT = (
  '{"image": "a.jpg", "prompts": ["cat", {"text": "dog", "boxes": [[x0, y0, x1, y1]]}, '
  '{"points": [[x, y]]}]}'
)
CHUNK = 1024  # images whose identities are asked for at the same time
SIDECAR_FORMAT = 'it must be {"prompts": [...]}'  # of the .json file beside an image in a tar file


def list_inputs(
  images: str,
  prompts: str | None = None,
  notes: ListingNotes | None = None,
  *,
  concepts: Sequence[ConceptFile] = (),
  columns: Columns | None = None,
  allow_https: bool = False,
) -> Sequence[Input]:
  """The inputs, each image once.

  Args:
    images: a directory (all images in and below it, by name), a pattern such as `shards/*.tar` or
      `a/*.jpg`, an image, a WebDataset tar file (not compressed; the prompts of `a.jpg` may be in
      `a.json`), a .jsonl file with a `LINE_FORMAT` per line, images relative to its directory, a
      file of records (see `record_files`), or a dataset by name (see `record_files.named`). Files
      may be URLs, see `sam3_jax.storage`.
    prompts: for images without prompts of their own: a file with one phrase per line, or phrases
      separated by commas.
    notes: counts files that are left out, and missing or empty images, which will fail.
    concepts: likewise for images without prompts of their own, after `prompts`.
    columns: to read of files of records.
    allow_https: whether `images` and the lines of a list may be addresses on web servers.

  Raises:
    FileNotFoundError: there is no such image, directory, list or dataset.
    ImportError: a file of records needs a package that is not installed.
    ValueError: there is no image, lines or prompts are faulty (all are named), images have no
      prompts, a directory or list cannot be read, or a tar file is damaged.
  """
  notes = ListingNotes() if notes is None else notes
  common = _common_prompts(prompts, concepts)
  columns = columns or Columns()
  listing = None
  if is_url(images) and not is_dataset(images):
    listing = list_objects(images, notes, allow_https=allow_https)
  if listing is not None and listing.directory and common and not columns.options():
    return _prefix_inputs(images, listing, common, notes)
  positions: dict[tuple[str, int], int] = {}
  archives: dict[str, FileIdentity | None] = {}
  inputs: list[Input] = []
  faults: list[str] = []
  without_prompts: list[str] = []
  for found in _identified(_listed(images, listing, notes, columns, allow_https)):
    own = common if found.prompts is None else found.prompts
    if found.fault:
      faults.append(found.fault)
      continue
    if not own:
      without_prompts.append(found.name)
      continue
    path = found.path if is_url(found.path) else os.path.abspath(found.path)
    key = path, found.position
    position = positions.setdefault(key, len(inputs))
    if position == len(inputs):
      identity = _identity(found, archives)
      if identity is None:
        notes.remark("image does not exist", "images do not exist", found.name)
      elif not identity.size:
        notes.remark("image is empty", "images are empty", found.name)
      inputs.append(Input(found.name, found.path, own, found.span, identity, found.record))
    elif own is not inputs[position].prompts:
      union = unique_prompts(inputs[position].prompts + own)
      inputs[position] = dataclasses.replace(inputs[position], prompts=union)
  if without_prompts:
    images_named = named("image has no prompts", "images have no prompts", without_prompts)
    faults.append(f"{images_named}, and neither --prompts nor --concept is given")
  if columns.name is not None:
    counts = collections.Counter(item.name for item in inputs)
    if repeated := [name for name, count in counts.items() if count > 1]:
      found = named("name", "names", repeated)
      faults.append(f"--name-column {columns.name} gives several images the same name: {found}")
  raise_faults(faults, redact(images), "Correct the list, or give --prompts or --concept.")
  if not inputs:
    raise _no_image(images, notes)
  return inputs


def _common_prompts(prompts: str | None, concepts: Sequence[ConceptFile]) -> tuple[AnyPrompt, ...]:
  """The prompts of images without prompts of their own."""
  phrases = read_phrases(prompts) if prompts is not None else ()
  return unique_prompts([*phrases, *concepts])


def _prefix_inputs(
  images: str, listing: Listing, prompts: tuple[AnyPrompt, ...], notes: ListingNotes
) -> Sequence[Input]:
  """The images of a prefix: each has another name, and all have the same prompts."""
  inputs: PrefixInputs | None = None
  for one in listing.objects:
    if inputs is None:
      inputs = PrefixInputs(one.url.removesuffix(one.name), prompts)
    if not one.identity.size:
      notes.remark("image is empty", "images are empty", one.name)
    inputs.append(one.name, one.identity.size, one.identity.version)
  if inputs is None:
    raise _no_image(images, notes)
  return inputs


def _no_image(images: str, notes: ListingNotes) -> ValueError:
  line = notes.line()
  where = f"{redact(images)}{line and f' ({line})'}"
  return ValueError(f"there is no image in {where}; check --images.")


def frozen_input(
  images: str, prompts: str | None, concepts: Sequence[ConceptFile] = ()
) -> Callable[[str, FileIdentity | None], Input] | None:
  """How to make an input from its entry in the list of a job, without listing a bucket again.

  Objects may be added while the processes of a job start, and some stores list them late. So all
  processes use the list that was frozen first.

  Args:
    images, prompts, concepts: as for `list_inputs`.

  Returns:
    A function of the name and the identity in the list; None if `images` is local, or a list or
    tar files, whose content determines the inputs.
  """
  plain = redact(images)
  if not is_url(images) or Path(plain).suffix.lower() in (".jsonl", ".tar"):
    return None
  if is_dataset(images) or record_format(plain):
    return None
  common = _common_prompts(prompts, concepts)
  store, where = locate(images)
  root = store.pin(where).url
  return lambda name, identity: Input(name, join(root, name), common, None, identity)


def _identified(listed: Iterable["_Listed"]) -> Iterator["_Listed"]:
  """Adds the identities of objects in lists, which are asked for in parallel."""
  listed = iter(listed)
  while chunk := list(itertools.islice(listed, CHUNK)):
    unknown = [i for i, one in enumerate(chunk) if one.identity is None and is_url(one.path)]
    found = identify_objects([chunk[i].path for i in unknown])
    for i, (url, identity) in zip(unknown, found, strict=True):
      chunk[i] = chunk[i]._replace(path=url, identity=identity)
    yield from chunk


def _identity(found: "_Listed", archives: dict[str, FileIdentity | None]) -> FileIdentity | None:
  if is_url(found.path):
    return found.identity
  if found.span is None and found.record is None:
    try:
      return identify(found.path)
    except OSError:  # like a missing image, it stays pending until it can be read
      return None
  if found.path not in archives:
    archives[found.path] = identify(found.path)
  archive = archives[found.path]
  if archive is None or found.span is None:
    return archive
  return FileIdentity(found.span[1], archive.modified)


def read_phrases(prompts: str) -> tuple[Prompt, ...]:
  """Prompts from a file with one phrase per line, or from phrases separated by commas.

  Raises:
    FileNotFoundError: `prompts` looks like the name of a file, and there is none.
    ValueError: there is no phrase, or the file cannot be read.
  """
  path = Path(prompts)
  if is_url(prompts):
    with _readable(prompts, "--prompts"), open_text(prompts) as file:
      given = file.read().splitlines()
  elif os.path.isfile(path):  # Path.is_file raises for text that is too long for a name
    with _readable(path, "--prompts"):
      given = path.read_text(encoding="utf-8-sig").splitlines()
  elif "/" in prompts or path.suffix == ".txt":
    raise FileNotFoundError(f"there is no file of phrases {prompts}; check --prompts.")
  else:
    given = prompts.split(",")
  found = dict.fromkeys(phrase.strip() for phrase in given if phrase.strip())
  if not found:
    raise ValueError(f"there is no phrase in --prompts {prompts!r}; give a file or 'a, b'.")
  for phrase in found:
    check_unicode(phrase)
  return tuple(Prompt(text=phrase) for phrase in found)


def check_phrases(inputs: Sequence[Input], tokenizer: Tokenizer) -> None:
  """Raises ValueError if phrases are longer than the text encoder's context, which would truncate
  them and so change their meaning."""
  found = dict.fromkeys(
    prompt.phrase for item in inputs for prompt in concept_prompts(item.prompts)
  )
  faults = [fault for phrase in found if (fault := tokenizer.fault(phrase))]
  raise_faults(faults, "phrases", SHORTEN)


class _Listed(NamedTuple):
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


def _listed(
  images: str,
  listing: Listing | None,
  notes: ListingNotes,
  columns: Columns,
  allow_https: bool,
) -> Iterator[_Listed]:
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
        yield _Listed(one.name, one.url, identity=one.identity)
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
      yield _Listed(found.name, found.path)
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
) -> Iterator[_Listed]:
  match Path(redact(path)).suffix.lower():
    case ".jsonl":
      yield from _in_lines(path, allow_https)
    case ".tar":
      yield from _in_tar(name, path, notes, identity)
    case ".gz" | ".tgz" | ".zst" | ".bz2" | ".xz" | ".zip":
      raise ValueError(f"{redact(path)} is compressed; unpack it, or give plain tar files.")
    case _:
      yield _Listed(name, path, identity=identity)


def _in_lines(path: str, allow_https: bool) -> Iterator[_Listed]:
  folder = parent(path) if is_url(path) else Path(path).parent
  with _readable(path, "--images"), open_text(path) as file:
    for number, line in enumerate(file, start=1):
      if line.strip():
        try:
          image, prompts = _line(parse_json(line, f"a line must be {LINE_FORMAT}"))
          where = join(folder, image)
          if is_url(where):
            check_allowed(where, allow_https)
        except (ValueError, TypeError) as error:
          yield _Listed(redact(path), "", fault=f"line {number}: {str(error).rstrip('.')}")
        else:
          yield _Listed(redact(image), where, prompts)


def _line(values: Any) -> tuple[str, tuple[AnyPrompt, ...] | None]:
  if not isinstance(values, dict) or not isinstance(values.get("image"), str):
    raise ValueError(f"a line must be {LINE_FORMAT}; got {shown(values)}")
  _check_name(values["image"])
  if unknown := set(values) - {"image", "prompts"}:
    raise ValueError(f"unknown {sorted(unknown)}; a line has only image and prompts")
  return values["image"], parse_prompts(values)


def _check_name(name: str) -> None:
  """Raises ValueError for a string that cannot be the name of a file."""
  try:
    possible = bool(os.fsencode(name)) and "\0" not in name
  except UnicodeEncodeError:  # a surrogate that does not stand for a byte
    possible = False
  if not possible:
    raise ValueError(f"{shown(name)} cannot be the name of a file")


def _in_tar(
  name: str, path: str, notes: ListingNotes, identity: FileIdentity | None
) -> Iterator[_Listed]:
  try:
    with _readable(path, "--images"):
      samples = list(list_samples(path, notes))
  except ValueError as error:
    yield _Listed(name, path, fault=str(error).rstrip("."))
    return
  for sample in samples:
    image = f"{name}/{sample.name}"
    try:
      prompts = _sidecar(sample.sidecar) if sample.sidecar else None
    except (ValueError, TypeError) as error:
      yield _Listed(image, path, fault=f"{image}: its .json: {str(error).rstrip('.')}")
    else:
      member = identity and dataclasses.replace(identity, size=sample.span[1])
      yield _Listed(image, path, prompts, sample.span, position=sample.span[0], identity=member)


def _in_records(
  name: str,
  path: str,
  format: str,
  columns: Columns,
  notes: ListingNotes,
  allow_https: bool,
  rows: int | None = None,
  identity: FileIdentity | None = None,
) -> Iterator[_Listed]:
  empty = True
  try:
    if is_url(path) and format not in ("parquet", "tfrecord"):
      raise ValueError("such files are read from local disks only; copy it to one")
    with _readable(path, "--images"):
      for record in list_records(path, format, columns, rows):
        empty = False
        yield _of_record(record, name, path, identity, allow_https)
  except ValueError as error:
    yield _Listed(name, path, fault=f"{name}: {str(error).rstrip('.')}")
    return
  if empty:
    notes.remark("file has no records", "files have no records", name)


def _of_record(
  record: ListedRecord, file: str, path: str, identity: FileIdentity | None, allow_https: bool
) -> _Listed:
  """A record of a file as a listed image; `identity` is that of an object."""
  row, fault, where, position = row_name(file, record.row), record.fault, path, record.row
  name = row if record.name is None else record.name
  try:
    _check_name(name)
    if record.path is not None:
      _check_name(record.path)
      where = join(parent(path) if is_url(path) else Path(path).parent, record.path)
      identity, position = None, -1
      if is_url(where):
        check_allowed(where, allow_https)
  except ValueError as error:
    fault = str(error)
  if identity is not None and record.span is not None:
    identity = dataclasses.replace(identity, size=record.span[1])
  fault = fault and f"{row}: {fault.rstrip('.')}"
  return _Listed(name, where, record.prompts, record.span, record.key, position, fault, identity)


def _sidecar(data: bytes) -> tuple[AnyPrompt, ...] | None:
  values = parse_json(data, SIDECAR_FORMAT)
  if not isinstance(values, dict):
    raise ValueError(f"{SIDECAR_FORMAT}; got {shown(values)}")
  return parse_prompts(values)


@contextlib.contextmanager
def _readable(path: str | Path, option: str) -> Iterator[None]:
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
