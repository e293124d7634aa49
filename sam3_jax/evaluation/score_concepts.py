"""Scores tracks of concepts as Meta's evaluators of SA-Co/VEval do, video by video."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sam3_jax.datasets.video_annotations import Concepts, Video, VideoPair
from sam3_jax.evaluation import cgf1, hota
from sam3_jax.evaluation.concept_tracks import ConceptTrack, all_pairs
from sam3_jax.evaluation.identity_switches import identity_switches
from sam3_jax.evaluation.phrase_ap import PhraseAp
from sam3_jax.evaluation.teta import TetaSums
from sam3_jax.evaluation.track_overlap import Overlap, overlap_boxes, overlap_masks

KINDS = {"masks": "", "boxes": "box_"}  # with the prefixes of their metrics


@dataclasses.dataclass(frozen=True)
class PairScore:
  """The scores of a pair of a video and a phrase.

  Attributes:
    video: id of the video.
    pair: the phrase and its category.
    counts: of whole tracks, by masks.
    switches: number of identity switches.
    metrics: as in the file of metrics.
  """

  video: int
  pair: VideoPair
  counts: cgf1.PairCounts
  switches: int
  metrics: Mapping[str, float]

  @property
  def hota(self) -> float:
    """HOTA in percent; 100 if there are neither objects nor predictions."""
    return self.metrics.get("hota", 100.0)


class ConceptScorer:
  """Scores the tracks of one video after another; keeps sums and IoUs of tracks, no masks.

  Args:
    concepts: the videos and the categories.
    threshold: minimum score of a track, inclusive; for HOTA exclusive, as in Meta's evaluators.
      Phrase AP has none.
  """

  def __init__(self, concepts: Concepts, threshold: float = cgf1.THRESHOLD):
    seen = {one.category for video in concepts.videos for one in video.objects}
    self._threshold = threshold
    self._teta = TetaSums([number for number in concepts.categories if number in seen])
    self._cgf1 = {kind: cgf1.MetricSums() for kind in KINDS}
    self._ap = {kind: PhraseAp() for kind in KINDS}
    self._hota: dict[str, list[hota.HotaSums]] = {kind: [] for kind in KINDS}
    self._switches = {True: 0, False: 0, None: 0}  # by whether the video has occlusion
    self._videos = {True: 0, False: 0, None: 0}
    self._objects = 0

  def add(self, video: Video, tracks: Sequence[ConceptTrack]) -> list[PairScore]:
    """Scores the tracks of a video, in the order of their file; returns a score for each pair."""
    truths, frames = video.objects, len(video)
    masks = overlap_masks([one.rles for one in truths], [one.rles for one in tracks], frames)
    boxes = overlap_boxes([one.boxes for one in truths], [one.boxes for one in tracks], frames)
    kinds = [-1 if (own := one.category) is None else own for one in truths]
    high = [i for i, one in enumerate(tracks) if one.score >= self._threshold]
    high_kinds = [tracks[i].category for i in high]
    self._teta.add(masks.select(range(len(truths)), high), kinds, high_kinds)
    self._videos[video.occluded] += 1
    self._objects += len(truths)
    scores = []
    for pair in all_pairs(video):
      own = [i for i, category in enumerate(kinds) if category == pair.category]
      found = [i for i, one in enumerate(tracks) if one.category == pair.category]
      crowds = [truths[i].crowd for i in own]
      values = [tracks[i].score for i in found]
      scores.append(
        self._add_pair(
          video, pair, {"masks": masks.select(own, found), "boxes": boxes.select(own, found)},
          crowds, values,
        )
      )  # fmt: skip
      self._switches[video.occluded] += scores[-1].switches
    return scores

  def _add_pair(
    self,
    video: Video,
    pair: VideoPair,
    overlaps: Mapping[str, Overlap],
    crowds: Sequence[bool],
    values: Sequence[float],
  ) -> PairScore:
    every = range(len(crowds))
    single = [i for i in every if not crowds[i]]
    counted = [i for i, value in enumerate(values) if value >= self._threshold]
    above = [i for i, value in enumerate(values) if value > self._threshold]
    metrics: dict[str, float] = {}
    for kind, prefix in KINDS.items():
      overlap = overlaps[kind]
      self._ap[kind].add(overlap.tubes, values, crowds)
      counts = cgf1.count_pair(overlap.tubes[np.ix_(single, counted)].T)
      self._cgf1[kind].add(counts)
      metrics |= {prefix + name: value for name, value in _pair_metrics(counts).items()}
      if len(crowds) or above:
        sums = hota.hota_sums(overlap.select(every, above))
        self._hota[kind].append(sums)
        metrics |= {prefix + name: value for name, value in sums.metrics().items()}
    counts = cgf1.count_pair(overlaps["masks"].tubes[np.ix_(single, counted)].T)
    switches = identity_switches(overlaps["masks"].select(single, counted))
    return PairScore(video.id, pair, counts, switches, metrics | {"identity_switches": switches})

  def metrics(self) -> dict[str, Any]:
    """The metrics of all videos added so far.

    Returns:
      `videos`, `pairs`, `positive_pairs` (with objects), `objects`, `threshold`. For masks, and for
      boxes with the prefix `box_`: `cgf1.MetricSums.metrics`, where IoUs are of whole tracks;
      `phrase_ap`; `phota` and its parts, as `hota.HotaSums.metrics`. For masks: `teta` and, with
      the prefix `teta_`, its parts; `identity_switches`, and if the file tells which videos have
      occlusion, `identity_switches_without_occlusion` and `videos_without_occlusion`.
    """
    found: dict[str, Any] = {
      "videos": sum(self._videos.values()),
      "pairs": self._cgf1["masks"].pairs,
      "positive_pairs": self._cgf1["masks"].positives,
      "objects": self._objects,
      "threshold": self._threshold,
    }
    for kind, prefix in KINDS.items():
      parts = self._cgf1[kind].metrics() | self._ap[kind].metrics()
      if self._hota[kind]:
        own = hota.add(self._hota[kind]).metrics()
        parts |= {"p" + name if name == "hota" else name: own[name] for name in own}
      found |= {prefix + name: value for name, value in parts.items()}
    for name, value in self._teta.metrics().items():
      found[name if name == "teta" else f"teta_{name}"] = value
    found["identity_switches"] = sum(self._switches.values())
    if self._videos[None] < found["videos"]:
      found["identity_switches_without_occlusion"] = self._switches[False]
      found["videos_without_occlusion"] = self._videos[False]
    return found


def _pair_metrics(counts: cgf1.PairCounts) -> dict[str, float]:
  """`tp`, `fp`, `fn`, and `f1` in percent: means over thresholds, and at IoU 0.50 and 0.75."""
  tp = counts.matched
  fp, fn = counts.found - tp, counts.truths - tp
  total = 2 * tp + fp + fn
  f1 = 100 * np.where(total > 0, 2 * tp / np.maximum(total, 1), 1.0)
  metrics = {}
  for name, curve in (("tp", tp), ("fp", fp), ("fn", fn), ("f1", f1)):
    metrics[name] = float(curve.mean())
    metrics[f"{name}_50"], metrics[f"{name}_75"] = (float(curve[k]) for k in (0, 5))
  return metrics
