"""Predictions: what a model found for a pair, and the files that hold them.

Two layouts are read. COCO's results (https://cocodataset.org/#format-results) are one list of
{"image_id", "category_id", "score", "bbox", "segmentation"}. If the data are in COCO's layout,
`image_id` and `category_id` are those of its image and its category; if in SA-Co's, `image_id` is
a pair of image and phrase. And a data set with scores, as `sam3-jax batch --merge` writes it: its
ids are its own, so images go by their file names and categories by their names.
"""

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sam3_jax.datasets.agreement import agree
from sam3_jax.datasets.annotation_fields import are_fractions, integer_field, pack_polygons
from sam3_jax.datasets.annotation_file import CHUNK
from sam3_jax.datasets.annotations import Pair
from sam3_jax.inputs.prompts import BOXES_ALONE
from sam3_jax.inputs.tokenizer import clean
from sam3_jax.outputs.rle import Box, Rle
from sam3_jax.outputs.segmentations import compress_all
from sam3_jax.utils.json_text import parse, shown
from sam3_jax.utils.notes import Notes
from sam3_jax.utils.validation import are_finite

AGAIN = (
  'give COCO\'s results: a list of {"image_id", "category_id", "score", "segmentation", "bbox"}, '
  "or the annotations.json of `sam3-jax batch --merge`."
)
DATA = "give the --data that the predictions were made for."


@dataclasses.dataclass(frozen=True)
class Prediction:
  """One object found.

  Attributes:
    score: in [0, 1].
    box: x, y, width, height in pixels of the image.
    rle: its mask over the image, COCO's compressed run lengths.
  """

  score: float
  box: Box
  rle: Rle


Found = Mapping[int, Sequence[Prediction]]  # by pair; a pair without an entry has none


def to_coco(found: Found, pairs: Sequence[Pair]) -> list[dict[str, Any]]:
  """Plain values in COCO's results layout, ready for JSON, named as the file of the pairs does."""
  by_id = {pair.id: pair for pair in pairs}
  return [_row(by_id[number], one) for number, several in found.items() for one in several]


def _row(pair: Pair, one: Prediction) -> dict[str, Any]:
  image, category = _names(pair)[0]
  return {
    "image_id": image,
    "category_id": 1 if category is None else category,
    "score": one.score,
    "bbox": list(one.box),
    "segmentation": one.rle,
  }


def read(
  path: str | Path, pairs: Sequence[Pair], notes: Notes | None = None
) -> tuple[dict[int, list[Prediction]], int]:
  """Reads a file in either layout and checks it against the pairs.

  Masks are run lengths, compressed or not; a missing box is the mask's. Boxes are in pixels; with
  SA-Co's pairs all of them may be fractions of width and height, as in SA-Co's files: that is
  decided by whether any value exceeds 1.

  Left out are predictions that no pair asks for: of categories, as not all absent categories of a
  image become pairs; and of images, in a data set with scores.

  Args:
    path: the file.
    pairs: of `annotations.read`.
    notes: counts pairs that a data set with scores says nothing about.

  Returns:
    Predictions by pair, and the number of those left out.

  Raises:
    FileNotFoundError: no such file.
    ValueError: another layout, an image or pair that is unknown, a mask of another size than its
      image, or nothing but predictions to be left out.
  """
  path = Path(path)
  content = _load(path)
  if isinstance(content, dict):
    rows, finder = content["annotations"], _ByName(content, pairs, str(path))
    fractions = not finder.coco and are_fractions(rows)
  else:
    rows, finder = content, _ById(pairs)
    fractions = not finder.images and are_fractions(rows)
  found: dict[int, list[Prediction]] = {}
  left_out, boxes = 0, _Boxes()
  for start in range(0, len(rows), CHUNK):
    asked: list[tuple[int, dict[str, Any], Pair]] = []
    for i, row in enumerate(rows[start : start + CHUNK], start=start):
      try:
        pair = finder.pair_of(row)
      except ValueError as error:
        raise ValueError(f"{path}: prediction {i} has {error}") from error
      if pair is None:
        left_out += 1
      else:
        asked.append((i, row, pair))
    for pair, prediction in _predictions(path, asked, fractions, boxes):
      found.setdefault(pair.id, []).append(prediction)
  boxes.check(str(path))
  if left_out and not found:
    raise ValueError(
      f"{path}: none of its {left_out} predictions is of a category that the data ask of its "
      f"image; {DATA}"
    )
  if notes is not None and isinstance(finder, _ByName):
    for pair in pairs:
      if not finder.knows(pair):
        what = "pairs whose image or phrase the predictions do not have, scored as if nothing was"
        notes.add(f"{what} found", f"{pair.file_name}, {pair.phrase!r:.40}")
  return found, left_out


