"""Identity switches: how often the track that follows a true object is replaced by another.

As in CLEAR MOT (Bernardin and Stiefelhagen 2008): in each frame, an object keeps its track if their
masks still overlap enough, and the other objects and tracks are matched so that the sum of IoUs is
maximal. A switch is counted when an object is matched with another track than the last time, also
if it was not matched in between.
"""

import numpy as np

from sam3_jax.evaluation.track_overlap import Overlap

NEAR = 0.5  # least IoU of a match
_KEPT = 2.0  # bonus of the track that an object had before, more than any IoU


def identity_switches(overlap: Overlap, threshold: float = NEAR) -> int:
  """Counts the switches of all true objects of a pair.

  Args:
    overlap: of the objects and the predictions that score high enough.
    threshold: least IoU of a match, inclusive.
  """
  from scipy.optimize import linear_sum_assignment

  last: dict[int, int] = {}
  switches = 0
  for iou in overlap.iou:
    gains = np.where(iou >= threshold, iou, 0)
    for row, column in last.items():
      if gains[row, column]:
        gains[row, column] += _KEPT
    rows, columns = linear_sum_assignment(gains, maximize=True)
    for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
      if gains[row, column]:
        switches += last.get(row, column) != column
        last[row] = column
  return switches
