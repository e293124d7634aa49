"""Annotation files: pairs of an image and a phrase, with the objects that match, and their faults.

Two layouts are read, told apart by `text_input`:

- SA-Co's (Meta, `sam3/eval/cgf1_eval.py`): an entry of `images` is a pair of an image and a
  phrase; a pair without annotations is a negative.
- COCO's instances (https://cocodataset.org/#format-data): the phrases are the names of the
  categories; some that an image lacks become its negatives, drawn at random but always the same.

Fields that contradict each other are faults, as those that are wrong by themselves; all come in one
report. What is left out or surprising is counted in `Notes`. `annotation_file.py` has the fields,
`agreement.py` boxes against masks, and `check` what only images and tokenizer tell.
"""

import contextlib
import dataclasses
import functools
import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from sam3_jax.datasets import agreement
from sam3_jax.datasets.annotation_file import CHUNK, AnnotationFile, Image, Instance
from sam3_jax.inputs.preprocess import displayed_size
from sam3_jax.inputs.tokenizer import clean, phrase_fault
from sam3_jax.outputs.rle import Box, Compressed, Rle, areas, bounds, compress_all, finite
from sam3_jax.utils.json_text import shown
from sam3_jax.utils.notes import Notes
from sam3_jax.utils.param_tree import raise_faults

if TYPE_CHECKING:
  from sam3_jax.inputs.tokenizer import Tokenizer

SLACK = 1.0  # pixels by which a box may reach beyond the image: annotators round
REMEDY = "Correct the annotation file, or name the right one."


@dataclasses.dataclass(frozen=True, slots=True)
class Object:
  """One thing in an image.

  Attributes:
    rle: its mask, in COCO's compressed run lengths.
    box: x, y, width, height in pixels of the image.
    crowd: the mask covers several things that were not told apart.
  """

  rle: Rle
  box: Box
  crowd: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Pair:
  """An image, a phrase, and all objects in the image that match it (none: a negative).

  Attributes:
    id: of SA-Co's entry in `images`; with COCO's layout, its place in the list.
    file_name: of the image, below the folder of images.
    width, height: of the image, in pixels.
    exhaustive: every object that matches is annotated.
    image_id, category_ids: with COCO's layout, the image's id in the file and those of the
      categories whose name the phrase is, mostly one: what results in that layout name the pair by.
  """

  id: int
  file_name: str
  width: int
  height: int
  phrase: str
  exhaustive: bool = True
  objects: tuple[Object, ...] = ()
  image_id: int | None = None
  category_ids: tuple[int, ...] = ()


def read(
  path: str | Path, *, negatives: int | None = None, seed: int = 0, notes: Notes | None = None
) -> list[Pair]:
  """The pairs of an annotation file, in its order.

  Args:
    path: a JSON file in either layout.
    negatives: with COCO's layout, phrases an image that are absent from it; None for as many as
      are present, and at least one. SA-Co's layout has its own.
    seed: of their choice, which depends on nothing but this and the image's place in the file.
    notes: counts what is left out or surprising; None to issue it as warnings.

  Returns:
    With COCO's layout, an image's pairs follow each other, present phrases first. Instances
    without a pixel are left out; their pairs are not exhaustive.

  Raises:
    FileNotFoundError: no such file.
    ValueError: it is no such file, or its entries contradict each other; all faults are named.
  """
  with _noted(notes) as kept:
    pairs, faults = _read(Path(path), negatives, seed, kept)
    raise_faults(faults, str(path), REMEDY)
  return pairs


def read_checked(
  path: str | Path,
  images: str | Path | None,
  tokenizer: "Tokenizer | None" = None,
  *,
  negatives: int | None = None,
  seed: int = 0,
  notes: Notes | None = None,
) -> list[Pair]:
  """`read` and `check`, with one report for the faults of both.

  Raises:
    FileNotFoundError: no such annotation file.
    ValueError: of any fault, in one line that names the first twenty and counts them all.
  """
  with _noted(notes) as kept:
    pairs, faults = _read(Path(path), negatives, seed, kept)
    faults += check(pairs, images, tokenizer)
    raise_faults(list(dict.fromkeys(faults)), str(path), REMEDY)
  return pairs