_Name = tuple[int, int | None]  # image_id and category_id; SA-Co's pairs go by image_id alone


def _names(pair: Pair) -> list[_Name]:
  """What a row of results may call a pair; the first is what we write."""
  if pair.image_id is None:
    return [(pair.id, None)]
  return [(pair.image_id, category) for category in pair.category_ids]


class _ById:
  """Finds the pairs of COCO's results.

  Attributes:
    images: ids of COCO's images; none with SA-Co's pairs.
  """

  def __init__(self, pairs: Sequence[Pair]):
    self._known: Mapping[_Name, Pair] = {name: pair for pair in pairs for name in _names(pair)}
    ids = {pair.image_id for pair in pairs if pair.image_id is not None}
    self.images: Collection[int] = ids

  def pair_of(self, row: dict[str, Any]) -> Pair | None:
    """The pair that a row is about; None if nobody asks for its category."""
    image = _id(row, "image_id", f"which is no {'image' if self.images else 'pair'} of the data")
    if not self.images:
      if (image, None) not in self._known:
        raise ValueError(f"image_id {image}, which is no pair of the data; {DATA}")
      return self._known[image, None]
    if image not in self.images:
      raise ValueError(f"image_id {image}, which is no image of the data; {DATA}")
    return self._known.get((image, _id(row, "category_id", "which is no category of the data")))


class _ByName:
  """Finds the pairs of a data set with scores, by file name and phrase.

  Attributes:
    coco: its phrases are categories, not text_input.
  """

  def __init__(self, content: dict[str, Any], pairs: Sequence[Pair], path: str):
    images, categories = content["images"], content.get("categories") or []
    self.coco = not any("text_input" in entry for entry in images)
    self._files: dict[int, str] = {}
    self._phrases: dict[int, str] = {}  # by category, or by image
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
    self._files = _data_names(self._files, {pair.file_name for pair in pairs}, path)
    self._asked = (set(self._files.values()), set(self._phrases.values()) - {BOXES_ALONE})

  def pair_of(self, row: dict[str, Any]) -> Pair | None:
    """The pair that a row is about; None if nobody asks for it."""
    image = _id(row, "image_id", "which is no image of the file")
    if image not in self._files:
      raise ValueError(f"image_id {image}, which is no image of the file; {AGAIN}")
    phrase = image
    if self.coco:
      phrase = _id(row, "category_id", "which is no category of the file")
      if phrase not in self._phrases:
        raise ValueError(f"category_id {phrase}, which is no category of the file; {AGAIN}")
    return self._known.get((self._files[image], self._phrases[phrase]))

  def knows(self, pair: Pair) -> bool:
    """Whether the file has the image and the phrase of a pair."""
    files, phrases = self._asked
    return pair.file_name in files and clean(pair.phrase) in phrases


def _data_names(files: dict[int, str], names: Collection[str], path: str) -> dict[int, str]:
  """What the data call the images of a file: the name there, or the end of it, as a list of inputs
  may have them in any directory; as they are if the data do not have them.

  Raises:
    ValueError: two images would be the same one.
  """
  found: dict[int, str] = {}
  taken: dict[str, str] = {}
  for number, file in files.items():
    parts = Path(file).parts
    ends = (str(Path(*parts[i:])) for i in range(len(parts)))
    name = file if file in names else next((end for end in ends if end in names), file)
    if name in names and taken.setdefault(name, file) != file:
      raise ValueError(
        f"{path}: {taken[name]} and {file} may both be {name} of the data; name images alike"
      )
    found[number] = name
  return found


