"""Metrics of concept tracks: equal to Meta's evaluators, and cases that follow by definition."""

import ast
import json
import math
from pathlib import Path

import numpy as np
import pytest
from concept_videos import FRAMES, concepts, moving, rectangle, rles, track

from sam3_jax.datasets import video_annotations
from sam3_jax.evaluation import concept_tracks
from sam3_jax.evaluation.identity_switches import identity_switches
from sam3_jax.evaluation.score_concepts import ConceptScorer
from sam3_jax.evaluation.track_overlap import Overlap, overlap_boxes, overlap_masks

GOLDENS = Path(__file__).parent / "goldens" / "video" / "eval"

# Meta's names without the prefix of the kind, and ours.
FIGURES = {
  "demo_cgf1_micro": "cgf1", "demo_ilmcc": "il_mcc", "demo_positive_micro_f1": "pmf1",
  "phrase_ap": "phrase_ap", "all_phrase_HOTA": "phota", "teta": "teta",
} | {
  f"all_phrase_{name}": name.lower()
  for name in ("DetA", "AssA", "DetRe", "DetPr", "AssRe", "AssPr", "LocA", "OWTA")
} | {
  f"{part}_{what}": f"teta_{part}{what}"
  for part in ("loc", "assoc", "cls") for what in ("a", "re", "pr")
}  # fmt: skip


@pytest.fixture(scope="module", params=[".", "unordered"])
def golden(request):
  folder = GOLDENS / request.param
  data = video_annotations.read_concepts(folder / "truth.json")
  tracks = concept_tracks.read(folder / "predictions.json", data.videos)
  scorer = ConceptScorer(data)
  scores = [score for video in data.videos for score in scorer.add(video, tracks.get(video.id, []))]
  expected = json.loads((folder / "expected.json").read_text())
  return scorer.metrics(), scores, expected


class TestGoldens:
  """Figures of Meta's evaluators on 20 pairs of 7 videos; and on 16 pairs of 4 videos, where the
  categories are not in the order of their ids and objects overlap, without cgF1 and AP of boxes.
  Measured error 3e-16."""

  def test_all_figures(self, golden):
    metrics, _, expected = golden
    figures = {name: value for own in expected["figures"].values() for name, value in own.items()}
    assert len(figures) in (52, 40)
    for name, value in figures.items():
      got = _figure(metrics, name)
      if math.isnan(value):  # Meta divides cgF1 by pmF1 for IL_MCC, which is the same at all IoUs
        assert name.endswith("_ilmcc_75")
        prefix = "box_" if "bbox" in name else ""
        assert metrics[f"{prefix}pmf1_75"] == 0
      elif expected["figures"]["teta"].get(name) is not None:
        assert float(f"{100 * got:.5g}") == value  # Meta prints five digits
      else:
        assert got == pytest.approx(value, abs=1e-12), name

  def test_all_pairs(self, golden):
    _, scores, expected = golden
    by_key = {(score.video, score.pair.category): score.metrics for score in scores}
    assert {ast.literal_eval(key) for key in expected["pairs"]} == by_key.keys()
    checked = 0
    for key, values in expected["pairs"].items():
      metrics = by_key[ast.literal_eval(key)]
      for name, value in values.items():
        kind, what = name.split("_", 1)
        ours = {"mask": "", "bbox": "box_"}[kind] + what.lower().replace("_50_95", "")
        scale = 1 if what[:2] in ("TP", "FP", "FN") else 100
        assert metrics[ours] / scale == pytest.approx(value, abs=1e-12), (key, name)
        checked += 1
      assert ("hota" in metrics) == ("mask_HOTA" in values)
    assert checked > 400

  def test_counts(self, golden):
    metrics, scores, expected = golden
    assert metrics["videos"] == len({score.video for score in scores}) in (4, 7)
    assert metrics["pairs"] == len(expected["pairs"]) == len(scores)
    assert metrics["identity_switches"] == sum(score.switches for score in scores)
    assert "videos_without_occlusion" not in metrics


def _figure(metrics, name):
  """Our value for a name of Meta's."""
  kind, what = name.removeprefix("video_").split("_", 1)
  prefix, suffix = {"mask": "", "bbox": "box_"}[kind], ""
  for ending in ("_50_95", "_50", "_75"):
    if what.endswith(ending):
      what, suffix = what.removesuffix(ending), "" if ending == "_50_95" else ending
      break
  ours = FIGURES[what]
  if ours == "il_mcc":
    return metrics[prefix + ours]
  return metrics[prefix + ours + suffix] / 100


