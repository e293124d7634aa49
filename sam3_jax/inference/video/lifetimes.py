"""How long an object lasts: which new objects are removed, and which ones are hidden for a while.

Pure functions of fixed shapes, for NumPy on the host and, with `xp=jax.numpy`, inside `jax.jit`.
The rules are Meta's.
"""

from typing import Any, NamedTuple

import numpy as np

from sam3_jax.inference.video.association import Association
from sam3_jax.rules import Rules

NEVER = -1  # the frame on which an object that was always visible was last occluded


class Lifetimes(NamedTuple):
  """What decides how long objects last, for N objects by ascending id.

  Attributes:
    first_frame: on which the object was detected first.
    unmatched: frames on which no detection confirmed it.
    keep_alive: its count; see `Rules.init_trk_keep_alive`.
    last_occluded: the last frame on which it had no mask or was hidden; -1 for never.
    detected: frames in a row on which it was detected.
    confirmed: whether it was ever detected often enough in a row.
    lost: frames in a row on which it had no mask or was unmatched.
    duplicates: int [N, N], how often the second object was a duplicate of the first one.
    duplicates_of_removed: likewise, the largest number for any removed object.
  """

  first_frame: Any
  unmatched: Any
  keep_alive: Any
  last_occluded: Any
  detected: Any
  confirmed: Any
  lost: Any
  duplicates: Any
  duplicates_of_removed: Any

  @classmethod
  def none(cls) -> "Lifetimes":
    """For no objects: arrays of length 0."""
    empty = np.zeros(0, np.int32)
    square = np.zeros((0, 0), np.int32)
    return cls(empty, empty, empty, empty, empty, np.zeros(0, bool), empty, square, empty)

  def added(self, frame: int, count: int, rules: Rules) -> "Lifetimes":
    """With objects that were found on a frame, at the end; NumPy only."""
    values = {
      "first_frame": frame, "keep_alive": rules.init_trk_keep_alive, "last_occluded": NEVER,
      "detected": 1, "confirmed": rules.masklet_confirmation_consecutive_det_thresh <= 1,
    }  # fmt: skip
    rows = {
      name: np.pad(x, (0, count), constant_values=values.get(name, 0))
      for name, x in self._asdict().items()
      if name != "duplicates"
    }
    return Lifetimes(**rows, duplicates=np.pad(self.duplicates, (0, count)))

  def without(self, removed: Any) -> "Lifetimes":
    """Without the objects of a bool [N]; NumPy only."""
    marks = self.duplicates[removed].max(axis=0, initial=0)
    kept, table = ~removed, self._asdict()
    table["duplicates_of_removed"] = np.maximum(self.duplicates_of_removed, marks)
    table = {name: x[kept] for name, x in table.items()}
    table["duplicates"] = table["duplicates"][:, kept]
    return Lifetimes(**table)


class Verdict(NamedTuple):
  """What happens to objects on a frame: bool [N] each.

  Attributes:
    removed: those that are removed, and hidden on all frames that were held back.
    hidden: those that are not shown on this frame, as no detection confirmed them for long.
    gone: those that are removed, but stay on earlier frames.
  """

  removed: Any
  hidden: Any
  gone: Any