def check(
  pairs: Sequence[Pair], images: str | Path | None, tokenizer: "Tokenizer | None" = None
) -> list[str]:
  """All faults of all pairs, a line each; an empty list if there are none.

  Found are: ids that occur twice; images that are missing, unreadable, or of another size than
  the file says; boxes without area or more than a pixel outside the image; masks that are empty,
  damaged, or not of the image's size; phrases that are empty or of too many tokens.

  Args:
    images: the folder of images; None leaves them unopened.
    tokenizer: counts the tokens; None leaves that out.
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


@contextlib.contextmanager
def _noted(notes: Notes | None) -> Iterator[Notes]:
  """The caller's notes, or new ones that are issued as warnings at the end."""
  kept = Notes() if notes is None else notes
  yield kept
  if notes is None:
    kept.warn()


def _read(
  path: Path, negatives: int | None, seed: int, notes: Notes
) -> tuple[list[Pair], list[str]]:
  if negatives is not None and negatives < 0:
    raise ValueError(f"negatives must be None or at least 0 phrases an image; got {negatives}.")
  file = AnnotationFile(path, notes)
  objects = _Objects(file)
  for chunk in file.chunks():
    objects.add(chunk)
  objects.finish()
  pairs = list(_coco_pairs(file, objects, negatives, seed) if file.coco else _pairs(file, objects))
  return pairs, file.faults


