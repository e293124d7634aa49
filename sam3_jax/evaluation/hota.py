"""HOTA, the higher order tracking accuracy of Luiten et al. 2020, arXiv:2009.07736.

Localization thresholds are 0.05, 0.10 .. 0.95. At each, detection accuracy (DetA) counts matched
objects in the frames, and association accuracy (AssA) measures, for each match, in how many of the
frames of both tracks they are matched with each other; HOTA is their geometric mean. All values are
means over the thresholds. Phrase HOTA (pHOTA) of SA-Co/VEval treats each pair of a video and a
phrase as a video of its own.
"""

import dataclasses
from collections.abc import Iterable

import numpy as np
from jaxtyping import Float

from sam3_jax.evaluation.track_matching import EPSILON, match_frames
from sam3_jax.evaluation.track_overlap import Overlap

THRESHOLDS = np.arange(0.05, 0.99, 0.05)  # of the IoU
_TINY = 1e-10  # LocA is 1 without matches

Curve = Float[np.ndarray, "19"]  # a value for each of THRESHOLDS


@dataclasses.dataclass(frozen=True)
class HotaSums:
  """Sums over frames, from which the metrics are computed; those of several pairs can be added.

  Attributes:
    tp, fn, fp: numbers of matched objects, missed objects, and predictions without an object.
    loc: sum of the IoUs of matches.
    ass, ass_re, ass_pr: sums over matches of the association accuracy, recall and precision.
  """

  tp: Curve
  fn: Curve
  fp: Curve
  loc: Curve
  ass: Curve
  ass_re: Curve
  ass_pr: Curve

  def metrics(self) -> dict[str, float]:
    """Percentages: `hota`, `deta`, `assa`, `detre`, `detpr`, `assre`, `asspr`, `loca`, `owta`.

    OWTA, the open-world tracking accuracy, is HOTA with the recall of detections for DetA.
    """
    tp, at_least_one = self.tp, np.maximum(1, self.tp)
    curves = {
      "deta": tp / np.maximum(1, tp + self.fn + self.fp),
      "assa": self.ass / at_least_one,
      "detre": tp / np.maximum(1, tp + self.fn),
      "detpr": tp / np.maximum(1, tp + self.fp),
      "assre": self.ass_re / at_least_one,
      "asspr": self.ass_pr / at_least_one,
      "loca": np.maximum(_TINY, self.loc) / np.maximum(_TINY, tp),
    }
    curves = {"hota": np.sqrt(curves["deta"] * curves["assa"])} | curves
    curves["owta"] = np.sqrt(curves["detre"] * curves["assa"])
    return {name: 100 * float(curve.mean()) for name, curve in curves.items()}


def hota_sums(overlap: Overlap) -> HotaSums:
  """The sums of one pair."""
  frames = match_frames(overlap)
  true_frames = overlap.truths.sum(axis=1)[:, None]
  found_frames = overlap.found.sum(axis=1)[None]
  tp, loc, ass, ass_re, ass_pr = np.zeros((5, len(THRESHOLDS)))
  for k, threshold in enumerate(THRESHOLDS):
    together = np.zeros(overlap.tubes.shape)  # frames in which two tracks are matched
    for matches in frames:
      close = matches.iou >= threshold - EPSILON
      together[matches.truths[close], matches.found[close]] += 1
      loc[k] += matches.iou[close].sum()
    tp[k] = together.sum()
    ass[k] = (together**2 / np.maximum(1, true_frames + found_frames - together)).sum()
    ass_re[k] = (together**2 / np.maximum(1, true_frames)).sum()
    ass_pr[k] = (together**2 / np.maximum(1, found_frames)).sum()
  return HotaSums(tp, true_frames.sum() - tp, found_frames.sum() - tp, loc, ass, ass_re, ass_pr)


def add(several: Iterable[HotaSums]) -> HotaSums:
  """The sums of several pairs together."""
  names = [field.name for field in dataclasses.fields(HotaSums)]
  total = {name: np.zeros(len(THRESHOLDS)) for name in names}
  for one in several:
    for name in names:
      total[name] = total[name] + getattr(one, name)
  return HotaSums(**total)
