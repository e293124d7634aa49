"""Predictions: what a model found for a pair, and COCO's results layout on disk.

The layout (https://cocodataset.org/#format-results) is one list of {"image_id", "category_id",
"score", "bbox", "segmentation"}. If the data are in COCO's layout, `image_id` and `category_id` are
those of its picture and its category; if in SA-Co's, `image_id` is a pair of picture and phrase.
"""

import dataclasses
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from sam3_jax.annotations import Pair, are_fractions, mask_and_box
from sam3_jax.rle import Box, Rle, runs

AGAIN = (
  'give COCO\'s results: a list of {"image_id", "category_id", "score", "segmentation", "bbox"}.'
)
DATA = "give the --data that the predictions were made for."


@dataclasses.dataclass(frozen=True)
class Prediction:
  """One object found.

  Attributes:
    score: in [0, 1].
    box: x, y, width, height in pixels of the picture.
    rle: its mask over the picture, COCO's compressed run lengths.
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


def read(path: str | Path, pairs: Sequence[Pair]) -> tuple[dict[int, list[Prediction]], int]:
  """Reads a file in COCO's results layout and checks it against the pairs.

  Masks are run lengths, compressed or not; a missing box is the mask's. Boxes are in pixels; with
  SA-Co's pairs all of them may be fractions of width and height, as in SA-Co's files: that is
  decided by whether any value exceeds 1.

  With COCO's pairs, predictions of categories that no pair asks of their picture are left out: not
  all absent categories of a picture become pairs.

  Returns:
    Predictions by pair, and the number of those left out.

  Raises:
    FileNotFoundError: no such file.
    ValueError: another layout, a picture or pair that is unknown, a mask of another size than its
      picture, or nothing but predictions to be left out.
  """
  path = Path(path)
  rows = _load(path)
  known = {name: pair for pair in pairs for name in _names(pair)}
  pictures = {pair.image_id for pair in pairs if pair.image_id is not None}
  fractions = not pictures and are_fractions(rows)
  found: dict[int, list[Prediction]] = {}
  left_out = 0
  for i, row in enumerate(rows):
    try:
      pair = _pair_of(row, known, pictures)
    except ValueError as error:
      raise ValueError(f"{path}: prediction {i} has {error}") from error
    if pair is None:
      left_out += 1
      continue
    try:
      found.setdefault(pair.id, []).append(_prediction(row, pair, fractions))
    except ValueError as error:
      raise ValueError(f"{path}: prediction {i} of pair {pair.id}: {error}; {AGAIN}") from error
  if left_out and not found:
    raise ValueError(
      f"{path}: none of its {left_out} predictions is of a category that the data ask of its "
      f"picture; {DATA}"
    )
  return found, left_out


_Name = tuple[int, int | None]  # image_id and category_id; SA-Co's pairs go by image_id alone


def _names(pair: Pair) -> list[_Name]:
  """What a row of results may call a pair; the first is what we write."""
  if pair.image_id is None:
    return [(pair.id, None)]
  return [(pair.image_id, category) for category in pair.category_ids]


def _pair_of(
  row: dict[str, Any], known: Mapping[_Name, Pair], pictures: Collection[int]
) -> Pair | None:
  """The pair that a row is about; None if nobody asks for its category."""
  image, category = row.get("image_id"), row.get("category_id")
  if pictures:
    if type(image) is not int or image not in pictures:
      raise ValueError(f"image_id {image!r:.40}, which is no picture of the data; {DATA}")
    if type(category) is not int:
      raise ValueError(f"category_id {category!r:.40}, which is no category of the data; {DATA}")
    return known.get((image, category))
  if type(image) is not int or (image, None) not in known:
    raise ValueError(f"image_id {image!r:.40}, which is no pair of the data; {DATA}")
  return known[image, None]


def _load(path: Path) -> list[dict[str, Any]]:
  if not path.is_file():
    raise FileNotFoundError(f"there is no file of predictions {path}: check the path.")
  try:
    rows = json.loads(path.read_bytes())
  except ValueError as error:
    raise ValueError(f"{path} is not JSON ({error}); {AGAIN}") from error
  if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
    raise ValueError(f"{path} does not hold predictions; {AGAIN}")
  return rows


def _prediction(row: dict[str, Any], pair: Pair, fractions: bool) -> Prediction:
  score: Any = row.get("score")
  if type(score) not in (int, float) or not 0 <= score <= 1:
    raise ValueError(f"its score is {score!r:.40}, but scores are in [0, 1]")
  if not isinstance(row.get("segmentation"), dict):
    raise ValueError("it has no run lengths for a mask")
  rle, box = mask_and_box(row, pair.width, pair.height, fractions=fractions)
  runs(rle, (pair.height, pair.width))
  return Prediction(float(score), box, rle)
