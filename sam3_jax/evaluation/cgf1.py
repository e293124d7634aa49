"""cgF1: are all instances of a phrase found, and nothing if there are none?

The classification-gated F1 of SA-Co (Carion et al. 2025, "SAM 3: Segment Anything with Concepts",
and Meta's `sam3/eval/cgf1_eval.py`). A pair is an image and a phrase. Localization is measured by
the micro F1 over pairs with objects (pmF1), recognition by the Matthews correlation of "has
objects" with "has predictions" over all pairs (IL_MCC), and cgF1 is their product. This module is
independent of the model: it takes objects and predictions, run lengths and boxes, pair by pair.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int

from sam3_jax.datasets.annotations import Object
from sam3_jax.evaluation.predictions import EvalPrediction

Kind = Literal["masks", "boxes"]

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)  # as in COCO
THRESHOLD = 0.5  # minimum score of a prediction, inclusive

# Added to denominators in Meta's code: of sums over objects, and over pairs.
_OBJECTS, _PAIRS = 1e-4, 1e-6


@dataclasses.dataclass(frozen=True)
class PairCounts:
  """Counts of one pair.

  Attributes:
    truths: number of objects, without crowds.
    found: number of predictions that score high enough.
    matched: for each of `IOU_THRESHOLDS`, number of matches with at least this IoU.
  """

  truths: int
  found: int
  matched: Int[np.ndarray, " t"]

  @property
  def f1(self) -> Float[np.ndarray, " t"]:
    """F1 of the pair alone; 1 if there are neither objects nor predictions."""
    if not self.truths + self.found:
      return np.ones(len(IOU_THRESHOLDS))
    precision = self.matched / (self.found + _OBJECTS)
    return _harmonic_mean(precision, self.matched / (self.truths + _OBJECTS), _OBJECTS)


def count_matches(
  truths: Sequence[Object], found: Sequence[EvalPrediction], kind: Kind, score: float = THRESHOLD
) -> PairCounts:
  """Matches predictions with objects so that the sum of IoUs is maximal, and counts.

  Args:
    truths: of the pair; crowds are left out.
    found: of the pair; predictions below `score` are left out.
    kind: whether IoUs are of masks or of boxes.
    score: minimum score, inclusive.
  """
  truths = [truth for truth in truths if not truth.crowd]
  found = [prediction for prediction in found if prediction.score >= score]
  if not truths or not found:
    return PairCounts(len(truths), len(found), np.zeros(len(IOU_THRESHOLDS), np.int64))
  return count_pair(_pairwise_iou(truths, found, kind))


def count_pair(ious: Float[np.ndarray, "found truths"]) -> PairCounts:
  """As `count_matches`, for given IoUs."""
  found, truths = ious.shape
  matched = np.zeros(len(IOU_THRESHOLDS), np.int64)
  if ious.size:
    from scipy.optimize import linear_sum_assignment

    assigned = ious[linear_sum_assignment(ious, maximize=True)]
    matched = np.sum(assigned[:, None] >= IOU_THRESHOLDS, axis=0)
  return PairCounts(truths, found, matched)


def best_truth(counts: Sequence[PairCounts]) -> PairCounts:
  """Of the counts against several annotators, those with the best F1 of the pair, averaged over
  `IOU_THRESHOLDS`; the first of equals."""
  return max(counts, key=lambda pair: float(pair.f1.mean()))


class MetricSums:
  """Sums over pairs, and the metrics computed from them; uses little memory for any number."""

  def __init__(self):
    # TP, FP, FN of objects, and FP on pairs with objects, for each of IOU_THRESHOLDS.
    self._tp, self._fp, self._fn, self._positive_fp = np.zeros((4, len(IOU_THRESHOLDS)), int)
    self._f1 = np.zeros(len(IOU_THRESHOLDS))  # of pairs with objects and predictions
    self._pairs = np.zeros((2, 2), int)  # [has objects, has predictions]

  def add(self, pair: PairCounts) -> None:
    self._pairs[int(pair.truths > 0), int(pair.found > 0)] += 1
    self._tp += pair.matched
    self._fn += pair.truths - pair.matched
    self._fp += pair.found - pair.matched
    if pair.truths and pair.found:
      self._positive_fp += pair.found - pair.matched
      self._f1 += pair.f1

  @property
  def pairs(self) -> int:
    return int(self._pairs.sum())

  @property
  def positives(self) -> int:
    """Number of pairs with objects."""
    return int(self._pairs[1].sum())

  def metrics(self) -> dict[str, float]:
    """All metrics of Meta's evaluator.

    Returns:
      Percentages, except `il_mcc` in [-1, 1] (`cgf1` has its sign). Means over `IOU_THRESHOLDS`,
      and values at IoU 0.50 and 0.75 with the suffixes `_50` and `_75`: `cgf1`; `pmf1`,
      `positive_precision` and `recall`; `macro_f1`, the mean over pairs with objects and
      predictions; `f1` and `precision`, which also count false positives on pairs without objects.
      At the level of pairs: `il_mcc`, `il_precision`, `il_recall`, `il_f1`, `il_fpr`.
    """
    pairs = self._pair_metrics()
    recall = self._tp / (self._tp + self._fn + _OBJECTS)
    precision = self._tp / (self._tp + self._fp + _OBJECTS)
    positive_precision = self._tp / (self._tp + self._positive_fp + _OBJECTS)
    pmf1 = _harmonic_mean(positive_precision, recall, _OBJECTS)
    curves = {
      "cgf1": pmf1 * pairs["il_mcc"],
      "pmf1": pmf1,
      "positive_precision": positive_precision,
      "recall": recall,
      "macro_f1": self._f1 / max(1, self._pairs[1, 1]),
      "f1": _harmonic_mean(precision, recall, _OBJECTS),
      "precision": precision,
    }
    metrics = {}
    for name, curve in curves.items():
      metrics[name] = 100 * float(curve.mean())
      metrics[f"{name}_50"], metrics[f"{name}_75"] = (100 * curve[[0, 5]]).tolist()
    scaled = {name: value if name == "il_mcc" else 100 * value for name, value in pairs.items()}
    return metrics | scaled

  def _pair_metrics(self) -> dict[str, float]:
    (tn, fp), (fn, tp) = self._pairs.tolist()
    precision, recall = tp / (tp + fp + _PAIRS), tp / (tp + fn + _PAIRS)
    spread = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    return {
      "il_mcc": (tp * tn - fp * fn) / (spread + _PAIRS),
      "il_precision": precision,
      "il_recall": recall,
      "il_f1": _harmonic_mean(precision, recall, _PAIRS),
      "il_fpr": fp / (fp + tn + _PAIRS),
    }


def _harmonic_mean(precision, recall, epsilon: float):
  return 2 * precision * recall / (precision + recall + epsilon)


def _pairwise_iou(
  truths: Sequence[Object], found: Sequence[EvalPrediction], kind: Kind
) -> Float[np.ndarray, "found truths"]:
  """By pycocotools, as in Meta's evaluator."""
  from pycocotools import mask

  api: Any = mask
  if kind == "masks":
    ious = api.iou([one.rle for one in found], [one.rle for one in truths], [0] * len(truths))
  else:
    boxes = [np.array([one.box for one in side], np.float64) for side in (found, truths)]
    ious = api.iou(*boxes, [0] * len(truths))
  return np.asarray(ious)
