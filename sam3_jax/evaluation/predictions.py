"""Predictions for pairs, and files of predictions.

Two formats are read. COCO results (https://cocodataset.org/#format-results) are a list of
{"image_id", "category_id", "score", "bbox", "segmentation"}. If the data are in COCO's format, the
ids are those of its images and categories; if in SA-Co's, `image_id` is the id of a pair. The
second format is a dataset with scores, as written by `sam3-jax batch --merge`. It has its own ids,
so its images are matched by file name and its categories by name.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sam3_jax.datasets.agreement import agree
from sam3_jax.datasets.annotation_fields import are_fractions, pack_polygons
from sam3_jax.datasets.annotation_file import CHUNK
from sam3_jax.datasets.annotations import Pair
from sam3_jax.evaluation.pair_lookup import (
  EXPECTED,
  SAME_DATA,
  LookupById,
  LookupByName,
  pair_ids,
)
from sam3_jax.outputs.rle import Box, Rle
from sam3_jax.outputs.segmentations import compress_all
from sam3_jax.utils.json_text import parse, shown
from sam3_jax.utils.notes import Notes
from sam3_jax.utils.validation import are_finite


@dataclasses.dataclass(frozen=True)
class EvalPrediction:
  """A predicted object.

  Attributes:
    score: in [0, 1].
    box: x, y, width, height in pixels of the image.
    rle: the mask of the image as COCO's compressed run lengths.
  """

  score: float
  box: Box
  rle: Rle


PredictionsByPair = Mapping[int, Sequence[EvalPrediction]]  # pairs without predictions are optional


def to_coco(found: PredictionsByPair, pairs: Sequence[Pair]) -> list[dict[str, Any]]:
  """COCO results as plain values, with the ids of the annotation file of the pairs."""
  by_id = {pair.id: pair for pair in pairs}
  return [_result(by_id[number], one) for number, several in found.items() for one in several]


def _result(pair: Pair, prediction: EvalPrediction) -> dict[str, Any]:
  image, category = pair_ids(pair)[0]
  return {
    "image_id": image,
    "category_id": 1 if category is None else category,
    "score": prediction.score,
    "bbox": list(prediction.box),
    "segmentation": prediction.rle,
  }


def read(
  path: str | Path, pairs: Sequence[Pair], notes: Notes | None = None
) -> tuple[dict[int, list[EvalPrediction]], int]:
  """Reads a file in either format and checks it against the pairs.

  Masks are run lengths, compressed or not; a missing box is the box of the mask. Boxes are in
  pixels. With SA-Co's pairs all boxes may be fractions of width and height, as in SA-Co's files;
  they are if no value exceeds 1.

  Predictions without a pair are left out: those whose category has no pair for their image, and,
  in a dataset with scores, those of other images.

  Args:
    path: the file.
    pairs: from `annotations.read`.
    notes: counts pairs that a dataset with scores does not have.

  Returns:
    Predictions by pair id, and the number of predictions that are left out.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: the format is another, an image or pair is unknown, a mask does not have the size of
      its image, or all predictions would be left out.
  """
  path = Path(path)
  content = _load(path)
  if isinstance(content, dict):
    results, lookup = content["annotations"], LookupByName(content, pairs, str(path))
    fractions = not lookup.coco and are_fractions(results)
  else:
    results, lookup = content, LookupById(pairs)
    fractions = not lookup.images and are_fractions(results)
  found: dict[int, list[EvalPrediction]] = {}
  left_out, boxes = 0, _BoxFormats()
  for start in range(0, len(results), CHUNK):
    chunk: list[tuple[int, dict[str, Any], Pair]] = []
    for i, result in enumerate(results[start : start + CHUNK], start=start):
      try:
        pair = lookup.pair_of(result)
      except ValueError as error:
        raise ValueError(f"{path}: prediction {i} has {error}") from error
      if pair is None:
        left_out += 1
      else:
        chunk.append((i, result, pair))
    for pair, prediction in _predictions(path, chunk, fractions, boxes):
      found.setdefault(pair.id, []).append(prediction)
  boxes.check(str(path))
  _check_any(path, found, left_out)
  if notes is not None and isinstance(lookup, LookupByName):
    _note_missing(pairs, lookup, notes)
  return found, left_out


def _check_any(path: Path, found: dict[int, list[EvalPrediction]], left_out: int) -> None:
  if left_out and not found:
    raise ValueError(
      f"{path}: none of its {left_out} predictions is of a category that the data have for its "
      f"image; {SAME_DATA}"
    )


def _note_missing(pairs: Sequence[Pair], lookup: LookupByName, notes: Notes) -> None:
  """Counts pairs that a dataset with scores does not have."""
  what = "pairs whose image or phrase is not in the predictions, scored as having none"
  for pair in pairs:
    if not lookup.contains(pair):
      notes.add(what, f"{pair.file_name}, {pair.phrase!r:.40}")


def _load(path: Path) -> Any:
  if not path.is_file():
    raise FileNotFoundError(f"there is no file of predictions {path}: check the path.")
  try:
    content = parse(path.read_bytes(), str(path), convert=pack_polygons, check_numbers=False)
  except ValueError as error:
    raise ValueError(f"{error}; {EXPECTED}") from error
  lists = [content]
  if isinstance(content, dict):
    lists = [content.get("images"), content.get("annotations")]
    if not _has_scores(content):
      lists = [None]  # a dataset without scores is not accepted
  if not all(isinstance(one, list) and all(isinstance(e, dict) for e in one) for one in lists):
    raise ValueError(f"{path} does not hold predictions; {EXPECTED}")
  return content


def _has_scores(content: dict[str, Any]) -> bool:
  """Whether a dataset has scores, or is from a job of `sam3-jax batch` without instances."""
  entries, info = content.get("annotations"), content.get("info")
  if entries == []:
    return isinstance(info, dict) and str(info.get("description")).startswith("sam3-jax ")
  return isinstance(entries, list) and any(
    isinstance(entry, dict) and "score" in entry for entry in entries
  )


class _BoxFormats:
  """Compares boxes with those of their masks. They may differ, but must have the same format."""

  def __init__(self):
    self._counts = np.zeros(3, int)  # x, y, width, height in pixels; corners; fractions

  @np.errstate(over="ignore", invalid="ignore")  # boxes may have any values
  def add(self, boxes: np.ndarray, bounds: np.ndarray, sizes: np.ndarray) -> None:
    """Counts boxes [n, 4]; sizes are width, height, width, height of their images."""
    corners = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
    same = agree(boxes, bounds)
    formats = [same, agree(corners, bounds) & ~same, agree(boxes * sizes, bounds) & ~same]
    self._counts += [matches.sum() for matches in formats]

  def check(self, path: str) -> None:
    """Raises ValueError if more boxes have another format than the right one."""
    same, corners, fractions = self._counts
    formats = ((corners, "corners x0, y0, x1, y1"), (fractions, "fractions of the image"))
    for count, name in formats:
      if count > same:
        raise ValueError(
          f"{path}: {count:,} boxes look like {name} compared with their masks; write x, y, width, "
          "height in pixels, or leave bbox out"
        )


def _predictions(
  path: Path,
  chunk: Sequence[tuple[int, dict[str, Any], Pair]],
  fractions: bool,
  boxes: _BoxFormats,
) -> Iterator[tuple[Pair, EvalPrediction]]:
  """The predictions of results, given as index, result and pair."""
  masks = compress_all(
    [result.get("segmentation") for _, result, _ in chunk],
    [(pair.height, pair.width) for *_, pair in chunk],
  )
  given = []
  for k, (i, result, pair) in enumerate(chunk):
    fault, rle = _fault(result), masks.rles[k]
    if fault or rle is None:
      fault = fault or masks.faults[k]
      raise ValueError(f"{path}: prediction {i} of pair {pair.id}: {fault}; {EXPECTED}")
    x, y, w, h = masks.bounds[k].tolist()
    if (box := result.get("bbox")) is not None:
      scale = np.array([pair.width, pair.height] * 2) if fractions else 1
      x, y, w, h = (np.array(box, np.float64) * scale).tolist()
      given.append((k, (x, y, w, h), [pair.width, pair.height] * 2))
    yield pair, EvalPrediction(float(result["score"]), (x, y, w, h), rle)
  if given:
    indices, values, sizes = map(np.array, zip(*given, strict=True))
    boxes.add(values, masks.bounds[indices], sizes)


def _fault(result: dict[str, Any]) -> str:
  """What is wrong with the score, the mask or the box of a result; empty if nothing."""
  score: Any = result.get("score")
  box = result.get("bbox")
  if type(score) not in (int, float) or not 0 <= score <= 1:
    return f"its score is {shown(score, 40)}, but scores are in [0, 1]"
  if not isinstance(result.get("segmentation"), dict):
    return "it has no run lengths for a mask"
  if box is not None and (not isinstance(box, list) or len(box) != 4 or not are_finite(box)):
    return f"its bbox must be [x, y, width, height]; got {shown(box, 60)}"
  return ""
