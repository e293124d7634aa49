"""The list of inputs, from a directory, a pattern, JSON lines, tar files or files of records.

The list and its order are the same for every process. Each image is in it once: an image that was
given several times has the prompts of all occurrences. Files that are left out are counted.
"""

import collections
import dataclasses
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from sam3_jax.batch.input_list import Input, PrefixInputs
from sam3_jax.batch.listed_images import ListedImage, list_images, readable
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
  unique_prompts,
)
from sam3_jax.batch.record_files.columns import Columns
from sam3_jax.batch.record_files.listing import record_format
from sam3_jax.batch.record_files.named import is_dataset
from sam3_jax.inputs.concept import ConceptFile
from sam3_jax.inputs.prompts import Prompt
from sam3_jax.inputs.tokenizer import SHORTEN, Tokenizer
from sam3_jax.storage.store import locate
from sam3_jax.storage.urls import is_url, join, redact
from sam3_jax.utils.identity import FileIdentity, identify, named
from sam3_jax.utils.notes import ListingNotes
from sam3_jax.utils.param_tree import raise_faults

CHUNK = 1024  # images whose identities are asked for at the same time


def list_inputs(
  images: str,
  prompts: str | None = None,
  notes: ListingNotes | None = None,
  *,
  concepts: Sequence[ConceptFile] = (),
  texts: Sequence[str] = (),
  columns: Columns | None = None,
  allow_https: bool = False,
) -> Sequence[Input]:
  """The inputs, each image once.

  Args:
    images: a directory (all images in and below it, by name), a pattern such as `shards/*.tar` or
      `a/*.jpg`, an image, a WebDataset tar file (not compressed; the prompts of `a.jpg` may be in
      `a.json`), a .jsonl file with a `listed_images.LINE_FORMAT` per line, images relative to its
      directory, a file of records (see `record_files`), or a dataset by name (see
      `record_files.named`). Files may be URLs, see `sam3_jax.storage`.
    prompts: for images without prompts of their own: a file with one phrase per line, or phrases
      separated by commas.
    notes: counts files that are left out, and missing or empty images, which will fail.
    concepts, texts: likewise for images without prompts of their own, after `prompts`.
    columns: to read of files of records.
    allow_https: whether `images`, `prompts` and the lines of a list may be addresses on web
      servers.

  Raises:
    FileNotFoundError: there is no such image, directory, list or dataset.
    ImportError: a file of records needs a package that is not installed.
    ValueError: there is no image, lines or prompts are faulty (all are named), images have no
      prompts, a directory or list cannot be read, or a tar file is damaged.
  """
  notes = ListingNotes() if notes is None else notes
  if prompts is not None and is_url(prompts):
    check_allowed(prompts, allow_https)
  common = _common_prompts(prompts, concepts, texts)
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
  for found in _identified(list_images(images, listing, notes, columns, allow_https)):
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
    faults.append(f"{images_named}, and none of --prompts, --text and --concept is given")
  if columns.name is not None:
    counts = collections.Counter(item.name for item in inputs)
    if repeated := [name for name, count in counts.items() if count > 1]:
      found = named("name", "names", repeated)
      faults.append(f"--name-column {columns.name} gives several images the same name: {found}")
  give = ", or give --prompts or --concept" if without_prompts else ""
  raise_faults(faults, redact(images), f"Correct the files or the options{give}.")
  if not inputs:
    raise _no_image(images, notes)
  return inputs


def _common_prompts(
  prompts: str | None, concepts: Sequence[ConceptFile], texts: Sequence[str]
) -> tuple[AnyPrompt, ...]:
  """The prompts of images without prompts of their own."""
  return unique_prompts([*common_phrases(prompts, texts), *concepts])


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
  images: str,
  prompts: str | None,
  concepts: Sequence[ConceptFile] = (),
  texts: Sequence[str] = (),
) -> Callable[[str, FileIdentity | None], Input] | None:
  """How to make an input from its entry in the list of a job, without listing a bucket again.

  Objects may be added while the processes of a job start, and some stores list them late. So all
  processes use the list that was frozen first.

  Args:
    images, prompts, concepts, texts: as for `list_inputs`.

  Returns:
    A function of the name and the identity in the list; None if `images` is local, or a list or
    tar files, whose content determines the inputs.
  """
  plain = redact(images)
  if not is_url(images) or Path(plain).suffix.lower() in (".jsonl", ".tar"):
    return None
  if is_dataset(images) or record_format(plain):
    return None
  common = _common_prompts(prompts, concepts, texts)
  store, where = locate(images)
  root = store.pin(where).url
  return lambda name, identity: Input(name, join(root, name), common, None, identity)


def _identified(listed: Iterable[ListedImage]) -> Iterator[ListedImage]:
  """Adds the identities of objects in lists, which are asked for in parallel."""
  listed = iter(listed)
  while chunk := list(itertools.islice(listed, CHUNK)):
    unknown = [i for i, one in enumerate(chunk) if one.identity is None and is_url(one.path)]
    found = identify_objects([chunk[i].path for i in unknown])
    for i, (url, identity) in zip(unknown, found, strict=True):
      chunk[i] = chunk[i]._replace(path=url, identity=identity)
    yield from chunk


def _identity(found: ListedImage, archives: dict[str, FileIdentity | None]) -> FileIdentity | None:
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


def common_phrases(prompts: str | None, texts: Sequence[str] = ()) -> tuple[Prompt, ...]:
  """The phrases of `--prompts` and of `--text`, each once.

  Args:
    prompts: as in `read_phrases`; None for none.
    texts: further phrases.

  Raises:
    FileNotFoundError, ValueError: as `read_phrases`, or a phrase of `texts` is empty.
  """
  found = list(read_phrases(prompts)) if prompts is not None else []
  for text in texts:
    if not text.strip():
      raise ValueError("--text is empty; give a phrase, such as --text player.")
    check_unicode(text)
    found.append(Prompt(text=text.strip()))
  return tuple(dict.fromkeys(found))


def read_phrases(prompts: str) -> tuple[Prompt, ...]:
  """Prompts from a file with one phrase per line, or from phrases separated by commas.

  Raises:
    FileNotFoundError: `prompts` looks like the name of a file, and there is none.
    ValueError: there is no phrase, or the file cannot be read.
  """
  path = Path(prompts)
  if is_url(prompts):
    with readable(prompts, "--prompts"), open_text(prompts) as file:
      given = file.read().splitlines()
  elif os.path.isfile(path):  # Path.is_file raises for text that is too long for a name
    with readable(path, "--prompts"):
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