def judge(
  lives: Lifetimes,
  found: Association,
  alive: Any,
  frame: Any,
  reverse: Any,
  rules: Rules,
  xp: Any = np,
) -> tuple[Lifetimes, Verdict]:
  """Counts what the detections of a frame say about each object, and removes wrong new objects.

  A new object is removed if it was unmatched, or a duplicate of an older one, on several frames
  soon after its first one. Any object is removed (`gone`) after `max_lost_frames` of the rules.
  `concept_objects.replace_lost` removes further ones if there is no room.

  Args:
    lives: of the objects.
    found: from `associate`.
    alive: bool [N], rows that are objects.
    frame, reverse: the frame, and whether the pass runs backward.
    rules: thresholds.
    xp: NumPy or jax.numpy.
  """
  matched = found.matched.any(axis=0)
  keep_alive = xp.where(
    matched, xp.minimum(lives.keep_alive + 1, rules.max_trk_keep_alive), lives.keep_alive
  )
  missed = found.unmatched
  if rules.decrease_trk_keep_alive_for_empty_masklets:
    missed = missed | found.empty
  keep_alive = xp.where(missed, xp.maximum(keep_alive - 1, rules.min_trk_keep_alive), keep_alive)
  unmatched = lives.unmatched + found.unmatched
  duplicates = lives.duplicates + _duplicates(lives.first_frame, found.matched, reverse, xp)
  recent = xp.where(
    reverse,
    lives.first_frame < frame + rules.hotstart_delay,
    lives.first_frame > frame - rules.hotstart_delay,
  )
  removed = unmatched >= rules.hotstart_unmatch_thresh
  worst = xp.maximum(duplicates.max(axis=0, initial=0), lives.duplicates_of_removed)
  removed = (removed | (worst >= rules.hotstart_dup_thresh)) & recent & alive
  hidden = xp.zeros_like(removed)
  if not rules.suppress_unmatched_only_within_hotstart:
    wrong = recent & (unmatched >= rules.hotstart_unmatch_thresh)
    hidden = (unmatched > 0) & (keep_alive <= 0) & ~wrong & alive
  detected = xp.where(matched, lives.detected + 1, 0)
  confirmed = lives.confirmed | (detected >= rules.masklet_confirmation_consecutive_det_thresh)
  lost = xp.where(found.unmatched | found.empty, lives.lost + 1, 0)
  gone = xp.zeros_like(removed)
  if rules.max_lost_frames:
    gone = lost >= rules.max_lost_frames
  lives = lives._replace(
    unmatched=unmatched, keep_alive=keep_alive, duplicates=duplicates, detected=detected,
    confirmed=confirmed, lost=lost,
  )  # fmt: skip
  return lives, Verdict(removed, hidden, gone & alive & ~removed)


def hide_occluded(
  lives: Lifetimes, iou: Any, empty: Any, frame: Any, reverse: Any, rules: Rules, xp: Any = np
) -> tuple[Lifetimes, Any]:
  """Hides one of two objects with nearly the same mask: the one that was occluded later in the
  direction of the pass, if the other one was ever occluded, too.

  In a backward pass, an object that was never occluded is hidden, too: its -1 counts as the latest.
  This is Meta's rule.

  Args:
    lives: of the objects.
    iou: float [N, N] of their masks.
    empty: bool [N], objects without a mask.
    frame, reverse: the frame, and whether the pass runs backward.
    rules: thresholds.
    xp: NumPy or jax.numpy.

  Returns:
    The lives, and bool [N], the objects to hide.
  """
  threshold = rules.suppress_overlapping_based_on_recent_occlusion_threshold
  last = lives.last_occluded
  if not threshold:
    return lives, xp.zeros(len(last), bool)
  overlaps = (iou >= threshold) & ~xp.eye(len(last), dtype=bool)
  mine, other = last[:, None], last[None]
  later = xp.where(reverse, mine < other, mine > other)
  hidden = (overlaps & later & (other > NEVER)).any(axis=1)
  return lives._replace(last_occluded=xp.where(hidden | empty, frame, last)), hidden


def _duplicates(first_frame: Any, matched: Any, reverse: Any, xp: Any) -> Any:
  """int32 [N, N], for how many detections the second object is a duplicate of the first one, which
  is the oldest object that the detection matches."""
  count = len(first_frame)
  if not matched.size:
    return xp.zeros((count, count), xp.int32)
  age = xp.where(reverse, -first_frame, first_frame)
  oldest = xp.where(matched, age[None], 2**30).argmin(axis=1)
  owner = (oldest[:, None] == xp.arange(count)[None]) & matched
  pairs = xp.matmul(owner.astype(xp.float32).T, (matched & ~owner).astype(xp.float32))
  return pairs.astype(xp.int32)
