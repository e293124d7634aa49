"""Phrase AP of SA-Co/VEval: COCO's average precision of whole tracks.

Each pair of a video and a phrase is treated as an image, without categories, and the IoU of two
tracks is that of their tubes. There is no score threshold; the best 100 tracks of a pair count.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from sam3_jax.evaluation.cgf1 import IOU_THRESHOLDS

MOST = 100  # tracks of a pair


class PhraseAp:
  """Collects IoUs and scores of pairs; uses little memory."""

  def __init__(self):
    self._pairs: list[tuple[np.ndarray, list[float], list[bool]]] = []

  def add(
    self, tubes: Float[np.ndarray, "G P"], scores: Sequence[float], crowds: Sequence[bool]
  ) -> None:
    """Adds a pair: the IoUs of its tracks, the scores of predictions, which objects are crowds."""
    if tubes.size or len(scores) or len(crowds):
      self._pairs.append((tubes, list(scores), list(crowds)))

  def metrics(self) -> dict[str, float | None]:
    """`phrase_ap`, `phrase_ap_50` and `phrase_ap_75` in percent; None if there are no objects."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    pairs = self._pairs
    names = ("phrase_ap", "phrase_ap_50", "phrase_ap_75")
    if not any(not crowd for *_, crowds in pairs for crowd in crowds):
      return dict.fromkeys(names)
    base: Any = COCOeval

    class TubeEvaluation(base):
      """COCO's evaluation with given IoUs."""

      def computeIoU(self, imgId, catId):
        tubes, scores, _ = pairs[imgId - 1]
        best = np.argsort([-score for score in scores], kind="stable")[:MOST]
        return tubes.T[best] if tubes.size else []

    index: Any = COCO
    truth, results = index(), index()
    images = [{"id": i} for i in range(1, len(pairs) + 1)]
    truth.dataset = {"images": images, "annotations": _entries([p[2] for p in pairs], "iscrowd")}
    results.dataset = {"images": images, "annotations": _entries([p[1] for p in pairs], "score")}
    for one in (truth, results):
      one.dataset["categories"] = [{"id": 1}]
      _quietly(one.createIndex)
    work = TubeEvaluation(truth, results, "bbox")
    work.params.useCats = 0
    work.params.areaRng, work.params.areaRngLbl = [[0, 1e10]], ["all"]
    work.params.maxDets, work.params.iouThrs = [MOST], IOU_THRESHOLDS
    _quietly(work.evaluate)
    _quietly(work.accumulate)
    precision = work.eval["precision"]  # [thresholds, recalls, categories, areas, limits]
    curve = precision.reshape(len(IOU_THRESHOLDS), -1).mean(axis=1)
    values = (float(curve.mean()), *curve[[0, 5]].tolist())
    return {name: 100 * value for name, value in zip(names, values, strict=True)}


def _entries(rows: Sequence[Sequence[float]], key: str) -> list[dict[str, Any]]:
  """COCO's entries of the objects or predictions of each pair."""
  cells = [(pair, value) for pair, row in enumerate(rows, start=1) for value in row]
  return [
    {"id": i, "image_id": pair, "category_id": 1, "area": 1.0, "iscrowd": 0, key: value}
    for i, (pair, value) in enumerate(cells, start=1)  # not 0, which means "no match"
  ]


def _quietly(work: Any) -> None:
  """Calls a function of pycocotools, which prints its progress."""
  import contextlib
  import io

  with contextlib.redirect_stdout(io.StringIO()):
    work()
