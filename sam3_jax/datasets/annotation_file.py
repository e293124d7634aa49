"""Reads the entries of an annotation file and validates their fields, ids and references.

Reads both layouts described in `annotations.py`. All invalid fields are collected as faults;
skipped and unexpected entries go to the notes. Integers may be written as 1.0, as pandas does, but
not as strings, since "0" would be true in Python.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sam3_jax.datasets.annotation_fields import (
  are_fractions,
  flag_field,
  id_set_field,
  integer_field,
  load,
)
from sam3_jax.datasets.annotation_schema import AnnotationEntry, ImageEntry
from sam3_jax.inputs.prompts import BOXES_ALONE
from sam3_jax.inputs.tokenizer import clean
from sam3_jax.outputs.rle import MAX_PIXELS
from sam3_jax.utils.json_text import shown
from sam3_jax.utils.notes import Notes

CHUNK = 1024  # annotations processed at a time
BACKGROUND = ("background", "bg", "__background__", "_background_")


class AnnotationFile:
  """An annotation file. Images and categories are read at once, annotations by `chunks`.

  Attributes:
    coco: whether the layout is COCO's, not SA-Co's.
    images: in the order of the file; with COCO's layout, each file name once.
    phrases: with COCO's layout, the category ids of each phrase.
    never_absent: phrases that are not used as negatives.
    fractions: whether boxes are fractions of width and height, as in SA-Co's files.
    faults: the faults found so far.
    notes: the notes so far.
  """

  def __init__(self, path: Path, notes: Notes):
    """Raises FileNotFoundError or ValueError if there is no annotation file at `path`."""
    content = load(path)
    self.coco = not any("text_input" in entry for entry in content["images"])
    self.faults: list[str] = []
    self.notes = notes
    self.phrases: dict[str, tuple[int, ...]] = {}
    self.never_absent: set[str] = set()
    self._names: dict[int, str] = {}  # phrase by category id; "" for a category without phrase
    self._by_id: dict[int, ImageEntry] = {}
    self.images = self._read_images(content["images"])
    if self.coco:
      self._read_categories(content.get("categories"))
      self._check_lists()
    self._annotations: list[Any] = content["annotations"]
    self.fractions = not self.coco and are_fractions(self._annotations)

  def chunks(self) -> Iterator[list[AnnotationEntry]]:
    """Yields the annotations with valid fields, `CHUNK` at a time; can be called once."""
    seen: set[Any] = set()
    for start in range(0, len(self._annotations), CHUNK):
      chunk = []
      for i in range(start, min(start + CHUNK, len(self._annotations))):
        values, self._annotations[i] = self._annotations[i], None  # frees its memory
        try:
          if (one := self._instance(values, i, seen)) is not None:
            chunk.append(one)
        except ValueError as error:
          self.faults.append(str(error))
      yield chunk

  def _read_images(self, entries: Sequence[dict[str, Any]]) -> list[ImageEntry]:
    images: list[ImageEntry] = []
    by_name: dict[str, ImageEntry] = {}
    for entry in entries:
      try:
        image = _image(entry, self.coco)
        if image.id in self._by_id:
          raise ValueError(_duplicate("image", image.id))
        known = by_name.setdefault(image.file_name, image) if self.coco else image
        if known is not image:
          self._join(known, image)
        else:
          images.append(image)
        self._by_id[image.id] = known
      except ValueError as error:
        self.faults.append(str(error))
    return images

  def _join(self, known: ImageEntry, image: ImageEntry) -> None:
    """Merges the entry of an image that is listed again, as in merged exports."""
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
    """Reads the phrases: names of categories, with underscores (as in LVIS) replaced by spaces.

    Names that are equal for the tokenizer become one phrase, the first of them.
    """
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
      what = "categories that are a background or above other categories, never used as negatives"
      self.notes.add(what, f"{phrase!r:.60}")
    if not self._names:
      self.faults.append("it has neither text_input in its images (SA-Co) nor categories (COCO)")

  def _category(self, entry: Any) -> tuple[int, str]:
    name = entry.get("name") if isinstance(entry, dict) else None
    if not isinstance(name, str) or "id" not in entry:
      raise ValueError(f"category {shown(entry, 60)}: it must have an id and a name")
    number = integer_field(entry, "id", f"category {name!r:.40}")
    if number in self._names:
      raise ValueError(_duplicate("category", number))
    return number, name

  def _check_lists(self) -> None:
    """Checks that LVIS's lists of categories do not contradict each other or the categories."""
    for image in self.images:
      both = image.unfinished & (image.negative or set())
      if both:
        self.faults.append(
          f"image {image.id}: category {min(both)} is in neg_category_ids and in "
          "not_exhaustive_category_ids"
        )
      unknown = (image.unfinished | (image.negative or set())) - self._names.keys()
      what = "ids in neg_category_ids and not_exhaustive_category_ids that are not categories"
      self.notes.add(what, f"image {image.id}", len(unknown))

  def _instance(self, values: dict[str, Any], index: int, seen: set[Any]) -> AnnotationEntry | None:
    name = f"annotation {shown(values.get('id', f'number {index + 1}'), 40)}"
    if "id" not in values:
      name = f"annotation number {index + 1}"
    elif (key := _key(values["id"])) in seen:
      raise ValueError(f"{name}: this id occurs twice")
    else:
      seen.add(key)
    number = integer_field(values, "image_id", name)
    image = self._by_id.get(number)
    if image is None:
      raise ValueError(f"{name}: there is no image {number}")
    phrase = image.phrase
    if self.coco:
      category = integer_field(values, "category_id", name)
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
    crowd = flag_field(values, "iscrowd", name, False)
    scored = type(values.get("score")) in (int, float)
    box = values.get("bbox")
    return AnnotationEntry(
      name, image, number, phrase, crowd, scored, box, values.get("segmentation")
    )


def _image(entry: dict[str, Any], coco: bool) -> ImageEntry:
  number = integer_field(entry, "id", f"image {shown(entry.get('id'), 40)}")
  what = f"image {number}"
  name = entry.get("file_name")
  if not isinstance(name, str):
    raise ValueError(f"{what}: file_name must be a string; got {shown(name, 40)}")
  width, height = integer_field(entry, "width", what), integer_field(entry, "height", what)
  if min(width, height) < 1:
    raise ValueError(f"{what}: width and height must be at least 1; got {width} x {height}")
  if width * height > MAX_PIXELS:
    raise ValueError(
      f"{what}: width and height are {shown(width, 40)} x {shown(height, 40)}, more than "
      f"{MAX_PIXELS:,} pixels"
    )
  if coco:
    image = ImageEntry(number, name, width, height)
    image.unfinished = id_set_field(entry, "not_exhaustive_category_ids", what)
    if "neg_category_ids" in entry:
      image.negative = id_set_field(entry, "neg_category_ids", what)
    return image
  phrase = entry.get("text_input")
  if not isinstance(phrase, str):
    raise ValueError(f"{what}: text_input must be a string; got {shown(phrase, 40)}")
  exhaustive = flag_field(entry, "is_instance_exhaustive", what, True)
  return ImageEntry(number, name, width, height, phrase, exhaustive)


def _key(number: Any) -> Any:
  """A hashable key for an annotation id of any type."""
  return number if type(number) in (int, float, str) else shown(number)


def _duplicate(kind: str, number: Any) -> str:

  return f"{kind} {shown(number, 40)}: this id occurs twice"
