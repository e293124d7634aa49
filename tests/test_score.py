"""Scores of given predictions: cgF1 against several annotators, and average precision."""

import dataclasses
import io
import json
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from evaluation_data import (
  all_metrics,
  pair,
  perfect,
  rectangle,
  target,
)
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from sam3_jax.datasets import annotations
from sam3_jax.datasets.annotations import Object
from sam3_jax.evaluation import predictions, score
from sam3_jax.evaluation.average_precision import average_precision
from sam3_jax.evaluation.predictions import EvalPrediction

GOLDEN = Path(__file__).parent / "goldens" / "cgf1" / "one"
SCENES = Path(__file__).parent / "scenes"

# A warning of pycocotools with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


class TestScorer:
  def test_pairs_that_count(self):
    incomplete = pair(number=2, exhaustive=False)
    assert [one.id for one in score.Scorer([pair(), incomplete]).pairs] == [1]
    full = pair(target(0, 0, 5, 5), number=3)
    assert [one.id for one in score.Scorer([pair(), full], prompt="box").pairs] == [3]
    truths = [pair(), full], [pair(exhaustive=False), pair(number=3)]
    assert [one.id for one in score.Scorer(*truths).pairs] == [3]

  @pytest.mark.parametrize(
    ("truths", "prompt", "message"),
    [
      ([[]], "text", "of 0 pairs none is annotated exhaustively"),
      ([[pair(exhaustive=False)]], "text", "of 1 pairs none is annotated"),
      ([[pair()]], "box", "of 1 pairs none has an object and is annotated"),
      ([[pair()], []], "text", "annotation file 2 lacks pair 1 (a.png, 'cat')"),
      ([[pair()], [pair(phrase="dog")]], "text", "has something else as pair 1"),
      ([[pair()], [pair(size=(9, 9))]], "text", "has something else as pair 1"),
      ([[pair()], [dataclasses.replace(pair(), image_id=1)]], "text", "has something else as"),
    ],
  )
  def test_faults(self, truths, prompt, message):
    with pytest.raises(ValueError) as fault:
      score.Scorer(*truths, prompt=prompt)
    assert message in str(fault.value)

  def test_masks_and_boxes_choose_their_truth_separately(self):
    """One of two annotators has the right mask, the other the right box."""
    mask_only = Object(rectangle((20, 20), 0, 0, 9, 9), (10, 10, 3, 3))
    box_only = Object(rectangle((20, 20), 10, 10, 3, 3), (0, 0, 9, 9))
    scorer = score.Scorer([pair(mask_only)], [pair(box_only)])
    scorer.add(scorer.pairs[0], [EvalPrediction(0.9, (0, 0, 9, 9), mask_only.rle)])
    metrics = scorer.metrics()
    assert metrics["pmf1"] == metrics["box_pmf1"] > 99


class TestAveragePrecision:
  def test_equals_pycocotools_on_files(self):
    truth = annotations.read(GOLDEN / "truth.json")
    rows = json.loads((GOLDEN / "predictions.json").read_text())
    got = average_precision(truth, predictions.read(GOLDEN / "predictions.json", truth)[0])
    for kind, prefix in (("segm", ""), ("bbox", "box_")):
      with redirect_stdout(io.StringIO()):
        whole = COCO()
        whole.dataset = json.loads((GOLDEN / "truth.json").read_text())
        for one in whole.dataset["annotations"]:
          one["id"] += 1  # 0 would stand for "none"
        whole.createIndex()
        work = COCOeval(whole, whole.loadRes(rows), kind)
        work.params.useCats = 0
        work.evaluate()
        work.accumulate()
        work.summarize()
      want = [work.stats[i] for i in (0, 1, 2, 8)]
      names = ("ap", "ap_50", "ap_75", "ar_100")
      assert [got[prefix + name] for name in names] == pytest.approx([100 * v for v in want])
      assert 5 < got[prefix + "ap"] < 95

  def test_perfect_none_and_quiet(self, capsys):
    pairs = [pair(target(0, 0, 5, 5)), pair(number=2)]
    full = average_precision(pairs, perfect(pairs))
    assert full["ap"] == full["box_ap"] == full["ap_small"] == pytest.approx(100)
    assert full["ap_large"] is None
    assert average_precision(pairs, {})["ap"] == 0
    assert average_precision(pairs[1:], {})["ap"] is None
    assert capsys.readouterr() == ("", "")

  def test_crowds_are_no_false_alarm(self):
    truth = [pair(target(0, 0, 5, 5), target(10, 10, 8, 8, crowd=True))]
    assert average_precision(truth, perfect(truth))["ap"] == pytest.approx(100)


class TestScenes:
  """The fixed scenes on which metrics are reported."""

  @pytest.mark.parametrize(("name", "images", "pairs"), [("known", 90, 600), ("twemoji", 60, 417)])
  def test_complete_and_valid(self, name, images, pairs):
    scenes = annotations.read(SCENES / name / "annotations.json")
    assert len(scenes) == pairs
    assert len({one.file_name for one in scenes}) == images
    assert annotations.check(scenes, SCENES / name) == []

  def test_the_truth_scores_100(self):
    """On all 600 pairs, except for the small terms in Meta's denominators (1e-5)."""
    scenes = annotations.read(SCENES / "known" / "annotations.json")
    got = all_metrics(perfect(scenes), scenes)
    assert got["pairs"] == 600
    for name in ("cgf1", "box_cgf1", "ap", "box_ap", "pmf1_75"):
      assert got[name] == pytest.approx(100, abs=0.01), name
