"""Finds the pair that a prediction in a file belongs to, by ids or by names."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from sam3_jax.datasets.annotation_fields import integer_field
from sam3_jax.datasets.annotations import Pair
from sam3_jax.inputs.prompts import BOXES_ALONE
from sam3_jax.inputs.tokenizer import clean
from sam3_jax.utils.json_text import shown

EXPECTED = (
  'give COCO\'s results: a list of {"image_id", "category_id", "score", "segmentation", "bbox"}, '
  "or the annotations.json of `sam3-jax batch --merge`."
)
SAME_DATA = "give the --data that the predictions were made for."

_Ids = tuple[int, int | None]  # image_id and category_id; None for SA-Co, which has no category


def pair_ids(pair: Pair) -> list[_Ids]:
  """The ids by which results may refer to a pair; we write the first."""
  if pair.image_id is None:
    return [(pair.id, None)]
  return [(pair.image_id, category) for category in pair.category_ids]


class LookupById:
  """Finds the pairs of COCO results.

  Attributes:
    images: ids of the images in COCO's format; empty for pairs in SA-Co's format.
  """

  def __init__(self, pairs: Sequence[Pair]):
    self._known: Mapping[_Ids, Pair] = {ids: pair for pair in pairs for ids in pair_ids(pair)}
    found = {pair.image_id for pair in pairs if pair.image_id is not None}
    self.images: Collection[int] = found

  def pair_of(self, result: dict[str, Any]) -> Pair | None:
    """The pair of a result; None if no pair has its category."""
    kind = "an image" if self.images else "a pair"
    image = _id(result, "image_id", f"which is not {kind} of the data")
    if not self.images:
      if (image, None) not in self._known:
        raise ValueError(f"image_id {image}, which is not a pair of the data; {SAME_DATA}")
      return self._known[image, None]
    if image not in self.images:
      raise ValueError(f"image_id {image}, which is not an image of the data; {SAME_DATA}")
    category = _id(result, "category_id", "which is not a category of the data")
    return self._known.get((image, category))


class LookupByName:
  """Finds the pairs of a dataset with scores, by file name and phrase.

  Attributes:
    coco: whether its phrases are categories, rather than text_input.
  """

  def __init__(self, content: dict[str, Any], pairs: Sequence[Pair], path: str):
    images, categories = content["images"], content.get("categories") or []
    self.coco = not any("text_input" in entry for entry in images)
    self._files: dict[int, str] = {}
    self._phrases: dict[int, str] = {}  # by category id, or by image id
    for entry in images:
      number, name = integer_field(entry, "id", f"{path}: an image"), entry.get("file_name")
      if not isinstance(name, str):
        raise ValueError(f"{path}: image {number}: file_name must be a string")
      self._files[number] = name
      if not self.coco:
        self._phrases[number] = clean(str(entry.get("text_input", "")))
    for entry in categories if self.coco else []:
      name = entry.get("name") if isinstance(entry, dict) else None
      if not isinstance(name, str):
        raise ValueError(f"{path}: category {shown(entry, 60)}: it must have an id and a name")
      number = integer_field(entry, "id", f"{path}: category {name!r:.40}")
      self._phrases[number] = clean(name.replace("_", " "))
    self._known = {(pair.file_name, clean(pair.phrase)): pair for pair in pairs}
    self._files = _match_names(self._files, {pair.file_name for pair in pairs}, path)
    self._contained = (set(self._files.values()), set(self._phrases.values()) - {BOXES_ALONE})

  def pair_of(self, result: dict[str, Any]) -> Pair | None:
    """The pair of a result; None if no pair has its image and phrase."""
    image = _id(result, "image_id", "which is not an image of the file")
    if image not in self._files:
      raise ValueError(f"image_id {image}, which is not an image of the file; {EXPECTED}")
    phrase = image
    if self.coco:
      phrase = _id(result, "category_id", "which is not a category of the file")
      if phrase not in self._phrases:
        raise ValueError(f"category_id {phrase}, which is not a category of the file; {EXPECTED}")
    return self._known.get((self._files[image], self._phrases[phrase]))

  def contains(self, pair: Pair) -> bool:
    """Whether the file has the image and the phrase of a pair."""
    files, phrases = self._contained
    return pair.file_name in files and clean(pair.phrase) in phrases


def _match_names(files: dict[int, str], names: Collection[str], path: str) -> dict[int, str]:
  """Replaces the file names of images by those in the data.

  A name may have more leading directories than in the data, as in lists of inputs. Names that the
  data do not have are unchanged.

  Raises:
    ValueError: two images would have the same name.
  """
  found: dict[int, str] = {}
  taken: dict[str, str] = {}
  for number, file in files.items():
    parts = Path(file).parts
    ends = (str(Path(*parts[i:])) for i in range(len(parts)))
    name = file if file in names else next((end for end in ends if end in names), file)
    if name in names and taken.setdefault(name, file) != file:
      raise ValueError(
        f"{path}: {taken[name]} and {file} may both be {name} of the data; use the names of the "
        "data"
      )
    found[number] = name
  return found


def _id(result: dict[str, Any], key: str, what: str) -> int:
  try:
    return integer_field(result, key, "")
  except ValueError:
    raise ValueError(f"{key} {shown(result.get(key), 40)}, {what}; {SAME_DATA}") from None
