"""The entries of an annotation file, field by field: types, ids, and what they refer to.

Reads both layouts of `annotations.py`. Fields that are wrong are faults, all of which are
collected; what is left out or surprising goes to the notes. Numbers may be written as 1.0, as
pandas does, but never as strings: "0" is true in Python.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sam3_jax.inputs.prompts import BOXES_ALONE
from sam3_jax.inputs.tokenizer import clean
from sam3_jax.outputs.rle import MAX_PIXELS, Segmentation, pack
from sam3_jax.utils.json_text import parse, shown
from sam3_jax.utils.notes import Notes

CHUNK = 1024  # instances that are worked on at a time
BACKGROUND = ("background", "bg", "__background__", "_background_")
REMEDY = "give COCO's instances or SA-Co's annotations: an object with `images`, `annotations`."


@dataclasses.dataclass(slots=True)
class Image:
  """An image, or in SA-Co's layout a pair of an image and a phrase.

  Attributes:
    id: the first, where an image is listed several times.
    file_name: below the directory of images.
    width, height: in pixels.
    phrase: SA-Co's text_input; "" in COCO's layout.
    exhaustive: SA-Co's: every instance of the phrase is annotated.
    negative: LVIS's: ids of categories that were looked for and are absent; None for all others.
    unfinished: LVIS's: ids of categories of which not every instance is annotated.
  """

  id: int
  file_name: str
  width: int
  height: int
  phrase: str = ""
  exhaustive: bool = True
  negative: set[int] | None = None
  unfinished: set[int] = dataclasses.field(default_factory=set)


@dataclasses.dataclass(slots=True)
class Instance:
  """An annotation.

  Attributes:
    name: for messages, such as "annotation 7".
    image: that it is in.
    image_id: under which it was annotated; another one than the image's where that is listed twice.
    phrase: that it is an instance of.
    crowd: several objects that were not told apart.
    scored: a model found it: its box is no annotator's.
    box: as the file has it; None if it has none.
    segmentation: in any form; polygons are packed.
  """

  name: str
  image: Image
  image_id: int
  phrase: str
  crowd: bool
  scored: bool
  box: Any
  segmentation: Segmentation


class AnnotationFile:
  """An annotation file whose images and categories are read; its instances are read once, in turn.

  Attributes:
    coco: the layout is COCO's, not SA-Co's.
    images: in the file's order; with COCO's layout each file name once.
    phrases: with COCO's layout, the ids of the categories of each phrase.
    never_absent: phrases that are not asked of an image that lacks them.
    fractions: boxes are fractions of width and height, as in SA-Co's files.
    faults: those found so far.
    notes: likewise.
  """

  def __init__(self, path: Path, notes: Notes):
    """Raises FileNotFoundError or ValueError if there is no such file."""
    content = load(path)
    self.coco = not any("text_input" in entry for entry in content["images"])
    self.faults: list[str] = []
    self.notes = notes
    self.phrases: dict[str, tuple[int, ...]] = {}
    self.never_absent: set[str] = set()
    self._names: dict[int, str] = {}  # phrase by category id; "" of what has none
    self._by_id: dict[int, Image] = {}
    self.images = self._read_images(content["images"])
    if self.coco:
      self._read_categories(content.get("categories"))
      self._check_lists()
    self._annotations: list[Any] = content["annotations"]
    self.fractions = not self.coco and are_fractions(self._annotations)

  def chunks(self) -> Iterator[list[Instance]]:
    """The instances without a fault in their fields, `CHUNK` at a time; can be called once."""
    seen: set[Any] = set()
    for start in range(0, len(self._annotations), CHUNK):
      chunk = []
      for i in range(start, min(start + CHUNK, len(self._annotations))):
        values, self._annotations[i] = self._annotations[i], None  # its memory is needed again
        try:
          if (one := self._instance(values, i, seen)) is not None:
            chunk.append(one)
        except ValueError as error:
          self.faults.append(str(error))
      yield chunk

  def _read_images(self, entries: Sequence[dict[str, Any]]) -> list[Image]:
    images: list[Image] = []
    by_name: dict[str, Image] = {}
    for entry in entries:
      try:
        image = _image(entry, self.coco)
        if image.id in self._by_id:
          raise ValueError(_twice("image", image.id))
        known = by_name.setdefault(image.file_name, image) if self.coco else image
        if known is not image:
          self._join(known, image)
        else:
          images.append(image)
        self._by_id[image.id] = known
      except ValueError as error:
        self.faults.append(str(error))
    return images

  def _join(self, known: Image, image: Image) -> None:
    """An image that is listed again, as in merged exports: what is known of it is added up."""
    if (known.width, known.height) != (image.width, image.height):
      raise ValueError(
        f"image {image.id}: {image.file_name} is {image.width} x {image.height}, but as image "
        f"{known.id} it is {known.width} x {known.height}"
      )
    if known.negative is not None and image.negative is not None:
      known.negative |= image.negative
    else:
      known.negative = None
    known.unfinished |= image.unfinished
    self.notes.add("images listed again under another id, read as one", image.file_name)

  def _read_categories(self, found: Any) -> None:
    """Phrases: the names, with spaces for the underscores of LVIS and others. Names that the
    tokenizer cannot tell apart are one phrase, the first of them."""
    if found is not None and not isinstance(found, list):
      fault = f"categories must be a list of objects with an id and a name; got {shown(found, 40)}"
      self.faults.append(fault)
      return
    spellings: dict[str, str] = {}
    parents: dict[str, str] = {}
    for entry in found or []:
      try:
        number, name = self._category(entry)
      except ValueError as error:
        self.faults.append(str(error))
        continue
      phrase = " ".join(name.replace("_", " ").split())
      key = clean(phrase)
      if phrase != spellings.setdefault(key, phrase):
        self.notes.add("category names that are one phrase", f"{name!r:.60}")
      phrase = spellings[key]
      if key == BOXES_ALONE:
        self._names[number] = ""
        continue
      self._names[number] = phrase
      self.phrases[phrase] = (*self.phrases.get(phrase, ()), number)
      parents[key] = clean(str(entry.get("supercategory") or "").replace("_", " "))
      if name.strip().lower() in BACKGROUND:
        self.never_absent.add(phrase)
    above = {parent for key, parent in parents.items() if parent != key}
    self.never_absent |= {spellings[key] for key in parents if key in above}
    for phrase in sorted(self.never_absent):
      what = "categories that are a background or above other categories, never asked as absent"
      self.notes.add(what, f"{phrase!r:.60}")
    if not self._names:
      self.faults.append("it has neither text_input in its images (SA-Co) nor categories (COCO)")

  def _category(self, entry: Any) -> tuple[int, str]:
    name = entry.get("name") if isinstance(entry, dict) else None
    if not isinstance(name, str) or "id" not in entry:
      raise ValueError(f"category {shown(entry, 60)}: it must have an id and a name")
    number = whole(entry, "id", f"category {name!r:.40}")
    if number in self._names:
      raise ValueError(_twice("category", number))
    return number, name

  def _check_lists(self) -> None:
    """LVIS's lists of categories against each other and against the categories."""
    for image in self.images:
      both = image.unfinished & (image.negative or set())
      if both:
        self.faults.append(
          f"image {image.id}: category {min(both)} is in neg_category_ids and in "
          "not_exhaustive_category_ids"
        )
      unknown = (image.unfinished | (image.negative or set())) - self._names.keys()
      what = "ids in neg_category_ids and not_exhaustive_category_ids that are no categories"
      self.notes.add(what, f"image {image.id}", len(unknown))

  def _instance(self, values: dict[str, Any], index: int, seen: set[Any]) -> Instance | None:
    name = f"annotation {shown(values.get('id', f'number {index + 1}'), 40)}"
    if "id" not in values:
      name = f"annotation number {index + 1}"
    elif (key := _key(values["id"])) in seen:
      raise ValueError(f"{name}: this id occurs twice")
    else:
      seen.add(key)
    number = whole(values, "image_id", name)
    image = self._by_id.get(number)
    if image is None:
      raise ValueError(f"{name}: there is no image {number}")
    phrase = image.phrase
    if self.coco:
      category = whole(values, "category_id", name)
      if category not in self._names:
        raise ValueError(f"{name}: there is no category {category}")
      phrase = self._names[category]
      if not phrase:
        self.notes.add(f"instances of the category {BOXES_ALONE!r}, no phrase, left out", name)
        return None
      if image.negative is not None and category in image.negative:
        raise ValueError(
          f"{name}: it is of category {category}, which is in neg_category_ids of image {number}"
        )
    crowd = flag(values, "iscrowd", name, False)
    scored = type(values.get("score")) in (int, float)
    box = values.get("bbox")
    return Instance(name, image, number, phrase, crowd, scored, box, values.get("segmentation"))


