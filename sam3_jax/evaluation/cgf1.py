"""cgF1: are all instances of a phrase found, and nothing where there is none?

Classification-gated F1 of SA-Co (Carion et al. 2025, "SAM 3: Segment Anything with Concepts", and
Meta's `sam3/eval/cgf1_eval.py`). A pair is an image and a phrase. Localisation is the micro F1
over the pairs that hold something (pmF1), recognition the Matthews correlation of "there is one"
with "one was found" over all pairs (IL_MCC), and cgF1 their product. Nothing here knows a model:
truths and predictions go in, run lengths and boxes, one pair at a time.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int

from sam3_jax.datasets.annotations import Object
from sam3_jax.evaluation.predictions import Prediction

Kind = Literal["masks", "boxes"]

IOUS = np.linspace(0.5, 0.95, 10)  # COCO's
SCORE = 0.5  # predictions from this score on count

# What Meta's code adds to denominators: of sums over objects, and over pairs.
_OBJECTS, _PAIRS = 1e-4, 1e-6


@dataclasses.dataclass(frozen=True)
class Counts:
  """One pair: how many objects it has, how many were found, how many of them match.

  Attributes:
    truths: objects of the truth, crowds left out.
    found: predictions that count.
    matched: for each of `IOUS`, the assigned couples that overlap at least so much.
  """

  truths: int
  found: int
  matched: Int[np.ndarray, " t"]

  @property
  def f1(self) -> Float[np.ndarray, " t"]:
    """F1 of the pair alone; 1 where nothing was to be found and nothing was found."""
    if not self.truths + self.found:
      return np.ones(len(IOUS))
    precision = self.matched / (self.found + _OBJECTS)
    return _harmonic(precision, self.matched / (self.truths + _OBJECTS), _OBJECTS)


def count(
  truths: Sequence[Object], found: Sequence[Prediction], kind: Kind, score: float = SCORE
) -> Counts:
  """Assigns predictions to objects so that the sum of overlaps is greatest, and counts.

  Args:
    truths: of the pair; crowds are left out.
    found: of the pair; those below `score` are left out.
    kind: what the overlap is of.
    score: the least that counts.
  """
  truths = [one for one in truths if not one.crowd]
  found = [one for one in found if one.score >= score]
  matched = np.zeros(len(IOUS), np.int64)
  if truths and found:
    from scipy.optimize import linear_sum_assignment

    overlaps = _ious(truths, found, kind)
    couples = overlaps[linear_sum_assignment(overlaps, maximize=True)]
    matched = np.sum(couples[:, None] >= IOUS, axis=0)
  return Counts(len(truths), len(found), matched)


def best(counts: Sequence[Counts]) -> Counts:
  """Of several annotators' truths of a pair, the one that the predictions fit best; first of equals
  (mean of the pair's F1 over `IOUS`)."""
  return max(counts, key=lambda one: float(one.f1.mean()))


class Tally:
  """Sums over pairs, and the figures that they give; a few numbers, however many pairs."""

  def __init__(self):
    # TP, FP, FN of objects, and FP of pairs that have objects; for each of IOUS.
    self._hits, self._false, self._missed, self._positive_false = np.zeros((4, len(IOUS)), int)
    self._f1 = np.zeros(len(IOUS))  # of pairs with objects and predictions
    self._pairs = np.zeros((2, 2), int)  # [has objects, has predictions]

  def add(self, pair: Counts) -> None:
    self._pairs[int(pair.truths > 0), int(pair.found > 0)] += 1
    self._hits += pair.matched
    self._missed += pair.truths - pair.matched
    self._false += pair.found - pair.matched
    if pair.truths and pair.found:
      self._positive_false += pair.found - pair.matched
      self._f1 += pair.f1

  @property
  def pairs(self) -> int:
    return int(self._pairs.sum())

  @property
  def positives(self) -> int:
    """Pairs that have objects."""
    return int(self._pairs[1].sum())

  def figures(self) -> dict[str, float]:
    """All figures of Meta's evaluator.

    Returns:
      Per cent, but for `il_mcc` in [-1, 1] (`cgf1` is negative with it). Means over `IOUS`, and
      with `_50` and `_75` at these overlaps: `cgf1`; `pmf1`, `positive_precision` and `recall`;
      `macro_f1`, the mean over pairs that have objects and predictions; `f1` and `precision`, which
      count false positives on pairs without objects too. Of pairs as a whole: `il_mcc`,
      `il_precision`, `il_recall`, `il_f1`, `il_fpr`.
    """
    pairs = self._pair_figures()
    recall = self._hits / (self._hits + self._missed + _OBJECTS)
    precision = self._hits / (self._hits + self._false + _OBJECTS)
    positive_precision = self._hits / (self._hits + self._positive_false + _OBJECTS)
    pmf1 = _harmonic(positive_precision, recall, _OBJECTS)
    curves = {
      "cgf1": pmf1 * pairs["il_mcc"],
      "pmf1": pmf1,
      "positive_precision": positive_precision,
      "recall": recall,
      "macro_f1": self._f1 / max(1, self._pairs[1, 1]),
      "f1": _harmonic(precision, recall, _OBJECTS),
      "precision": precision,
    }
    figures = {}
    for name, curve in curves.items():
      figures[name] = 100 * float(curve.mean())
      figures[f"{name}_50"], figures[f"{name}_75"] = (100 * curve[[0, 5]]).tolist()
    scaled = {name: value if name == "il_mcc" else 100 * value for name, value in pairs.items()}
    return figures | scaled

  def _pair_figures(self) -> dict[str, float]:
    (tn, fp), (fn, tp) = self._pairs.tolist()
    precision, recall = tp / (tp + fp + _PAIRS), tp / (tp + fn + _PAIRS)
    spread = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    return {
      "il_mcc": (tp * tn - fp * fn) / (spread + _PAIRS),
      "il_precision": precision,
      "il_recall": recall,
      "il_f1": _harmonic(precision, recall, _PAIRS),
      "il_fpr": fp / (fp + tn + _PAIRS),
    }


def _harmonic(precision, recall, least: float):
  return 2 * precision * recall / (precision + recall + least)


def _ious(
  truths: Sequence[Object], found: Sequence[Prediction], kind: Kind
) -> Float[np.ndarray, "found truths"]:
  from pycocotools import mask

  api: Any = mask
  if kind == "masks":
    overlaps = api.iou([one.rle for one in found], [one.rle for one in truths], [0] * len(truths))
  else:
    boxes = [np.array([one.box for one in side], np.float64) for side in (found, truths)]
    overlaps = api.iou(*boxes, [0] * len(truths))
  return np.asarray(overlaps)
