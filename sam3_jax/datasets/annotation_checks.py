"""Checks of annotations against their images and the tokenizer."""

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from sam3_jax.datasets.annotation_file import CHUNK
from sam3_jax.datasets.annotation_schema import Object, Pair
from sam3_jax.inputs.preprocess import displayed_size
from sam3_jax.inputs.tokenizer import phrase_fault
from sam3_jax.outputs.rle import areas
from sam3_jax.storage.urls import is_object, redact

if TYPE_CHECKING:
  from sam3_jax.inputs.tokenizer import Tokenizer

READERS = 32  # threads that open the images of a bucket
SLACK = 1.0  # pixels by which a box may exceed the image, since annotators round


def check(
  pairs: Sequence[Pair], images: str | Path | None, tokenizer: "Tokenizer | None" = None
) -> list[str]:
  """Lists all faults of pairs, one line each.

  Faults are duplicate ids; images that are missing, unreadable or of another size than stated;
  boxes without area or more than a pixel outside the image; masks that are empty, damaged or of
  another size than the image; phrases that are empty or have too many tokens.

  Args:
    pairs: the pairs to check.
    images: directory of the images; None to skip checking them.
    tokenizer: counts the tokens of phrases; None to skip that check.
  """
  faults = []
  ids: set[int] = set()
  for pair in pairs:
    if pair.id in ids:
      faults.append(f"image {pair.id}: this id occurs twice")
    ids.add(pair.id)
  if images is not None:
    sizes: dict[str, dict[tuple[int, int], None]] = defaultdict(dict)
    for pair in pairs:
      sizes[pair.file_name][pair.width, pair.height] = None
    faults += _image_faults(Path(images), sizes)
  objects = ((pair, i, one) for pair in pairs for i, one in enumerate(pair.objects, start=1))
  while chunk := list(itertools.islice(objects, CHUNK)):
    faults += _object_faults(chunk)
  faults += _phrase_faults(dict.fromkeys(pair.phrase for pair in pairs), tokenizer)
  return faults


def _image_faults(folder: Path, sizes: Mapping[str, Iterable[tuple[int, int]]]) -> Iterator[str]:
  """Faults of images, given the sizes stated by their pairs; opens each image once."""
  if not is_object(folder):
    for name, stated in sizes.items():
      yield from _faults_of_image(folder / name, stated)
    return
  with ThreadPoolExecutor(READERS) as pool:
    found = pool.map(lambda item: list(_faults_of_image(folder / item[0], item[1])), sizes.items())
    yield from itertools.chain.from_iterable(found)


def _faults_of_image(path: Path, stated: Iterable[tuple[int, int]]) -> Iterator[str]:
  name = redact(path)
  try:
    height, width = displayed_size(path)
  except FileNotFoundError:
    yield f"{name}: there is no such image"
  except (OSError, ValueError) as error:
    yield str(error).rstrip(".")
  else:
    yield from (
      f"{name} is displayed as {width} x {height}, but the annotation file says "
      f"{' x '.join(map(str, one))} (width x height)"
      for one in stated
      if one != (width, height)
    )


def _object_faults(chunk: Sequence[tuple[Pair, int, Object]]) -> Iterator[str]:
  """Faults of objects, each given with its pair and its number in the pair."""

  sizes = [(pair.height, pair.width) for pair, _, _ in chunk]
  pixels, faults = areas([one.rle for *_, one in chunk], sizes)
  for (pair, i, one), area, fault in zip(chunk, pixels.tolist(), faults, strict=True):
    x, y, w, h = one.box
    found: list[str] = []
    if w <= 0 or h <= 0:
      found.append("has no area")
    elif min(x, y) < -SLACK or x + w > pair.width + SLACK or y + h > pair.height + SLACK:
      found.append(f"extends beyond the {pair.width} x {pair.height} image")
    if found:
      shown = ", ".join(f"{value:g}" for value in one.box)
      found = [f"its box {shown} (x, y, width, height) {found[0]}"]
    if fault or not area:
      found.append(fault or "its mask is empty")
    yield from (f"{pair.file_name}, {pair.phrase!r:.60}, object {i}: {words}" for words in found)


def _phrase_faults(phrases: Iterable[str], tokenizer: "Tokenizer | None") -> Iterator[str]:
  for phrase in phrases:
    if fault := phrase_fault(phrase) if tokenizer is None else tokenizer.fault(phrase):
      yield fault
