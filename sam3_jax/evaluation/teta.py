"""TETA, the "track every thing" accuracy of Li et al. 2022, arXiv:2207.12978, for files in which
every object of a category is annotated.

The mean of localization, association and classification accuracy, averaged over categories with
objects. For a category, only predictions near its objects (IoU >= 0.5) count for localization and
association, whatever their category; other categories' predictions are not false positives here.
Values are those of Meta's evaluator for SA-Co/VEval (TETA50, exhaustive):

- A prediction that is near an object of another category counts twice as wrong classification of
  its own category, if that has objects near which there are predictions.
- Frames in which the video has no object at all are left out.
- In a video where no prediction is near an object of a category, the wrong classifications that
  earlier categories of the file have counted against it are forgotten.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from sam3_jax.evaluation.track_matching import EPSILON, Matches, match_frames
from sam3_jax.evaluation.track_overlap import Overlap

THRESHOLDS = np.arange(0.0, 0.99, 0.05)  # of the IoU
NEAR = 0.5  # IoU of a prediction that counts for an object; also for classification, the least
_FIRST = 10  # index of NEAR in THRESHOLDS
_NAMES = (
  "teta", "loca", "assoca", "clsa", "locre", "locpr", "assocre", "assocpr", "clsre", "clspr",
)  # fmt: skip
_COUNTS = (
  "loc_tp", "loc_fn", "loc_fp", "assoc", "assoc_re", "assoc_pr", "cls_tp", "cls_fn", "cls_fp",
)  # fmt: skip


class TetaSums:
  """Sums over videos, and the metrics computed from them.

  Args:
    categories: ids of the categories that have objects in any video, in the order of the file.
  """

  def __init__(self, categories: Sequence[int]):
    self._sums = {
      category: {
        name: np.zeros(len(THRESHOLDS) - (_FIRST if name.startswith("cls") else 0))
        for name in _COUNTS
      }
      for category in categories
    }

  def add(self, overlap: Overlap, truths: Sequence[int], found: Sequence[int]) -> None:
    """Adds a video.

    Args:
      overlap: of all objects and all predictions of the video that score high enough.
      truths: the category of each true object.
      found: the category of each prediction.
    """
    frames = np.flatnonzero(overlap.truths.any(axis=0))
    overlap = Overlap(
      overlap.truths[:, frames], overlap.found[:, frames], overlap.iou[frames], overlap.tubes
    )
    true_kinds, found_kinds = np.array(truths, np.int64), np.array(found, np.int64)
    assigned = _assign(overlap)
    wrong = {category: np.zeros(len(THRESHOLDS) - _FIRST) for category in self._sums}
    for category in self._sums:
      # Predictions that are assigned to objects of other categories do not count.
      taken = (assigned >= 0) & (np.append(true_kinds, category)[assigned] != category)
      self._add_category(category, overlap, true_kinds, found_kinds, taken, wrong)
    for category, count in wrong.items():
      self._sums[category]["cls_fp"] += count

  def metrics(self) -> dict[str, float | None]:
    """Percentages: `teta`, `loca`, `assoca`, `clsa`, and recall and precision of each, such as
    `locre` and `locpr`; None if no category has objects."""
    rows = [_metrics(**sums) for sums in self._sums.values()]
    if not rows:
      return dict.fromkeys(_NAMES)
    return {name: 100 * float(np.mean([row[name] for row in rows])) for name in _NAMES}

  def _add_category(
    self,
    category: int,
    overlap: Overlap,
    true_kinds: Int[np.ndarray, " G"],
    found_kinds: Int[np.ndarray, " P"],
    taken: Bool[np.ndarray, "T P"],
    wrong: dict[int, Float[np.ndarray, "10"]],
  ) -> None:
    """Adds the objects of a category, and to `wrong` the false positives of classification."""
    sums, rows = self._sums[category], np.flatnonzero(true_kinds == category)
    near = (overlap.iou[:, rows] >= NEAR).any(axis=1) & ~taken
    checked = near | (overlap.found & (found_kinds == category)[:, None]).T
    if not near.any():
      sums["loc_fn"] += overlap.truths[rows].sum()
      wrong[category] = np.full(len(THRESHOLDS) - _FIRST, float(checked.sum()))
      return
    used = np.flatnonzero(near.any(axis=0))
    own = overlap.select(rows.tolist(), used.tolist())
    near, kinds = near[:, used], found_kinds[used]
    together = np.zeros((len(THRESHOLDS), len(rows), len(used)))
    for t, matches in enumerate(match_frames(own)):
      if not own.truths[:, t].any():
        wrong[category] += checked[t].sum()
        continue
      wrong[category] += checked[t].sum() - near[t].sum()
      for k, threshold in enumerate(THRESHOLDS):
        close = matches.iou >= threshold - EPSILON
        truths, found = matches.truths[close], matches.found[close]
        together[k, truths, found] += 1
        sums["loc_tp"][k] += len(found)
        sums["loc_fn"][k] += own.truths[:, t].sum() - len(found)
        sums["loc_fp"][k] += np.delete(near[t], found).sum()
        if k >= _FIRST:
          right = kinds[found] == category
          sums["cls_tp"][k - _FIRST] += right.sum()
          sums["cls_fn"][k - _FIRST] += (~right).sum()
          for kind in kinds[found][~right].tolist():
            if kind in wrong:
              wrong[kind][k - _FIRST] += 1
    true_frames = own.truths.sum(axis=1)[:, None]
    found_frames = own.found.sum(axis=1)[None]
    for name, frames in (
      ("assoc", true_frames + found_frames - together),
      ("assoc_re", true_frames),
      ("assoc_pr", found_frames),
    ):
      sums[name] += (together**2 / np.maximum(1, frames)).sum(axis=(1, 2))


def _assign(overlap: Overlap) -> Int[np.ndarray, "T P"]:
  """Index of the object of any category to which each prediction is assigned; -1 for none."""
  assigned = np.full((len(overlap.iou), len(overlap.found)), -1)
  used = np.flatnonzero((overlap.iou >= NEAR).any(axis=(0, 1)))
  rows = list(range(len(overlap.truths)))
  matches: Matches
  for t, matches in enumerate(match_frames(overlap.select(rows, used.tolist()))):
    close = matches.iou >= NEAR - EPSILON
    assigned[t, used[matches.found[close]]] = matches.truths[close]
  return assigned


def _metrics(**sums: Float[np.ndarray, " t"]) -> dict[str, Float[np.ndarray, " t"]]:
  """The curves of a category; those of classification are means already."""
  found = {}
  for name, tp, fn, fp in (
    ("loc", sums["loc_tp"], sums["loc_fn"], sums["loc_fp"]),
    ("cls", sums["cls_tp"], sums["cls_fn"], sums["cls_fp"]),
  ):
    found[f"{name}a"] = tp / np.maximum(1, tp + fn + fp)
    found[f"{name}re"] = tp / np.maximum(1, tp + fn)
    found[f"{name}pr"] = tp / np.maximum(1, tp + fp)
  matched = np.maximum(1, sums["loc_tp"])
  found |= {
    "assoca": sums["assoc"] / matched,
    "assocre": sums["assoc_re"] / matched,
    "assocpr": sums["assoc_pr"] / matched,
  }
  found["teta"] = (found["loca"] + found["assoca"] + found["clsa"].mean()) / 3
  return found
