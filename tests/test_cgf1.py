"""cgF1 against Meta's evaluator and sums computed by hand, and its invariances."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from evaluation_data import all_metrics, rectangle, target

from sam3_jax.datasets import annotations
from sam3_jax.evaluation import cgf1, predictions
from sam3_jax.evaluation.cgf1 import MetricSums, PairCounts
from sam3_jax.evaluation.predictions import EvalPrediction
from sam3_jax.evaluation.score import Scorer

GOLDENS = Path(__file__).parent / "goldens" / "cgf1"
CASES = {"one": ["truth.json"], "two_truths": ["truth0.json", "truth1.json"]}
META = {
  "cgF1": "cgf1", "precision": "precision", "recall": "recall", "F1": "f1",
  "positive_macro_F1": "macro_f1", "positive_micro_F1": "pmf1",
  "positive_micro_precision": "positive_precision", "IL_precision": "il_precision",
  "IL_recall": "il_recall", "IL_F1": "il_f1", "IL_FPR": "il_fpr", "IL_MCC": "il_mcc",
}  # fmt: skip

# pycocotools' own, with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def case(name: str):
  truths = [annotations.read(GOLDENS / name / file) for file in CASES[name]]
  return truths, predictions.read(GOLDENS / name / "predictions.json", truths[0])[0]


def prediction(score, *box) -> EvalPrediction:
  return EvalPrediction(score, box, rectangle((20, 20), *box))


class TestGoldens:
  @pytest.mark.parametrize("name", CASES)
  def test_all_metrics(self, name):
    truths, found = case(name)
    got = all_metrics(found, *truths)
    wanted = json.loads((GOLDENS / name / "expected.json").read_text())
    assert len(wanted) == 2 * (12 + 2 * 7)
    for key, value in wanted.items():
      kind, figure = key.removeprefix("cgF1_eval_").split("_", 1)
      figure, _, overlap = figure.partition("@")
      ours = "box_" * (kind == "bbox") + META[figure]
      ours += {"": "", "0.5": "_50", "0.75": "_75"}[overlap]
      scale = 1 if figure == "IL_MCC" else 100
      assert got[ours] / scale == pytest.approx(value, rel=0, abs=1e-15), key  # measured 1.1e-16

  def test_pairs_that_are_not_exhaustive_in_a_later_truth_are_left_out(self):
    truths, _ = case("two_truths")
    incomplete = [{pair.id for pair in truth if not pair.exhaustive} for truth in truths]
    assert incomplete[1] - incomplete[0]
    pairs = {pair.id for pair in Scorer(*truths).pairs}
    assert pairs == {pair.id for pair in truths[0]} - incomplete[0] - incomplete[1]

  def test_order_does_not_matter(self):
    truths, found = case("one")
    shuffled = {key: value[::-1] for key, value in reversed(found.items())}
    assert all_metrics(shuffled, truths[0][::-1]) == pytest.approx(
      all_metrics(found, *truths), abs=1e-12
    )

  def test_truth_given_twice_counts_once(self):
    truths, found = case("one")
    got = all_metrics(found, truths[0], truths[0])
    assert got.pop("truths") == 2
    assert got == {
      key: value for key, value in all_metrics(found, truths[0]).items() if key != "truths"
    }


class TestCountMatches:
  @pytest.mark.parametrize("kind", ["masks", "boxes"])
  def test_iou_computed_by_hand(self, kind):
    """A shift by 2 of 10 columns: 80 of 120 pixels, IoU 2/3. A score of 0.5 counts."""
    found = [prediction(0.5, 2, 0, 10, 10), prediction(0.49, 0, 0, 10, 10)]
    got = cgf1.count_matches([target(0, 0, 10, 10)], found, kind)
    assert (got.truths, got.found) == (1, 1)
    assert got.matched.tolist() == [1] * 4 + [0] * 6
    assert cgf1.count_matches([target(0, 0, 10, 10)], found, kind, 0.4).found == 2

  def test_masks_and_boxes_are_matched_separately(self):
    one = EvalPrediction(0.9, (0, 0, 10, 10), rectangle((20, 20), 10, 10, 10, 10))
    assert cgf1.count_matches([target(0, 0, 10, 10)], [one], "masks").matched.sum() == 0
    assert cgf1.count_matches([target(0, 0, 10, 10)], [one], "boxes").matched.sum() == 10

  def test_without_objects_or_predictions(self):
    for truths, found in ((0, 0), (2, 0), (0, 2)):
      got = cgf1.count_matches(
        [target(0, 0, 5, 5)] * truths, [prediction(0.9, 0, 0, 5, 5)] * found, "masks"
      )
      assert (got.truths, got.found, got.matched.sum()) == (truths, found, 0)
      assert set(got.f1) == {0.0 if truths + found else 1.0}

  def test_crowds_are_left_out(self):
    truths = [target(0, 0, 10, 10), target(10, 10, 8, 8, crowd=True)]
    got = cgf1.count_matches(truths, [prediction(0.9, 10, 10, 8, 8)], "masks")
    assert (got.truths, got.found, got.matched.sum()) == (1, 1, 0)

  def test_empty_mask_matches_nothing(self):
    empty = EvalPrediction(0.9, (0, 0, 0, 0), rectangle((20, 20), 0, 0, 0, 0))
    for kind in ("masks", "boxes"):
      got = cgf1.count_matches([target(0, 0, 10, 10)], [empty], kind)
      assert (got.found, got.matched.sum()) == (1, 0)

  @pytest.mark.parametrize("seed", range(6))
  @pytest.mark.parametrize("kind", ["masks", "boxes"])
  def test_assignment_by_brute_force(self, kind, seed):
    """The best sum of IoUs over all assignments of up to four objects to five predictions."""
    rng = np.random.default_rng(seed)
    boxes = [(*rng.integers(0, 6, 2), *rng.integers(4, 14, 2)) for _ in range(9)]
    boxes = [tuple(int(v) for v in box) for box in boxes]
    count = 1 + seed % 4
    truths, found = boxes[:count], boxes[4:]
    overlaps = np.array([[iou(a, b) for b in truths] for a in found])
    best = max(
      (overlaps[list(rows), range(count)] for rows in itertools.permutations(range(5), count)),
      key=np.sum,
    )
    got = cgf1.count_matches(
      [target(*b) for b in truths], [prediction(0.8, *b) for b in found], kind
    )
    assert got.matched.tolist() == [int(np.sum(best >= t)) for t in cgf1.IOU_THRESHOLDS]


def iou(a, b) -> float:
  w = max(0, min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0]))
  h = max(0, min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1]))
  return w * h / (a[2] * a[3] + b[2] * b[3] - w * h)


def counts(truths, found, *matched) -> PairCounts:
  return PairCounts(truths, found, np.array([*matched, *[0] * (10 - len(matched))]))


class TestBestTruth:
  def test_truth_with_the_best_f1(self):
    poor, good = counts(2, 2, 1), counts(3, 2, 2, 2, 1)
    assert cgf1.best_truth([poor, good]) is cgf1.best_truth([good, poor]) is good

  def test_true_negative_is_best(self):
    assert cgf1.best_truth([counts(1, 0), counts(0, 0)]).truths == 0

  def test_the_first_of_equals(self):
    first, second = counts(2, 2, 1), counts(2, 2, 1)
    assert cgf1.best_truth([first, second]) is first


class TestMetricSums:
  def test_metrics_computed_by_hand(self):
    """Five pairs: two of three objects found; one missed; a false positive; two true negatives."""
    sums = MetricSums()
    pairs = [counts(3, 3, 2, 2), counts(1, 0), counts(0, 1), counts(0, 0), counts(0, 0)]
    for pair in pairs:
      sums.add(pair)
    metrics = sums.metrics()
    recall, precision, positive = 2 / 4, 2 / 4, 2 / 3
    mcc = (1 * 2 - 1 * 1) / math.sqrt(2 * 2 * 3 * 3)
    pmf1 = 2 * positive * recall / (positive + recall)
    # The tolerance covers the 1e-4 that Meta adds to denominators, here with four objects.
    assert metrics["recall_50"] == pytest.approx(100 * recall, abs=0.01)
    assert metrics["precision_50"] == pytest.approx(100 * precision, abs=0.01)
    assert metrics["positive_precision_50"] == pytest.approx(100 * positive, abs=0.01)
    assert metrics["pmf1_50"] == pytest.approx(100 * pmf1, abs=0.02)
    assert metrics["il_mcc"] == pytest.approx(mcc, abs=1e-6)
    assert metrics["cgf1_50"] == pytest.approx(100 * pmf1 * mcc, abs=0.01)
    assert metrics["cgf1"] == pytest.approx(0.2 * metrics["cgf1_50"])  # two of ten thresholds
    assert metrics["macro_f1_50"] == pytest.approx(100 * 2 / 3, abs=0.01)
    assert metrics["il_recall"] == pytest.approx(50, abs=1e-3)
    assert metrics["il_fpr"] == pytest.approx(100 / 3, abs=1e-3)
    assert metrics["cgf1_75"] == metrics["f1_75"] == 0
    assert (sums.pairs, sums.positives) == (5, 2)

  def test_perfect_predictions(self):
    sums = MetricSums()
    for pair in [counts(2, 2, *[2] * 10), counts(0, 0)] * 50:
      sums.add(pair)
    metrics = sums.metrics()
    assert metrics.pop("il_fpr") == 0
    assert metrics["il_mcc"] == pytest.approx(1)
    assert all(value > 99.9 for name, value in metrics.items() if name != "il_mcc")

  def test_no_pairs(self):
    assert set(MetricSums().metrics().values()) == {0.0}

  def test_many_pairs(self):
    """Products of hundreds of thousands of pairs do not overflow."""
    sums = MetricSums()
    sums._pairs[:] = [[400_000, 1_000], [2_000, 300_000]]
    assert sums.metrics()["il_mcc"] == pytest.approx(0.99123, abs=1e-4)