@pytest.fixture
def score(tmp_path):
  """Scores tracks by video id; returns the metrics, and those of each pair."""

  def metrics(tracks, *args, threshold=0.5, **values):
    data = concepts(tmp_path, *args, **values)
    scorer = ConceptScorer(data, threshold)
    pairs = [pair for video in data.videos for pair in scorer.add(video, tracks.get(video.id, []))]
    return scorer.metrics(), pairs

  return metrics


A, B = moving(2, 2), moving(2, 25)


def test_perfect_tracks(score):
  metrics, [pair] = score({1: [track(A), track(B, score=0.6)]}, [(1, 1, A), (1, 1, B)])
  for name in ("phota", "deta", "assa", "loca", "teta", "teta_clsa", "phrase_ap", "box_phota"):
    assert metrics[name] == pytest.approx(100), name
  assert metrics["pmf1"] == pytest.approx(100, abs=0.02)  # Meta's epsilon
  assert pair.metrics["f1"] == 100
  assert pair.hota == pytest.approx(100)
  assert metrics["identity_switches"] == 0


def test_no_predictions(score):
  metrics, [pair] = score({}, [(1, 1, A)])
  for name in ("cgf1", "pmf1", "phota", "phrase_ap", "teta", "box_phota", "recall"):
    assert metrics[name] == 0, name
  assert metrics["loca"] == 100  # of no matches, as in Meta's evaluator
  assert (pair.metrics["fn"], pair.metrics["fp"], pair.metrics["f1"]) == (1, 0, 0)


def test_negative_pairs_alone(score):
  """Without any object, AP and TETA are not defined."""
  metrics, [pair] = score({}, pairs=[(1, 3)])
  assert metrics["phrase_ap"] is metrics["box_phrase_ap"] is metrics["teta"] is None
  assert "phota" not in metrics
  assert pair.metrics["f1"] == pair.hota == 100
  metrics, [pair] = score({1: [track(A, 3)]}, pairs=[(1, 3)])
  assert metrics["phota"] == metrics["detpr"] == pair.hota == 0
  assert (pair.metrics["fp"], pair.metrics["f1"]) == (1, 0)


def test_false_positive_of_a_negative_pair(score):
  """It lowers IL_MCC and pHOTA, but neither pmF1 nor TETA, which knows only true categories."""
  objects, pairs = [(1, 1, A)], [(1, 1), (1, 3)]
  good, _ = score({1: [track(A)]}, objects, pairs)
  bad, _ = score({1: [track(A), track(B, 3)]}, objects, pairs)
  assert good["il_mcc"] == pytest.approx(1, abs=1e-5)
  assert bad["il_mcc"] == 0
  assert bad["cgf1"] == 0
  assert bad["pmf1"] == good["pmf1"]
  assert bad["phota"] < good["phota"]
  assert bad["teta"] == good["teta"] == pytest.approx(100)


def test_identity_switch_lowers_association(score):
  """A track that is cut in the middle has all detections, but half of the association."""
  cut = FRAMES // 2
  first, second = A[:cut] + [None] * (FRAMES - cut), [None] * cut + A[cut:]
  metrics, [pair] = score({1: [track(first), track(second)]}, [(1, 1, A)])
  assert metrics["deta"] == pytest.approx(100)
  assert metrics["assa"] == pytest.approx(50)
  assert metrics["phota"] == pytest.approx(100 * math.sqrt(0.5))
  assert metrics["teta_assoca"] == pytest.approx(50)
  assert pair.switches == metrics["identity_switches"] == 1
  assert metrics["cgf1"] == 0  # neither half overlaps the whole tube by more than a half


def test_swapped_identities(score):
  """Two tracks that exchange their objects: two switches, detections are perfect."""
  cut = FRAMES // 2
  tracks = [track(A[:cut] + B[cut:]), track(B[:cut] + A[cut:])]
  metrics, _ = score({1: tracks}, [(1, 1, A), (1, 1, B)])
  assert metrics["deta"] == pytest.approx(100)
  assert metrics["identity_switches"] == 2
  assert metrics["phota"] < 70


def test_one_frame(score):
  metrics, _ = score({1: [track(A[:1])]}, [(1, 1, A[:1])], frames=1)
  for name in ("phota", "teta", "phrase_ap", "box_phota"):
    assert metrics[name] == pytest.approx(100), name


def test_thresholds(score):
  """A score equal to the threshold counts, except for HOTA; phrase AP has no threshold."""
  metrics, [pair] = score({1: [track(A, score=0.5)]}, [(1, 1, A)])
  assert pair.counts.found == 1
  assert metrics["phota"] == 0
  assert metrics["teta"] == pytest.approx(100)
  metrics, [pair] = score({1: [track(A, score=0.1)]}, [(1, 1, A)])
  assert pair.counts.found == 0
  assert metrics["phrase_ap"] == pytest.approx(100)
  metrics, _ = score({1: [track(A, score=0.1)]}, [(1, 1, A)], threshold=0.05)
  assert metrics["phota"] == pytest.approx(100)


