"""The list of inputs, from a directory, a pattern, JSON lines or tar files.

The list and its order are the same for every process. Each image is in it once: an image that was
given several times has the prompts of all occurrences. Files that are left out are counted.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sam3_jax.batch.prompt_schema import (
  AnyPrompt,
  check_unicode,
  concept_prompts,
  parse_json,
  parse_prompts,
  unique_prompts,
)
from sam3_jax.batch.webdataset import list_samples
from sam3_jax.inputs.concept import ConceptFile
from sam3_jax.inputs.image_listing import find_files
from sam3_jax.inputs.prompts import Prompt
from sam3_jax.inputs.tokenizer import SHORTEN, Tokenizer
from sam3_jax.utils.identity import FileIdentity, identify, named
from sam3_jax.utils.json_text import shown
from sam3_jax.utils.notes import ListingNotes
from sam3_jax.utils.os_errors import error_text
from sam3_jax.utils.param_tree import raise_faults

LINE_FORMAT = (
  '{"image": "a.jpg", "prompts": ["cat", {"text": "dog", "boxes": [[x0, y0, x1, y1]]}, '
  '{"points": [[x, y]]}]}'
)
SIDECAR_FORMAT = 'it must be {"prompts": [...]}'  # of the .json file beside an image in a tar file


@dataclasses.dataclass(frozen=True, slots=True)
class Input:
  """An image and its prompts.

  Attributes:
    name: used in the results: as listed, or relative to the directory.
    path: the file that contains the image.
    prompts: at least one, without duplicates.
    span: offset and number of bytes in that file; None for the whole file.
    identity: of the file when it was listed; None if it did not exist. For a member of a tar file:
      size of the member, modification time of the tar file.
  """

  name: str
  path: str
  prompts: tuple[AnyPrompt, ...]
  span: tuple[int, int] | None = None
  identity: FileIdentity | None = None


def list_inputs(
  images: str,
  prompts: str | None = None,
  notes: ListingNotes | None = None,
  concepts: Sequence[ConceptFile] = (),
) -> list[Input]:
  """The inputs, each image once.

  Args:
    images: a directory (all images in and below it, by name), a pattern such as `shards/*.tar` or
      `a/*.jpg`, an image, a WebDataset tar file (not compressed; the prompts of `a.jpg` may be in
      `a.json`), or a .jsonl file with a `LINE_FORMAT` per line, images relative to its directory.
    prompts: for images without prompts of their own: a file with one phrase per line, or phrases
      separated by commas.
    notes: counts files that are left out, and missing or empty images, which will fail.
    concepts: likewise for images without prompts of their own, after `prompts`.

  Raises:
    FileNotFoundError: there is no such image, directory or list.
    ValueError: there is no image, lines or prompts are faulty (all are named), images have no
      prompts, a directory or list cannot be read, or a tar file is damaged.
  """
  notes = ListingNotes() if notes is None else notes
  common = read_phrases(prompts) if prompts is not None else ()
  common = unique_prompts([*common, *concepts])
  positions: dict[tuple[str, int], int] = {}
  tars: dict[str, FileIdentity | None] = {}
  inputs: list[Input] = []
  faults: list[str] = []
  without_prompts: list[str] = []
  for found in _listed(images, notes):
    own = common if found.prompts is None else found.prompts
    if found.fault:
      faults.append(found.fault)
      continue
    if not own:
      without_prompts.append(found.name)
      continue
    key = os.path.abspath(found.path), found.span[0] if found.span else -1
    position = positions.setdefault(key, len(inputs))
    if position == len(inputs):
      identity = _identity(found, tars)
      if identity is None:
        notes.remark("image does not exist", "images do not exist", found.name)
      elif not identity.size:
        notes.remark("image is empty", "images are empty", found.name)
      inputs.append(Input(found.name, found.path, own, found.span, identity))
    elif own is not inputs[position].prompts:
      union = unique_prompts(inputs[position].prompts + own)
      inputs[position] = dataclasses.replace(inputs[position], prompts=union)
  if without_prompts:
    images_named = named("image has no prompts", "images have no prompts", without_prompts)
    faults.append(f"{images_named}, and neither --prompts nor --concept is given")
  raise_faults(faults, images, "Correct the list, or give --prompts or --concept.")
  if not inputs:
    line = notes.line()
    raise ValueError(f"there is no image in {images}{line and f' ({line})'}; check --images.")
  return inputs


def _identity(found: "_Listed", tars: dict[str, FileIdentity | None]) -> FileIdentity | None:
  if found.span is None:
    try:
      return identify(found.path)
    except OSError:  # like a missing image, it stays pending until it can be read
      return None
  if found.path not in tars:
    tars[found.path] = identify(found.path)
  tar = tars[found.path]
  return tar and FileIdentity(found.span[1], tar.modified)


def read_phrases(prompts: str) -> tuple[Prompt, ...]:
  """Prompts from a file with one phrase per line, or from phrases separated by commas.

  Raises:
    FileNotFoundError: `prompts` looks like the name of a file, and there is none.
    ValueError: there is no phrase, or the file cannot be read.
  """
  path = Path(prompts)
  if os.path.isfile(path):  # Path.is_file raises for text that is too long for a name
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
  """A listed image, or a `fault`; `prompts` is None for an image without its own."""

  name: str
  path: str
  prompts: tuple[AnyPrompt, ...] | None = None
  span: tuple[int, int] | None = None
  fault: str = ""


def _listed(images: str, notes: ListingNotes) -> Iterator[_Listed]:
  directory = os.path.isdir(images)
  for found in find_files(images, notes):
    if directory:  # lists and tar files in it are not opened
      yield _Listed(found.name, found.path)
    else:
      yield from _in_file(found.name, found.path, notes)


def _in_file(name: str, path: str, notes: ListingNotes) -> Iterator[_Listed]:
  match Path(path).suffix.lower():
    case ".jsonl":
      yield from _in_lines(Path(path))
    case ".tar":
      yield from _in_tar(name, path, notes)
    case ".gz" | ".tgz" | ".zst" | ".bz2" | ".xz" | ".zip":
      raise ValueError(f"{path} is compressed; unpack it, or give plain tar files.")
    case _:
      yield _Listed(name, path)


def _in_lines(path: Path) -> Iterator[_Listed]:
  with _readable(path, "--images"), path.open(encoding="utf-8-sig") as file:
    for number, line in enumerate(file, start=1):
      if line.strip():
        try:
          image, prompts = _line(parse_json(line, f"a line must be {LINE_FORMAT}"))
        except (ValueError, TypeError) as error:
          yield _Listed(str(path), "", fault=f"line {number}: {str(error).rstrip('.')}")
        else:
          yield _Listed(image, str(path.parent / image), prompts)


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


def _in_tar(name: str, path: str, notes: ListingNotes) -> Iterator[_Listed]:
  try:
    with _readable(Path(path), "--images"):
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
      yield _Listed(image, path, prompts, sample.span)


def _sidecar(data: bytes) -> tuple[AnyPrompt, ...] | None:
  values = parse_json(data, SIDECAR_FORMAT)
  if not isinstance(values, dict):
    raise ValueError(f"{SIDECAR_FORMAT}; got {shown(values)}")
  return parse_prompts(values)


@contextlib.contextmanager
def _readable(path: Path, option: str) -> Iterator[None]:
  """Reading errors name the file and the option."""
  try:
    yield
  except OSError as error:
    what, why = error.filename or path, error_text(error)
    raise ValueError(
      f"{what} cannot be read ({why}); check its permissions and {option}."
    ) from error
  except UnicodeDecodeError as error:
    raise ValueError(f"{path} is not UTF-8 text; save it as UTF-8, or check {option}.") from error