class _Objects:
  """Objects by image and phrase, once their fields are known to agree.

  Attributes:
    found: the objects; no two of an image and a phrase have the same mask.
    unfinished: images and phrases one of whose instances is known but has no mask.
  """

  def __init__(self, file: AnnotationFile):
    self.found: dict[tuple[int, str], list[Object]] = defaultdict(list)
    self.unfinished: set[tuple[int, str]] = set()
    self._file = file
    self._seen: dict[tuple[int, str], set[tuple[str, bool]]] = defaultdict(set)
    self._listed: dict[tuple[int, str], dict[int, set[str]]] = {}  # by image_id, where several
    self._contradictions: list[tuple[Instance, np.ndarray, np.ndarray]] = []
    self._drawn = self._empty = 0  # masks by annotators, and those of them without a pixel
    self._empties: dict[str, None] = {}
    self._most, self._broken = 0.0, False  # of coordinates of polygons; whether some are not whole

  @np.errstate(over="ignore", invalid="ignore")  # of boxes of any size
  def add(self, chunk: Sequence[Instance]) -> None:
    """Adds instances, a chunk at a time."""
    sizes = [(one.image.height, one.image.width) for one in chunk]
    masks = compress_all([one.segmentation for one in chunk], sizes)
    boxes = self._boxes(chunk, masks)
    wrong, empty = self._contradicting(chunk, boxes, masks), masks.empty
    lost: Any = np.isnan(boxes).any(axis=1)
    drawn = [isinstance(one.segmentation, list) for one in chunk]
    polygons = [i for i, rle in enumerate(masks.rles) if rle is not None and drawn[i]]
    corners = masks.extents[polygons, :2] + masks.extents[polygons, 2:]
    self._most = max(self._most, corners.max(initial=0))
    self._broken |= bool((corners % 1).any())
    for i, one in enumerate(chunk):
      rle, box = masks.rles[i], boxes[i]
      if rle is None:
        self._file.faults.append(f"{one.name}: {masks.faults[i]}")
      elif lost[i]:
        got = shown(one.box, 60)
        self._file.faults.append(f"{one.name}: its bbox must be [x, y, width, height]; got {got}")
      elif empty[i]:
        self._add_empty(one)
      elif wrong[i]:
        self._contradictions.append((one, box, masks.bounds[i]))
      else:
        self._add(one, Object(rle, tuple(box.tolist()), one.crowd))

  @np.errstate(over="ignore", invalid="ignore")
  def finish(self) -> None:
    """Adds the faults that only all instances together show."""
    faults, images = self._file.faults, self._file.images
    for one, box, bound in self._contradictions:
      faults.append(f"{one.name}: {self._contradiction(one, box, bound)}")
    if self._broken and self._most <= 1 and max(min(i.width, i.height) for i in images) > 2:
      faults.append("no coordinate of its polygons is over 1: they must be pixels, not fractions")
    elif 2 * self._empty > self._drawn:
      faults.append(
        f"{self._empty:,} of {self._drawn:,} masks have no pixel: its mask is empty, for instance, "
        f"of {next(iter(self._empties))}; polygons and runs are in pixels of the image"
      )
    for (number, phrase), by_id in self._listed.items():
      if len(by_id) > 1 and len({frozenset(masks) for masks in by_id.values()}) > 1:
        ids = " and ".join(map(str, by_id))
        faults.append(
          f"images {ids} are the same file, and each has instances of {phrase!r}: annotate them "
          f"under one id (image {number})"
        )

  def _boxes(self, chunk: Sequence[Instance], masks: Compressed) -> Float[np.ndarray, "n 4"]:
    """In pixels; the mask's where there is none, and NaN where it is no box."""
    sound = [isinstance(one.box, list) and len(one.box) == 4 and finite(one.box) for one in chunk]
    nothing = [np.nan] * 4
    given = [one.box if ok else nothing for one, ok in zip(chunk, sound, strict=True)]
    boxes = np.array(given, np.float64).reshape(-1, 4)
    if self._file.fractions:
      boxes *= [[one.image.width, one.image.height] * 2 for one in chunk] or 1
    missing = [i for i, one in enumerate(chunk) if one.box is None]
    boxes[missing] = masks.bounds[missing]
    return boxes

  def _contradicting(
    self, chunk: Sequence[Instance], boxes: Float[np.ndarray, "n 4"], masks: Compressed
  ) -> np.ndarray:
    """Which boxes are those of something else than their masks. Boxes that are only loose are
    replaced by the masks' bounds, as are those that a model found beside its masks."""
    extent = np.array([[one.image.width, one.image.height] * 2 for one in chunk]).reshape(-1, 4)
    exact = agreement.agree(boxes, masks.bounds, masks.extents)
    crowd = np.array([one.crowd for one in chunk], bool)
    scored = np.array([one.scored for one in chunk], bool)
    judged = ~exact & ~crowd & ~masks.empty & ~np.isnan(boxes).any(axis=1)
    loose = judged & (scored | (agreement.overlaps(boxes, masks.bounds) >= agreement.LEAST))
    leaving = (boxes[:, :2] < -SLACK) | (boxes[:, :2] + boxes[:, 2:] > extent[:, :2] + SLACK)
    clipped = exact & masks.outside & leaving.any(axis=1)
    boxes[loose | clipped] = masks.bounds[loose | clipped]
    for i in np.flatnonzero(loose).tolist():
      self._file.notes.add("boxes unlike their masks, replaced by the masks' bounds", chunk[i].name)
    for i in np.flatnonzero(masks.outside & ~masks.empty).tolist():
      self._file.notes.add("polygons that leave their image, cut off at its border", chunk[i].name)
    self._drawn += int((~scored).sum())
    return judged & ~loose

  def _add(self, one: Instance, thing: Object) -> None:
    key, counts = (one.image.id, one.phrase), thing.rle["counts"]
    if one.image_id != one.image.id or key in self._listed:
      known = {one.image.id: {mask for mask, _ in self._seen[key]}} if self._seen[key] else {}
      self._listed.setdefault(key, known).setdefault(one.image_id, set()).add(counts)
    if (counts, thing.crowd) in self._seen[key]:
      self._file.notes.add("instances with the mask of another one, left out", one.name)
      return
    self._seen[key].add((counts, thing.crowd))
    self.found[key].append(thing)

  def _add_empty(self, one: Instance) -> None:
    self._file.notes.add("instances without a pixel, left out", one.name)
    self.unfinished.add((one.image.id, one.phrase))
    if not one.scored:
      self._empty += 1
      self._empties.setdefault(one.name)

  def _contradiction(self, one: Instance, box: np.ndarray, bound: np.ndarray) -> str:
    width, height = one.image.width, one.image.height
    looks = agreement.describe(box, bound, width, height) or self._other(one, box)
    own, wanted = (", ".join(f"{value:g}" for value in values) for values in (box, bound))
    shown = f"its box {own} (x, y, width, height)"
    x, y, w, h = box
    if w <= 0 or h <= 0:
      return f"{shown} has no area{looks}; the bounds of its mask are {wanted}"
    if min(x, y) < -SLACK or x + w > width + SLACK or y + h > height + SLACK:
      return f"{shown} leaves the {width} x {height} image{looks}; that of its mask is {wanted}"
    return f"{shown} is not that of its mask, {wanted}{looks}"

  def _other(self, one: Instance, box: np.ndarray) -> str:
    """Whether it is the box of another object in the image, in words."""
    for phrase in self._file.phrases or [one.phrase]:
      for thing in self.found.get((one.image.id, phrase), ()):
        if agreement.agree(box[None], np.array([bounds(thing.rle)]))[0]:
          return f" (it looks like that of another object, {phrase!r})"
    return ""