def test_wrong_class(score):
  """TETA credits localization and association of a track that has another phrase."""
  objects = [(1, 1, A), (1, 2, B)]
  metrics, _ = score({1: [track(A, 2), track(B, 2)]}, objects, [(1, 1), (1, 2)])
  for name in ("teta_loca", "teta_assoca"):
    assert metrics[name] == pytest.approx(100)
  # 0 of the first category. Of the second, one match and one error, which Meta counts twice.
  assert metrics["teta_clsa"] == pytest.approx(100 * (0 + 1 / 3) / 2)
  assert metrics["phota"] < 60


def test_objects_without_a_pair_get_one(score):
  metrics, pairs = score({}, [(1, 1, A), (1, 2, B)], [(1, 1)])
  assert [pair.pair.category for pair in pairs] == [1, 2]
  assert metrics["pairs"] == metrics["positive_pairs"] == 2


def test_phrases_do_not_compete(score):
  """The same tracks for two phrases, each with its own object."""
  metrics, _ = score({1: [track(A, 1), track(A, 2)]}, [(1, 1, A), (1, 2, A)], [(1, 1), (1, 2)])
  assert metrics["phota"] == pytest.approx(100)
  assert metrics["phrase_ap"] == pytest.approx(100)


def test_scenes_without_occlusion(score):
  """Switches of videos that have no occlusion are counted apart."""
  cut = FRAMES // 2
  halves = [track(A[:cut] + [None] * (FRAMES - cut)), track([None] * cut + A[cut:])]
  objects, pairs = [(n, 1, A) for n in (1, 2, 3)], [(n, 1) for n in (1, 2, 3)]
  videos = [{"occluded": True}, {"occluded": False}, {"occluded": 0}]
  metrics, _ = score({1: halves, 2: halves, 3: [track(A)]}, objects, pairs, videos=videos)
  assert metrics["identity_switches"] == 2
  assert metrics["identity_switches_without_occlusion"] == 1
  assert metrics["videos_without_occlusion"] == 2


class TestIdentitySwitches:
  def count(self, ious):
    iou = np.array(ious, float)
    seen = np.ones((2, len(iou)), bool)
    return identity_switches(Overlap(seen, seen, iou, iou.sum(axis=0)))

  def test_a_track_is_kept_while_it_overlaps_enough(self):
    """Another track that overlaps more is no switch."""
    assert self.count([[[0.9, 0.0]], [[0.5, 0.9]]]) == 0
    assert self.count([[[0.9, 0.0]], [[0.49, 0.9]]]) == 1

  def test_gaps(self):
    assert self.count([[[0.9, 0]], [[0, 0]], [[0.9, 0]]]) == 0
    assert self.count([[[0.9, 0]], [[0, 0]], [[0, 0.9]]]) == 1

  def test_nothing(self):
    assert self.count(np.zeros((3, 0, 2))) == self.count(np.zeros((3, 2, 0))) == 0
    assert self.count(np.zeros((0, 2, 2))) == 0


class TestOverlap:
  def test_masks_against_bitmaps(self):
    rng = np.random.default_rng(3)
    truths, found = ([[m if rng.random() < 0.8 else None for m in rng.random((4, 12, 9)) < 0.4]
                      for _ in range(n)] for n in (3, 2))  # fmt: skip
    got = overlap_masks([rles(one) for one in truths], [rles(one) for one in found], 4)
    empty = np.zeros((12, 9), bool)
    for i, truth in enumerate(truths):
      for j, one in enumerate(found):
        a, b = (np.stack([empty if m is None else m for m in masks]) for masks in (truth, one))
        assert got.tubes[i, j] == (a & b).sum() / (a | b).sum()
        common, union = (a & b).sum((1, 2)), (a | b).sum((1, 2))
        assert np.array_equal(got.iou[:, i, j], common / np.maximum(union, 1))

  def test_boxes(self):
    truth, one = ((0.0, 0.0, 10.0, 10.0), None), ((5.0, 0.0, 10.0, 10.0), (0.0, 0.0, 5.0, 10.0))
    got = overlap_boxes([truth], [one], 2)
    assert got.iou[:, 0, 0].tolist() == [np.float32(1 / 3), 0]
    assert got.tubes[0, 0] == 0.25
    assert got.truths.tolist() == [[True, False]]

  @pytest.mark.parametrize(("truths", "found"), [(0, 2), (2, 0), (0, 0)])
  def test_none(self, truths, found):
    own = rectangle(0, 0, 5, 5)
    got = overlap_masks([rles([own])] * truths, [rles([own])] * found, 1)
    assert got.tubes.shape == (truths, found)
    assert got.iou.shape == (1, truths, found)