def load(path: Path) -> dict[str, Any]:
  """The content of an annotation file: an object with lists of objects; polygons are packed.

  Raises:
    FileNotFoundError: no such file.
    ValueError: it is not JSON, or something else.
  """
  if not path.is_file():
    raise FileNotFoundError(f"there is no annotation file {path}: check the path.")
  try:
    content = parse(path.read_bytes(), str(path), convert=packed, check_numbers=False)
  except ValueError as error:
    raise ValueError(f"{error}; {REMEDY}") from error
  lists = [content.get(key) if isinstance(content, dict) else None for key in _LISTS]
  if not all(isinstance(one, list) and all(isinstance(e, dict) for e in one) for one in lists):
    raise ValueError(f"{path} is no annotation file; {REMEDY}")
  return content


def packed(values: dict[str, Any]) -> dict[str, Any]:
  """An object of a file with its polygons packed, for `json_text.parse`."""
  polygons = values.get("segmentation")
  if type(polygons) is list:
    values["segmentation"] = [pack(one) for one in polygons]
  return values


def whole(values: dict[str, Any], key: str, what: str) -> int:
  """A whole number, which may be written as 1.0.

  Raises:
    ValueError: it is missing, or something else; `what` names the entry.
  """
  value = values.get(key)
  if type(value) is int:
    return value
  if type(value) is float and value.is_integer() and abs(value) <= 2**53:
    return int(value)
  if isinstance(value, str):
    number = value.strip().removesuffix(".0")
    remedy = f"the number {number}" if number.isdecimal() else "a whole number"
    raise ValueError(f"{what}: {key} is the string {value!r:.40}; write {remedy}")
  raise ValueError(f"{what}: {key} must be a whole number; got {shown(value, 40)}")