def _pairs(file: AnnotationFile, objects: _Objects) -> Iterator[Pair]:
  """SA-Co's: an image of the file is a pair."""
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
  file: AnnotationFile, objects: _Objects, negatives: int | None, seed: int
) -> Iterator[Pair]:
  category_phrases = {number: name for name, several in file.phrases.items() for number in several}
  present_in: dict[int, set[str]] = defaultdict(set)
  for number, phrase in [*objects.found, *objects.unfinished]:
    present_in[number].add(phrase)
  count = 0
  askable = [phrase for phrase in file.phrases if phrase not in file.never_absent]
  for index, image in enumerate(file.images):
    # LVIS says which categories were looked for in an image, and which not to the end.
    unfinished = {category_phrases.get(one) for one in image.unfinished}
    there = present_in.get(image.id, ())
    present = [phrase for phrase in file.phrases if phrase in there] if there else []
    absent = [phrase for phrase in askable if phrase not in there]
    if image.negative is not None:
      looked_for = {category_phrases.get(one) for one in image.negative}
      absent = [phrase for phrase in absent if phrase in looked_for]
    wanted = max(1, len(present)) if negatives is None else negatives
    order = np.random.default_rng((seed, index)).permutation(len(absent))[:wanted]
    for phrase in present + [absent[i] for i in sorted(order)]:
      ids = image.id, file.phrases[phrase]
      yield _pair(count, image, phrase, objects, phrase not in unfinished, *ids)
      count += 1


def _pair(
  number: int,
  image: Image,
  phrase: str,
  objects: _Objects,
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


def _image_faults(folder: Path, sizes: Mapping[str, Iterable[tuple[int, int]]]) -> Iterator[str]:
  """Of images and the sizes that the pairs say they have; each image is opened once."""
  for name, said in sizes.items():
    try:
      height, width = displayed_size(folder / name)
    except FileNotFoundError:
      yield f"{folder / name}: there is no such image"
    except (OSError, ValueError) as error:
      yield str(error).rstrip(".")
    else:
      yield from (
        f"{folder / name} is displayed as {width} x {height}, but the annotation file says "
        f"{' x '.join(map(str, one))} (width x height)"
        for one in said
        if one != (width, height)
      )


def _object_faults(chunk: Sequence[tuple[Pair, int, Object]]) -> Iterator[str]:
  """Of objects and their numbers in their pairs."""
  sizes = [(pair.height, pair.width) for pair, _, _ in chunk]
  pixels, faults = areas([one.rle for *_, one in chunk], sizes)
  for (pair, i, one), area, fault in zip(chunk, pixels.tolist(), faults, strict=True):
    x, y, w, h = one.box
    found: list[str] = []
    if w <= 0 or h <= 0:
      found.append("has no area")
    elif min(x, y) < -SLACK or x + w > pair.width + SLACK or y + h > pair.height + SLACK:
      found.append(f"leaves the {pair.width} x {pair.height} image")
    if found:
      shown = ", ".join(f"{value:g}" for value in one.box)
      found = [f"its box {shown} (x, y, width, height) {found[0]}"]
    if fault or not area:
      found.append(fault or "its mask is empty")
    yield from (f"{pair.file_name}, {pair.phrase!r}, object {i}: {words}" for words in found)


def _phrase_faults(phrases: Iterable[str], tokenizer: "Tokenizer | None") -> Iterator[str]:
  for phrase in phrases:
    if fault := phrase_fault(phrase) if tokenizer is None else tokenizer.fault(phrase):
      yield fault
