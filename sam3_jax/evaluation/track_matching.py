"""Matching of predicted with true objects in each frame, as HOTA and TETA do it.

Matches prefer pairs of tracks that agree over the whole video (Luiten et al. 2020, "HOTA: A Higher
Order Metric for Evaluating Multi-Object Tracking", arXiv:2009.07736, section 5): in each frame the
sum of similarity times alignment is maximal.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from sam3_jax.evaluation.track_overlap import Overlap

EPSILON = float(np.finfo(float).eps)  # a similarity that misses a threshold by it passes


class Matches(NamedTuple):
  """One-to-one matches of the objects of a frame.

  Attributes:
    truths: indices of true objects.
    found: index of the predicted object of each.
    iou: of each match, not yet compared with a threshold.
  """

  truths: Int[np.ndarray, " m"]
  found: Int[np.ndarray, " m"]
  iou: Float[np.ndarray, " m"]


def match_frames(overlap: Overlap) -> list[Matches]:
  """Matches the visible objects of each frame."""
  from scipy.optimize import linear_sum_assignment

  weights, frames = _alignment(overlap), []
  for t, iou in enumerate(overlap.iou):
    rows, columns = np.flatnonzero(overlap.truths[:, t]), np.flatnonzero(overlap.found[:, t])
    cells = np.ix_(rows, columns)
    first, second = linear_sum_assignment(-(weights[cells] * iou[cells]))
    rows, columns = rows[first], columns[second]
    frames.append(Matches(rows, columns, iou[rows, columns]))
  return frames


def _alignment(overlap: Overlap) -> Float[np.ndarray, "G P"]:
  """How well each pair of tracks agrees over the whole video, in [0, 1].

  The similarity of two objects in a frame counts relative to all similarities that one of them has.
  """
  iou = overlap.iou
  rivals = iou.sum(axis=1, keepdims=True) + iou.sum(axis=2, keepdims=True) - iou
  valid = rivals > EPSILON
  shared = np.where(valid, iou / np.where(valid, rivals, 1), 0).sum(axis=0, dtype=np.float64)
  frames = overlap.truths.sum(axis=1)[:, None] + overlap.found.sum(axis=1)[None]
  return shared / np.maximum(frames - shared, EPSILON)