def flag(values: dict[str, Any], key: str, what: str, default: bool) -> bool:
  """A flag: 0 or 1, true or false; ValueError otherwise, as the string "0" would count as true."""
  value = values.get(key, default)
  if type(value) in (bool, int, float) and value in (0, 1):
    return bool(value)
  if isinstance(value, str):
    raise ValueError(f"{what}: {key} is the string {value!r:.40}; write the number 0 or 1")
  raise ValueError(f"{what}: {key} must be 0 or 1; got {shown(value, 40)}")


def are_fractions(entries: Sequence[dict[str, Any]]) -> bool:
  """SA-Co's boxes are fractions of width and height, COCO's are pixels: one rule for a file.

  Args:
    entries: annotations or results, as they stand in a file.

  Returns:
    Whether there are boxes, and no value of theirs exceeds 1.
  """
  some = False
  for entry in entries:
    box = entry.get("bbox")
    if isinstance(box, list):
      for value in box:
        if type(value) in (int, float):
          if value > 1:
            return False
          some = True
  return some


_LISTS = ("images", "annotations")


def _image(entry: dict[str, Any], coco: bool) -> Image:
  number = whole(entry, "id", f"image {shown(entry.get('id'), 40)}")
  what = f"image {number}"
  name = entry.get("file_name")
  if not isinstance(name, str):
    raise ValueError(f"{what}: file_name must be a string; got {shown(name, 40)}")
  width, height = whole(entry, "width", what), whole(entry, "height", what)
  if min(width, height) < 1:
    raise ValueError(f"{what}: width and height must be at least 1; got {width} x {height}")
  if width * height > MAX_PIXELS:
    raise ValueError(
      f"{what}: width and height are {shown(width, 40)} x {shown(height, 40)}, more than "
      f"{MAX_PIXELS:,} pixels"
    )
  if coco:
    image = Image(number, name, width, height)
    image.unfinished = _ids(entry, "not_exhaustive_category_ids", what)
    if "neg_category_ids" in entry:
      image.negative = _ids(entry, "neg_category_ids", what)
    return image
  phrase = entry.get("text_input")
  if not isinstance(phrase, str):
    raise ValueError(f"{what}: text_input must be a string; got {shown(phrase, 40)}")
  exhaustive = flag(entry, "is_instance_exhaustive", what, True)
  return Image(number, name, width, height, phrase, exhaustive)


def _ids(entry: dict[str, Any], key: str, what: str) -> set[int]:
  value = entry.get(key, [])
  try:
    if isinstance(value, list):
      return {whole({key: one}, key, what) for one in value}
  except ValueError:
    pass
  raise ValueError(
    f"{what}: {key} must be a list of category ids, or be left out; got {shown(value, 40)}"
  )


def _key(number: Any) -> Any:
  """Tells ids of annotations apart, whatever their type."""
  return number if type(number) in (int, float, str) else shown(number)


def _twice(kind: str, number: Any) -> str:
  return f"{kind} {shown(number, 40)}: this id occurs twice"
