"""Annotation files: pairs of a picture and a phrase, with the objects that match, and their faults.

Two layouts are read, told apart by `text_input`:

- SA-Co's (Meta, `sam3/eval/cgf1_eval.py`): an entry of `images` is a pair of a picture and a
  phrase; a pair without annotations is a negative.
- COCO's instances (https://cocodataset.org/#format-data): the phrases are the names of the
  categories; some that a picture lacks become its negatives, drawn at random but always the same.

`check` looks for what would spoil training or figures; all faults come in one report.
"""

import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sam3_jax.preprocess import displayed_size
from sam3_jax.rle import Box, Rle, bounds, compress, finite, runs
from sam3_jax.trees import raise_faults

if TYPE_CHECKING:
  from sam3_jax.tokenizer import Tokenizer

SLACK = 1.0  # pixels by which a box may reach beyond the picture: annotators round
REMEDY = "Correct the annotation file, or name the right one."


@dataclasses.dataclass(frozen=True)
class Object:
  """One thing in a picture.

  Attributes:
    rle: its mask, in COCO's compressed run lengths.
    box: x, y, width, height in pixels of the picture.
    crowd: the mask covers several things that were not told apart.
  """

  rle: Rle
  box: Box
  crowd: bool = False


@dataclasses.dataclass(frozen=True)
class Pair:
  """A picture, a phrase, and all objects in the picture that match it (none: a negative).

  Attributes:
    id: of SA-Co's entry in `images`; with COCO's layout, its place in the list.
    file_name: of the picture, below the folder of pictures.
    width, height: of the picture, in pixels.
    exhaustive: every object that matches is annotated.
    image_id, category_ids: with COCO's layout, the picture's id in the file and those of the
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


def read(path: str | Path, *, negatives: int | None = None, seed: int = 0) -> list[Pair]:
  """The pairs of an annotation file, in its order.

  Args:
    path: a JSON file in either layout.
    negatives: with COCO's layout, phrases a picture that are absent from it; None for as many as
      are present, and at least one. SA-Co's layout has its own.
    seed: of their choice, which depends on nothing but this and the picture's place in the file.

  Returns:
    With COCO's layout, a picture's pairs follow each other, present phrases first.

  Raises:
    FileNotFoundError: no such file.
    ValueError: it is no such file, or its entries contradict each other; all faults are named.
  """
  pairs, faults = _read(Path(path), negatives, seed)
  raise_faults(faults, str(path), REMEDY)
  return pairs


def read_checked(
  path: str | Path,
  images: str | Path,
  tokenizer: "Tokenizer | None" = None,
  *,
  negatives: int | None = None,
  seed: int = 0,
) -> list[Pair]:
  """`read` and `check`, with one report for the faults of both.

  Raises:
    FileNotFoundError: no such annotation file.
    ValueError: of any fault, in one line that names the first twenty and counts them all.
  """
  pairs, faults = _read(Path(path), negatives, seed)
  faults += check(pairs, images, tokenizer)
  raise_faults(list(dict.fromkeys(faults)), str(path), REMEDY)
  return pairs


def check(
  pairs: Sequence[Pair], images: str | Path | None, tokenizer: "Tokenizer | None" = None
) -> list[str]:
  """All faults of all pairs, a line each; an empty list if there are none.

  Found are: ids that occur twice; pictures that are missing, unreadable, or of another size than
  the file says; boxes without area or more than a pixel outside the picture; masks that are empty,
  damaged, or not of the picture's size; phrases that are empty or of too many tokens.

  Args:
    images: the folder of pictures; None leaves them unopened.
    tokenizer: counts the tokens; None leaves that out.
  """
  faults = []
  ids: set[int] = set()
  for pair in pairs:
    if pair.id in ids:
      faults.append(_twice("image", pair.id))
    ids.add(pair.id)
  if images is not None:
    sizes: dict[str, dict[tuple[int, int], None]] = defaultdict(dict)
    for pair in pairs:
      sizes[pair.file_name][pair.width, pair.height] = None
    faults += _picture_faults(Path(images), sizes)
  for pair in pairs:
    where = f"{pair.file_name}, {pair.phrase!r}"
    for i, one in enumerate(pair.objects, start=1):
      faults += [f"{where}, object {i}: {fault}" for fault in _object_faults(one, pair)]
  faults += _phrase_faults(dict.fromkeys(pair.phrase for pair in pairs), tokenizer)
  return faults


def are_fractions(entries: Iterable[dict[str, Any]]) -> bool:
  """SA-Co's boxes are fractions of width and height, COCO's are pixels: one rule for a file.

  Args:
    entries: annotations or results, as they stand in a file.

  Returns:
    Whether there are boxes, and no value of theirs exceeds 1.
  """
  boxes = [one["bbox"] for one in entries if isinstance(one.get("bbox"), list)]
  values = [value for box in boxes for value in box if finite([value])]
  return bool(values) and max(values) <= 1


def mask_and_box(
  entry: dict[str, Any], width: int, height: int, *, fractions: bool
) -> tuple[Rle, Box]:
  """Mask and box of an annotation or a result, as it stands in a file.

  Args:
    entry: its `segmentation` is in any form; its `bbox` may be left out, and is the mask's then.
    width, height: of the picture, in pixels.
    fractions: the box is in fractions of them; see `are_fractions`.

  Raises:
    ValueError: there is no mask, or the box is none, or is left out and the mask is damaged.
  """
  rle = compress(entry.get("segmentation"), height, width)
  box = entry.get("bbox")
  if box is None:
    return rle, bounds(rle)
  if not isinstance(box, list) or len(box) != 4 or not finite(box):
    raise ValueError(f"its bbox must be [x, y, width, height]; got {box!r:.60}")
  x, y, w, h = (float(value) for value in box)
  return rle, (x * width, y * height, w * width, h * height) if fractions else (x, y, w, h)


def _read(path: Path, negatives: int | None, seed: int) -> tuple[list[Pair], list[str]]:
  if negatives is not None and negatives < 0:
    raise ValueError(f"negatives must be None or at least 0 phrases a picture; got {negatives}.")
  content = _load(path)
  faults: list[str] = []
  entries = {}
  phrases = any("text_input" in entry for entry in content["images"])
  for entry in content["images"]:
    try:
      _check_image(entry)
      if not phrases:
        _check_looked_for(entry)
      if entry["id"] in entries:
        raise ValueError(_twice("image", entry["id"]))
      entries[entry["id"]] = entry
    except ValueError as error:
      faults.append(str(error))
  names = {} if phrases else _categories(content, faults)
  objects = _objects(content, entries, None if phrases else names, faults)
  if phrases:
    return list(_pairs(entries.values(), objects, faults)), faults
  return list(_coco_pairs(list(entries.values()), names, objects, negatives, seed)), faults


_LISTS = ("images", "annotations")
_LOOKED_FOR = ("neg_category_ids", "not_exhaustive_category_ids")  # LVIS's, of an image


def _load(path: Path) -> dict[str, Any]:
  remedy = "give COCO's instances or SA-Co's annotations: an object with `images`, `annotations`."
  if not path.is_file():
    raise FileNotFoundError(f"there is no annotation file {path}: check the path.")
  try:
    content = json.loads(path.read_bytes())
  except ValueError as error:
    raise ValueError(f"{path} is not JSON ({error}); {remedy}") from error
  lists = [content.get(key) if isinstance(content, dict) else None for key in _LISTS]
  if not all(isinstance(one, list) and all(isinstance(e, dict) for e in one) for one in lists):
    raise ValueError(f"{path} is no annotation file; {remedy}")
  return content


def _check_image(entry: dict[str, Any]) -> None:
  types = {"id": int, "file_name": str, "width": int, "height": int}
  for key, expected in types.items():
    if type(entry.get(key)) is not expected:
      raise ValueError(
        f"image {entry.get('id')!r}: {key} must be of type {expected.__name__}; "
        f"got {entry.get(key)!r:.40}"
      )
  if min(entry["width"], entry["height"]) < 1:
    raise ValueError(
      f"image {entry['id']}: width and height must be at least 1; "
      f"got {entry['width']} x {entry['height']}"
    )


def _check_looked_for(entry: dict[str, Any]) -> None:
  for key in _LOOKED_FOR:
    value = entry.get(key, [])
    if not isinstance(value, list) or any(type(one) is not int for one in value):
      raise ValueError(
        f"image {entry['id']}: {key} must be a list of category ids, or be left out; "
        f"got {value!r:.40}"
      )


def _categories(content: dict[str, Any], faults: list[str]) -> dict[Any, str]:
  """Phrases by category id: the names, with spaces for the underscores of LVIS and others."""
  names: dict[Any, str] = {}
  found = content.get("categories") or []
  if not isinstance(found, list):
    faults.append(f"categories must be a list of objects with an id and a name; got {found!r:.40}")
    return names
  for entry in found:
    name = entry.get("name") if isinstance(entry, dict) else None
    if not isinstance(name, str) or type(entry.get("id")) is not int:
      faults.append(f"category {entry!r:.60}: it must have an id and a name")
    elif entry["id"] in names:
      faults.append(_twice("category", entry["id"]))
    else:
      names[entry["id"]] = " ".join(name.replace("_", " ").split())
  if not names:
    faults.append("it has neither text_input in its images (SA-Co) nor categories (COCO)")
  return names


def _objects(
  content: dict[str, Any],
  entries: dict[Any, dict[str, Any]],
  names: dict[Any, str] | None,
  faults: list[str],
) -> dict[tuple[Any, str | None], list[Object]]:
  """Objects by image and phrase; by image and None where the image is a pair already."""
  fractions = names is None and are_fractions(content["annotations"])
  objects = defaultdict(list)
  ids = set()
  for i, annotation in enumerate(content["annotations"]):
    number = annotation.get("id", f"number {i + 1}")
    image = annotation.get("image_id")
    try:
      if "id" in annotation and str(number) in ids:
        raise ValueError(_twice("annotation", number))
      ids.add(str(number))
      if type(image) is not int or image not in entries:
        raise ValueError(f"annotation {number}: there is no image {image!r:.40}")
      category = annotation.get("category_id")
      if names is not None and (type(category) is not int or category not in names):
        raise ValueError(f"annotation {number}: there is no category {category!r:.40}")
      try:
        one = _object(annotation, entries[image], fractions)
      except ValueError as error:
        raise ValueError(f"annotation {number}: {error}") from error
      objects[image, names[category] if names is not None else None].append(one)
    except ValueError as error:
      faults.append(str(error))
  return objects


def _object(annotation: dict[str, Any], entry: dict[str, Any], fractions: bool) -> Object:
  rle, box = mask_and_box(annotation, entry["width"], entry["height"], fractions=fractions)
  return Object(rle=rle, box=box, crowd=bool(annotation.get("iscrowd", 0)))


def _pairs(entries: Iterable[dict[str, Any]], objects, faults: list[str]) -> Iterator[Pair]:
  for entry in entries:
    phrase = entry.get("text_input")
    if not isinstance(phrase, str):
      faults.append(f"image {entry['id']}: text_input must be a string; got {phrase!r:.40}")
      continue
    exhaustive = bool(entry.get("is_instance_exhaustive", 1))
    yield _pair(entry["id"], entry, phrase, objects.get((entry["id"], None), ()), exhaustive)


def _coco_pairs(
  entries: list[dict[str, Any]],
  names: dict[Any, str],
  objects: dict[tuple[Any, str | None], list[Object]],
  negatives: int | None,
  seed: int,
) -> Iterator[Pair]:
  phrases: dict[str, tuple[int, ...]] = {}  # categories of one name are one phrase
  for category, name in names.items():
    phrases[name] = (*phrases.get(name, ()), category)
  count = 0
  for index, entry in enumerate(entries):
    # LVIS says which categories were looked for in a picture, and which not to the end.
    unfinished = {names.get(c) for c in entry.get("not_exhaustive_category_ids", ())}
    looked_for = {names.get(c) for c in entry.get("neg_category_ids", names)}
    present = [phrase for phrase in phrases if (entry["id"], phrase) in objects]
    absent = [phrase for phrase in phrases if phrase in looked_for and phrase not in present]
    wanted = max(1, len(present)) if negatives is None else negatives
    order = np.random.default_rng((seed, index)).permutation(len(absent))[:wanted]
    for phrase in present + [absent[i] for i in sorted(order)]:
      found = objects.get((entry["id"], phrase), ())
      pair = _pair(count, entry, phrase, found, phrase not in unfinished)
      yield dataclasses.replace(pair, image_id=entry["id"], category_ids=phrases[phrase])
      count += 1


def _pair(
  number: int, entry: dict[str, Any], phrase: str, objects: Iterable[Object], exhaustive: bool
) -> Pair:
  return Pair(
    id=number,
    file_name=entry["file_name"],
    width=entry["width"],
    height=entry["height"],
    phrase=phrase,
    exhaustive=exhaustive,
    objects=tuple(objects),
  )


def _twice(kind: str, number: Any) -> str:
  return f"{kind} {number}: this id occurs twice"


def _picture_faults(folder: Path, sizes: Mapping[str, Iterable[tuple[int, int]]]) -> Iterator[str]:
  """Of pictures and the sizes that the pairs say they have; each picture is opened once."""
  for name, said in sizes.items():
    try:
      height, width = displayed_size(folder / name)
    except FileNotFoundError:
      yield f"{folder / name}: there is no such picture"
    except (OSError, ValueError) as error:
      yield str(error).rstrip(".")
    else:
      yield from (
        f"{folder / name} is displayed as {width} x {height}, but the annotation file says "
        f"{' x '.join(map(str, one))} (width x height)"
        for one in said
        if one != (width, height)
      )


def _object_faults(one: Object, pair: Pair) -> Iterator[str]:
  x, y, w, h = one.box
  shown = ", ".join(f"{value:g}" for value in one.box)
  if w <= 0 or h <= 0:
    yield f"its box {shown} (x, y, width, height) has no area"
  elif min(x, y) < -SLACK or x + w > pair.width + SLACK or y + h > pair.height + SLACK:
    yield f"its box {shown} (x, y, width, height) leaves the {pair.width} x {pair.height} picture"
  try:
    if not runs(one.rle, (pair.height, pair.width))[1::2].any():
      yield "its mask is empty"
  except ValueError as error:
    yield str(error)


def _phrase_faults(phrases: Iterable[str], tokenizer: "Tokenizer | None") -> Iterator[str]:
  from sam3_jax.tokenizer import phrase_fault

  for phrase in phrases:
    if fault := phrase_fault(phrase) if tokenizer is None else tokenizer.fault(phrase):
      yield fault
