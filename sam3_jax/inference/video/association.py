"""Which detections of a frame are tracked objects, and which are new ones.

Pure functions of fixed shapes, for NumPy on the host and, with `xp=jax.numpy`, inside `jax.jit`.
Q is the number of detections, N that of objects; rows that are not used are marked as such. The
rules are Meta's.
"""

from typing import Any, NamedTuple

import numpy as np

from sam3_jax.rules import Rules

BORDER = 0.025  # share of the frame at each side in which a detection's center is near the border


class Association(NamedTuple):
  """How the detections of a frame and the tracked objects belong together.

  Attributes:
    matched: bool [Q, N], whether a detection and an object match; many to many.
    new: bool [Q], detections that become objects.
    order: int [Q], the position of a new detection among the new ones, which orders their ids.
    dropped: number of detections that would be new, but for which there is no room.
    unmatched: bool [N], visible objects that no detection confirms.
    empty: bool [N], objects without a mask on this frame.
    reconditions: int [N], the detection that may recondition the object; -1 for none.
  """

  matched: Any
  new: Any
  order: Any
  dropped: Any
  unmatched: Any
  empty: Any
  reconditions: Any


def pairwise_iou(first: Any, second: Any, xp: Any = np) -> Any:
  """IoU of each mask with each of others, float32 [n, m]; 0 if both are empty.

  Args:
    first, second: bool [n, h, w] and [m, h, w].
    xp: NumPy or jax.numpy.
  """
  a, b = (x.reshape(len(x), x.shape[1] * x.shape[2]) for x in (first, second))
  a, b = a.astype(xp.float32), b.astype(xp.float32)
  both = xp.matmul(a, b.T)
  union = a.sum(axis=1)[:, None] + b.sum(axis=1)[None] - both
  return both / xp.maximum(union, 1)


def suppress_overlaps(iou: Any, scores: Any, threshold: float, xp: Any = np) -> Any:
  """Non-maximum suppression: bool [Q], the detections that no better, kept one overlaps.

  Args:
    iou: float [Q, Q] of their masks.
    scores: float [Q]; of equal ones the first is the better. Rows with a score of at most 0 are not
      kept.
    threshold: IoU above which two overlap.
    xp: NumPy or jax.numpy.
  """
  order = xp.argsort(-scores, stable=True)
  overlaps = (iou > threshold)[order][:, order] & (
    xp.arange(len(scores))[:, None] < xp.arange(len(scores))[None]
  )

  def step(i: Any, kept: Any) -> Any:
    return kept & ~(overlaps[i] & kept[i])

  kept = _loop(len(scores), step, scores[order] > 0, xp)
  return kept[xp.argsort(order)]


def far_from_border(boxes: Any, xp: Any = np) -> Any:
  """bool [Q], whether the center of a box (xyxy, in fractions) is far from the border."""
  center = (boxes[:, :2] + boxes[:, 2:]) / 2
  return ((center > BORDER) & (center < 1 - BORDER)).all(axis=1)


def associate(
  iou: Any, scores: Any, empty: Any, alive: Any, room: Any, rules: Rules, xp: Any = np
) -> Association:
  """Matches the detections of a frame with the tracked objects.

  Args:
    iou: float [Q, N] of detections and objects.
    scores: float [Q]; rows with a score of at most 0 are not detections.
    empty: bool [N], objects without a mask.
    alive: bool [N], rows that are objects.
    room: number of objects that may still be added.
    rules: thresholds.
    xp: NumPy or jax.numpy.
  """
  detected = scores > 0
  iou = xp.where(detected[:, None] & alive[None], iou, 0.0)
  matched = (iou >= rules.assoc_iou_thresh) & detected[:, None] & alive[None]
  confirmed = _confirmed(iou, rules, xp) & alive
  unmatched = alive & ~empty & ~confirmed
  fresh = detected & (~alive.any() | ((scores >= rules.new_det_thresh) & ~matched.any(axis=1)))
  # Ids follow the order of the queries, or that of the scores where there is not room for all.
  rank = _descending(xp.where(fresh, scores, -1.0), xp)
  new = fresh & (rank < room)
  full = fresh.sum() > room
  order = xp.where(full, rank, xp.cumsum(fresh) - 1)
  reconditions = xp.full(len(alive), -1)
  if iou.size:
    sure = detected & ~fresh & (scores >= rules.high_conf_thresh)
    sure &= iou.max(axis=1) >= rules.high_iou_thresh
    best = iou.argmax(axis=1)[:, None] == xp.arange(len(alive))[None]
    rows = xp.where(sure[:, None] & best, xp.arange(len(scores))[:, None], -1)
    reconditions = rows.max(axis=0)
  return Association(
    matched, new, order, fresh.sum() - new.sum(), unmatched, alive & empty, reconditions
  )


def _confirmed(iou: Any, rules: Rules, xp: Any) -> Any:
  """bool [N], objects that a detection overlaps enough."""
  if not iou.size:
    return xp.zeros(iou.shape[1], bool)
  if not rules.o2o_matching_masklets_enable:
    return (iou >= rules.trk_assoc_iou_thresh).any(axis=0)
  if xp is np:
    from scipy.optimize import linear_sum_assignment  # not at the top: it is slow to import

    rows, columns = linear_sum_assignment(1 - iou)
  else:
    from optax.assignment import hungarian_algorithm

    rows, columns = hungarian_algorithm(1 - iou)
  found = iou[rows, columns] >= rules.trk_assoc_iou_thresh
  return (found[:, None] & (columns[:, None] == xp.arange(iou.shape[1])[None])).any(axis=0)


def _descending(values: Any, xp: Any) -> Any:
  """The position of each value in descending order; of equal ones, the last is the first."""
  return xp.argsort(xp.argsort(values, stable=True)[::-1])


def _loop(count: int, step: Any, value: Any, xp: Any) -> Any:
  if xp is not np:
    import jax

    return jax.lax.fori_loop(0, count, step, value)
  for i in range(count):
    value = step(i, value)
  return value
