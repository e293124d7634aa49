"""Predictions: what a model found for a pair, and COCO's results layout on disk.

The layout (https://cocodataset.org/#format-results) is one list of {"image_id", "category_id",
"score", "bbox", "segmentation"}; as in SA-Co's files, `image_id` is a pair of picture and phrase.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sam3_jax.annotations import Pair, are_fractions, mask_and_box
from sam3_jax.rle import Box, Rle, runs

AGAIN = 'give COCO\'s results: a list of {"image_id", "score", "segmentation", "bbox"}.'


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


def to_coco(found: Found) -> list[dict[str, Any]]:
  """Plain values in COCO's results layout, ready for JSON."""
  return [
    {
      "image_id": pair,
      "category_id": 1,
      "score": one.score,
      "bbox": list(one.box),
      "segmentation": one.rle,
    }
    for pair, predictions in found.items()
    for one in predictions
  ]


def read(path: str | Path, pairs: Sequence[Pair]) -> dict[int, list[Prediction]]:
  """Reads a file in COCO's results layout and checks it against the pairs.

  Masks are run lengths, compressed or not. Boxes are in pixels, or all of them are fractions of
  width and height, as in SA-Co's files: that is decided by whether any value exceeds 1. A missing
  box is the mask's.

  Raises:
    FileNotFoundError: no such file.
    ValueError: another layout, an unknown pair, a mask of another size than its picture.
  """
  path = Path(path)
  rows = _load(path)
  known = {pair.id: pair for pair in pairs}
  fractions = are_fractions(rows)
  found: dict[int, list[Prediction]] = {}
  for i, row in enumerate(rows):
    number = row.get("image_id")
    pair = known.get(number) if type(number) is int else None
    if pair is None:
      raise ValueError(
        f"{path}: prediction {i} has image_id {number!r:.40}, which is no pair of the data; "
        " give the --data that the predictions were made for."
      )
    try:
      found.setdefault(pair.id, []).append(_prediction(row, pair, fractions))
    except ValueError as error:
      raise ValueError(f"{path}: prediction {i} of pair {pair.id}: {error}; {AGAIN}") from error
  return found


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