def _id(row: dict[str, Any], key: str, what: str) -> int:
  try:
    return integer_field(row, key, "")
  except ValueError:
    raise ValueError(f"{key} {shown(row.get(key), 40)}, {what}; {DATA}") from None


def _load(path: Path) -> Any:
  if not path.is_file():
    raise FileNotFoundError(f"there is no file of predictions {path}: check the path.")
  try:
    content = parse(path.read_bytes(), str(path), convert=pack_polygons, check_numbers=False)
  except ValueError as error:
    raise ValueError(f"{error}; {AGAIN}") from error
  lists = [content]
  if isinstance(content, dict):
    lists = [content.get("images"), content.get("annotations")]
    if not _has_scores(content):
      lists = [None]  # annotations, or nothing
  if not all(isinstance(one, list) and all(isinstance(e, dict) for e in one) for one in lists):
    raise ValueError(f"{path} does not hold predictions; {AGAIN}")
  return content


def _has_scores(content: dict[str, Any]) -> bool:
  """Whether a data set has scores, or is of a job of `sam3-jax batch` that found nothing."""
  rows, info = content.get("annotations"), content.get("info")
  if rows == []:
    return isinstance(info, dict) and str(info.get("description")).startswith("sam3-jax ")
  return isinstance(rows, list) and any(isinstance(row, dict) and "score" in row for row in rows)


class _Boxes:
  """Boxes beside their masks' bounds: a model's need not be the same, but must be of one form."""

  def __init__(self):
    self._counts = np.zeros(3, int)  # as they should be; as corners; as fractions

  @np.errstate(over="ignore", invalid="ignore")  # of boxes of any size
  def add(self, boxes: np.ndarray, bounds: np.ndarray, sizes: np.ndarray) -> None:
    """Counts boxes [n, 4]; sizes are width, height, width, height of their images."""
    corners = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
    same = agree(boxes, bounds)
    forms = [same, agree(corners, bounds) & ~same, agree(boxes * sizes, bounds) & ~same]
    self._counts += [form.sum() for form in forms]

  def check(self, path: str) -> None:
    """Raises ValueError if more boxes are of another form than of the right one."""
    same, corners, fractions = self._counts
    for count, form in ((corners, "corners x0, y0, x1, y1"), (fractions, "fractions of the image")):
      if count > same:
        raise ValueError(
          f"{path}: {count:,} boxes look like {form} beside their masks; write x, y, width, height "
          "in pixels, or leave bbox out"
        )


def _predictions(
  path: Path,
  asked: Sequence[tuple[int, dict[str, Any], Pair]],
  fractions: bool,
  boxes: _Boxes,
) -> Iterator[tuple[Pair, Prediction]]:
  """Of rows by number, and the pairs that they are about."""
  masks = compress_all(
    [row.get("segmentation") for _, row, _ in asked],
    [(pair.height, pair.width) for *_, pair in asked],
  )
  given = []
  for k, (i, row, pair) in enumerate(asked):
    score: Any = row.get("score")
    box = row.get("bbox")
    fault = ""
    if type(score) not in (int, float) or not 0 <= score <= 1:
      fault = f"its score is {shown(score, 40)}, but scores are in [0, 1]"
    elif not isinstance(row.get("segmentation"), dict):
      fault = "it has no run lengths for a mask"
    elif box is not None and (not isinstance(box, list) or len(box) != 4 or not are_finite(box)):
      fault = f"its bbox must be [x, y, width, height]; got {shown(box, 60)}"
    rle = masks.rles[k]
    if fault or rle is None:
      fault = fault or masks.faults[k]
      raise ValueError(f"{path}: prediction {i} of pair {pair.id}: {fault}; {AGAIN}")
    x, y, w, h = masks.bounds[k].tolist()
    if box is not None:
      scale = np.array([pair.width, pair.height] * 2) if fractions else 1
      x, y, w, h = (np.array(box, np.float64) * scale).tolist()
      given.append((k, (x, y, w, h), [pair.width, pair.height] * 2))
    yield pair, Prediction(float(score), (x, y, w, h), rle)
  if given:
    rows, values, sizes = map(np.array, zip(*given, strict=True))
    boxes.add(values, masks.bounds[rows], sizes)
