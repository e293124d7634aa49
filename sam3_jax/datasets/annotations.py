"""Reads annotation files as pairs of an image and a phrase, with the objects that match.

Two layouts are supported; files with `text_input` have the first:

- SA-Co (Meta, `sam3/eval/cgf1_eval.py`): an entry of `images` is a pair of an image and a phrase; a
  pair without annotations is a negative.
- COCO instances (https://cocodataset.org/#format-data): the phrases are the names of the
  categories. Random phrases of absent categories become negatives, reproducible by a seed.

All faults are reported together: invalid fields (`annotation_file.py`), boxes that contradict their
masks (`annotation_objects.py`), and images and phrases that do not fit (`annotation_checks.py`).
Skipped and unexpected entries are counted in `Notes`.
"""

import contextlib
import functools
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sam3_jax.datasets.annotation_checks import check
from sam3_jax.datasets.annotation_file import AnnotationFile
from sam3_jax.datasets.annotation_objects import ObjectCollector
from sam3_jax.datasets.annotation_schema import AbsentPhrases, ImageEntry, Object, Pair
from sam3_jax.inputs.tokenizer import clean
from sam3_jax.storage.urls import redact
from sam3_jax.utils.notes import Notes
from sam3_jax.utils.param_tree import raise_faults

if TYPE_CHECKING:
  from sam3_jax.inputs.tokenizer import Tokenizer

__all__ = ["REMEDY", "AbsentPhrases", "Object", "Pair", "check", "read", "read_checked"]

REMEDY = "Correct the annotation file, or name the right one."


def read(
  path: str | Path, *, negatives: int | None = None, seed: int = 0, notes: Notes | None = None
) -> list[Pair]:
  """Reads the pairs of an annotation file, in its order.

  Args:
    path: a JSON file in either layout.
    negatives: with COCO's layout, the number of absent phrases for each image; None for the number
      of present phrases, and at least one. SA-Co's layout has its own negatives.
    seed: of the choice of negatives, which depends only on it and the image's index in the file.
    notes: counts skipped and unexpected entries; None to issue them as warnings.

  Returns:
    The pairs. With COCO's layout, the pairs of an image are adjacent, present phrases first. Empty
    instances are left out; their pairs are not exhaustive.

  Raises:
    FileNotFoundError: no such file.
    ValueError: the file is invalid; the message names the faults.
  """
  with _noted(notes) as kept:
    pairs, faults = _read(Path(path), negatives, seed, kept, {})
    raise_faults(faults, redact(path), REMEDY)
  return pairs


def read_checked(
  path: str | Path,
  images: str | Path | None,
  tokenizer: "Tokenizer | None" = None,
  *,
  negatives: int | None = None,
  seed: int = 0,
  notes: Notes | None = None,
  absent: dict[str, AbsentPhrases] | None = None,
) -> list[Pair]:
  """Calls `read` and `check`, and reports the faults of both together.

  With COCO's layout, `absent` is filled with all absent phrases of each image, by file name.
  SA-Co's layout has its own negatives.

  Raises:
    FileNotFoundError: no such annotation file.
    ValueError: there are faults; the message counts them and names the first twenty.
  """
  with _noted(notes) as kept:
    found: dict[str, AbsentPhrases] = {} if absent is None else absent
    pairs, faults = _read(Path(path), negatives, seed, kept, found)
    faults += check(pairs, images, tokenizer)
    raise_faults(list(dict.fromkeys(faults)), redact(path), REMEDY)
  return pairs


@contextlib.contextmanager
def _noted(notes: Notes | None) -> Iterator[Notes]:
  """Yields the caller's notes, or new notes that are issued as warnings at the end."""
  kept = Notes() if notes is None else notes
  yield kept
  if notes is None:
    kept.warn()


def _read(
  path: Path, negatives: int | None, seed: int, notes: Notes, absent: dict[str, AbsentPhrases]
) -> tuple[list[Pair], list[str]]:
  if negatives is not None and negatives < 0:
    raise ValueError(f"negatives must be None or at least 0 phrases per image; got {negatives}.")
  file = AnnotationFile(path, notes)
  objects = ObjectCollector(file)
  for chunk in file.chunks():
    objects.add(chunk)
  objects.finish()
  if file.coco:
    pairs = list(_coco_pairs(file, objects, negatives, seed, absent))
  else:
    pairs = list(_saco_pairs(file, objects))
  return pairs, file.faults


def _saco_pairs(file: AnnotationFile, objects: ObjectCollector) -> Iterator[Pair]:
  """Pairs in SA-Co's layout: each entry of `images` is a pair."""
  seen: dict[tuple[str, str], Pair] = {}
  cleaned = functools.cache(clean)
  for image in file.images:
    pair = _pair(image.id, image, image.phrase, objects)
    yield pair
    first = seen.setdefault((image.file_name, cleaned(image.phrase)), pair)
    if first is pair:
      continue
    masks = [{one.rle["counts"] for one in both.objects} for both in (first, pair)]
    if masks[0] == masks[1]:
      file.notes.add("pairs of an image and a phrase that are listed again", f"image {pair.id}")
    else:
      file.faults.append(
        f"images {first.id} and {pair.id} are both {pair.file_name} with {pair.phrase!r:.60}, but "
        f"have different instances ({len(first.objects)} and {len(pair.objects)})"
      )


def _coco_pairs(
  file: AnnotationFile, objects: ObjectCollector, negatives: int | None, seed: int,
  every_absent: dict[str, AbsentPhrases],
) -> Iterator[Pair]:  # fmt: skip
  """Pairs in COCO's layout: present categories and a random choice of absent ones. All absent ones
  are added to `every_absent`."""
  category_phrases = {number: name for name, several in file.phrases.items() for number in several}

  def named(categories: set[int]) -> frozenset[str]:
    return frozenset(category_phrases[one] for one in categories if one in category_phrases)

  present_in: dict[int, set[str]] = defaultdict(set)
  for number, phrase in [*objects.found, *objects.unfinished]:
    present_in[number].add(phrase)
  count = 0
  candidates = tuple(phrase for phrase in file.phrases if phrase not in file.never_absent)
  for index, image in enumerate(file.images):
    # LVIS lists the categories that are verified absent and those not annotated exhaustively.
    unfinished = named(image.unfinished)
    found = present_in.get(image.id, ())
    present = [phrase for phrase in file.phrases if phrase in found] if found else []
    verified = None if image.negative is None else named(image.negative)
    absent = AbsentPhrases(candidates, frozenset(found), verified).listed()
    every_absent[image.file_name] = AbsentPhrases(candidates, unfinished.union(found), verified)
    wanted = max(1, len(present)) if negatives is None else negatives
    order = np.random.default_rng((seed, index)).permutation(len(absent))[:wanted]
    for phrase in present + [absent[i] for i in sorted(order)]:
      ids = image.id, file.phrases[phrase]
      yield _pair(count, image, phrase, objects, phrase not in unfinished, *ids)
      count += 1


def _pair(
  number: int,
  image: ImageEntry,
  phrase: str,
  objects: ObjectCollector,
  exhaustive: bool = True,
  image_id: int | None = None,
  category_ids: tuple[int, ...] = (),
) -> Pair:
  return Pair(
    id=number,
    file_name=image.file_name,
    width=image.width,
    height=image.height,
    phrase=phrase,
    exhaustive=exhaustive and image.exhaustive and (image.id, phrase) not in objects.unfinished,
    objects=tuple(objects.found.get((image.id, phrase), ())),
    image_id=image_id,
    category_ids=category_ids,
  )
