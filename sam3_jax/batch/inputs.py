"""The list of inputs, from a directory, a pattern, JSON lines or tar files.

The list and its order are the same for every process, and each image stands in it once, however
often it was given: with all the prompts that it was given with. What is left out is counted.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sam3_jax.batch.prompt_schema import (
  AnyPrompt,
  check_text,
  concepts,
  distinct,
  from_json,
  own_prompts,
)
from sam3_jax.batch.webdataset import members
from sam3_jax.inputs.image_listing import find_files
from sam3_jax.inputs.prompts import Prompt
from sam3_jax.inputs.tokenizer import SHORTEN, Tokenizer
from sam3_jax.utils.identity import FileIdentity, identify
from sam3_jax.utils.json_text import shown
from sam3_jax.utils.notes import ListingNotes
from sam3_jax.utils.os_errors import error_text
from sam3_jax.utils.param_tree import raise_faults

FORM = (
  '{"image": "a.jpg", "prompts": ["cat", {"text": "dog", "boxes": [[x0, y0, x1, y1]]}, '
  '{"points": [[x, y]]}]}'
)
BESIDE = 'it must be {"prompts": [...]}'  # the file beside an image


@dataclasses.dataclass(frozen=True, slots=True)
class Input:
  """An image and what is asked about it.

  Attributes:
    name: what it is called in the results: as listed, or relative to the folder.
    path: the file that it is in.
    prompts: at least one, each once.
    span: where in that file, offset and bytes; None for all of it.
    identity: of the file when it was listed; None if it was not there. Of a member of a tar file:
      the member's size and the tar file's modification time.
  """

  name: str
  path: str
  prompts: tuple[AnyPrompt, ...]
  span: tuple[int, int] | None = None
  identity: FileIdentity | None = None


def find(images: str, prompts: str | None = None, notes: ListingNotes | None = None) -> list[Input]:
  """The inputs, each image once.

  Args:
    images: a directory (all images in and below it, by name), a pattern such as `shards/*.tar` or
      `a/*.jpg`, an image, a webdataset's tar file (not compressed; the prompts of `a.jpg` may be
      in `a.json`), or a .jsonl file with one `FORM` a line, images relative to its directory.
    prompts: of images that come without their own: a file with a phrase a line, or phrases with
      commas between them.
    notes: counts what is left out, and images that are not there or empty, which will fail.

  Raises:
    FileNotFoundError: no such image, directory or list.
    ValueError: no image, faulty lines or prompts (all are named), images without prompts, a
      directory or list that cannot be read, or a tar file that is damaged.
  """
  notes = ListingNotes() if notes is None else notes
  common = phrases(prompts) if prompts is not None else ()
  places: dict[tuple[str, int], int] = {}
  tars: dict[str, FileIdentity | None] = {}
  inputs: list[Input] = []
  faults: list[str] = []
  bare: list[str] = []
  for found in _listed(images, notes):
    asked = common if found.prompts is None else found.prompts
    if found.fault:
      faults.append(found.fault)
      continue
    if not asked:
      bare.append(found.name)
      continue
    key = os.path.abspath(found.path), found.span[0] if found.span else -1
    place = places.setdefault(key, len(inputs))
    if place == len(inputs):
      identity = _identity(found, tars)
      if identity is None:
        notes.remark("image is not there", "images are not there", found.name)
      elif not identity.size:
        notes.remark("image is empty", "images are empty", found.name)
      inputs.append(Input(found.name, found.path, asked, found.span, identity))
    elif asked is not inputs[place].prompts:
      union = distinct(inputs[place].prompts + asked)
      inputs[place] = dataclasses.replace(inputs[place], prompts=union)
  if bare:
    others = f", nor have {len(bare) - 1:,} others" if len(bare) > 1 else ""
    faults.append(f"{bare[0]} has no prompts{others}, and --prompts is not given")
  raise_faults(faults, images, "Correct the list, or give --prompts.")
  if not inputs:
    line = notes.line()
    raise ValueError(f"there is no image in {images}{line and f' ({line})'}; check --images.")
  return inputs


def _identity(found: "_Listed", tars: dict[str, FileIdentity | None]) -> FileIdentity | None:
  if found.span is None:
    try:
      return identify(found.path)
    except OSError:  # it stays pending, as one that is not there, until it can be read
      return None
  if found.path not in tars:
    tars[found.path] = identify(found.path)
  tar = tars[found.path]
  return tar and FileIdentity(found.span[1], tar.modified)


def phrases(prompts: str) -> tuple[Prompt, ...]:
  """Prompts from a file with one phrase a line, or from phrases with commas between them.

  Raises:
    FileNotFoundError: what looks like a file is not there.
    ValueError: there is no phrase in it, or it cannot be read.
  """
  path = Path(prompts)
  if os.path.isfile(path):  # false of many phrases, where Path's own raises: too long for a name
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
    check_text(phrase)
  return tuple(Prompt(text=phrase) for phrase in found)


def check_phrases(inputs: Sequence[Input], tokenizer: Tokenizer) -> None:
  """Raises ValueError if phrases are longer than the text encoder reads; it would read their
  beginnings alone, and find something else."""
  found = dict.fromkeys(prompt.phrase for one in inputs for prompt in concepts(one.prompts))
  faults = [fault for phrase in found if (fault := tokenizer.fault(phrase))]
  raise_faults(faults, "phrases", SHORTEN)


class _Listed(NamedTuple):
  """An image as it was listed; `prompts` is None for those of all. Or what is wrong with it."""

  name: str
  path: str
  prompts: tuple[AnyPrompt, ...] | None = None
  span: tuple[int, int] | None = None
  fault: str = ""


def _listed(images: str, notes: ListingNotes) -> Iterator[_Listed]:
  directory = os.path.isdir(images)
  for found in find_files(images, notes):
    if directory:  # its images alone
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
          image, prompts = _line(from_json(line, f"a line must be {FORM}"))
        except (ValueError, TypeError) as error:
          yield _Listed(str(path), "", fault=f"line {number}: {str(error).rstrip('.')}")
        else:
          yield _Listed(image, str(path.parent / image), prompts)


def _line(values: Any) -> tuple[str, tuple[AnyPrompt, ...] | None]:
  if not isinstance(values, dict) or not isinstance(values.get("image"), str):
    raise ValueError(f"a line must be {FORM}; got {shown(values)}")
  _check_name(values["image"])
  if unknown := set(values) - {"image", "prompts"}:
    raise ValueError(f"unknown {sorted(unknown)}; a line has only image and prompts")
  return values["image"], own_prompts(values)


def _check_name(name: str) -> None:
  """Raises ValueError for what no file can be called."""
  try:
    possible = bool(os.fsencode(name)) and "\0" not in name
  except UnicodeEncodeError:  # half of a surrogate pair; halves that stand for bytes are fine
    possible = False
  if not possible:
    raise ValueError(f"{shown(name)} cannot be the name of a file")


def _in_tar(name: str, path: str, notes: ListingNotes) -> Iterator[_Listed]:
  try:
    with _readable(Path(path), "--images"):
      samples = list(members(path, notes))
  except ValueError as error:
    yield _Listed(name, path, fault=str(error).rstrip("."))
    return
  for sample in samples:
    image = f"{name}/{sample.name}"
    try:
      prompts = _beside(sample.notes) if sample.notes else None
    except (ValueError, TypeError) as error:
      yield _Listed(image, path, fault=f"{image}: its .json: {str(error).rstrip('.')}")
    else:
      yield _Listed(image, path, prompts, sample.span)


def _beside(notes: bytes) -> tuple[AnyPrompt, ...] | None:
  values = from_json(notes, BESIDE)
  if not isinstance(values, dict):
    raise ValueError(f"{BESIDE}; got {shown(values)}")
  return own_prompts(values)


@contextlib.contextmanager
def _readable(path: Path, option: str) -> Iterator[None]:
  """Errors of reading say what could not be read, and which option it was given by."""
  try:
    yield
  except OSError as error:
    what, why = error.filename or path, error_text(error)
    raise ValueError(f"{what} cannot be read ({why}); check its rights and {option}.") from error
  except UnicodeDecodeError as error:
    raise ValueError(f"{path} is no text in UTF-8; save it so, or check {option}.") from error
