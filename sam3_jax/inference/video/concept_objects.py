"""The objects that a phrase finds in a video: what each frame's detections decide about them.

Everything here is on the host, from the scores of detections and the IoU of masks. The decisions
are those of Meta's code; `association` and `lifetimes` make them.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from sam3_jax.inference.video.association import (
  associate,
  far_from_border,
  pairwise_iou,
  suppress_overlaps,
)
from sam3_jax.inference.video.lifetimes import Lifetimes, hide_occluded, judge
from sam3_jax.rules import Rules

EMPTY_LOGIT = -10.0  # of all cells of a hidden object


class FrameDetections(NamedTuple):
  """What the detector finds of a concept on a frame, after non-maximum suppression.

  Attributes:
    scores: of the detections.
    boxes: xyxy, as fractions of the frame.
    mask_logits: on the decoder's grid.
  """

  scores: Float[np.ndarray, " Q"]
  boxes: Float[np.ndarray, "Q 4"]
  mask_logits: Float[np.ndarray, "Q Hm Wm"]

  def select(self, index: Bool[np.ndarray, " Q"]) -> "FrameDetections":
    return FrameDetections(*(x[index] for x in self))

  def kept(self, rules: Rules) -> "FrameDetections":
    """Those with a high score that no better one overlaps."""
    found = self.select(self.scores > rules.score_threshold_detection)
    if rules.det_nms_thresh:
      inside = found.mask_logits > 0
      found = found.select(
        suppress_overlaps(pairwise_iou(inside, inside), found.scores, rules.det_nms_thresh)
      )
    if rules.suppress_det_close_to_boundary:
      found = found.select(far_from_border(found.boxes))
    return found


@dataclasses.dataclass(frozen=True)
class Decision:
  """What happens on a frame.

  Attributes:
    new: the detection of each new object, by id.
    removed: ids of objects that are removed, on all frames that were held back, too.
    gone: ids of objects that are removed, but not on earlier frames.
    occluded: ids of objects whose mask becomes empty, as another one has nearly the same.
    hidden: ids of objects that are not shown on this frame.
    unconfirmed: ids of objects that were not detected often enough so far.
    reconditions: the detection that gives an object a new pointer, by id.
    refined: the detection whose mask an object gets, by id; see `Rules.trust_detections`.
    dropped: number of detections that would be new, but for which there is no room.
  """

  new: dict[int, int]
  removed: list[int]
  gone: list[int]
  occluded: list[int]
  hidden: list[int]
  unconfirmed: list[int]
  reconditions: dict[int, int]
  refined: dict[int, int]
  dropped: int


@dataclasses.dataclass
class ConceptObjects:
  """The objects of a concept, by ascending id.

  Attributes:
    ids: of the objects.
    lives: what decides how long they last, in the same order.
    scores: of the first detection of each object.
  """

  ids: list[int] = dataclasses.field(default_factory=list)
  lives: Lifetimes = dataclasses.field(default_factory=Lifetimes.none)
  scores: dict[int, float] = dataclasses.field(default_factory=dict)

  def decide(
    self,
    frame: int,
    detections: FrameDetections,
    mask_logits: Float[np.ndarray, "N Hm Wm"],
    object_logits: Float[np.ndarray, " N"],
    rules: Rules,
    *,
    first_id: int,
    room: int,
    reverse: bool = False,
    prompted: bool = True,
  ) -> Decision:
    """Decides what the detections of a frame mean for the objects, and counts it.

    Args:
      frame: its position.
      detections: from `FrameDetections.kept`.
      mask_logits, object_logits: of the objects, as tracked to this frame, without small holes.
      rules: thresholds.
      first_id: id of the first new object.
      room: number of objects that may be added.
      reverse: whether the pass runs backward.
      prompted: whether the detector had a prompt on this frame.
    """
    ids, inside = np.array(self.ids, np.int64), mask_logits > 0
    alive, empty = np.ones(len(ids), bool), ~inside.any(axis=(1, 2))
    iou = pairwise_iou(detections.mask_logits > 0, inside)
    found = associate(iou, detections.scores, empty, alive, room, rules)
    if rules.keep_unprompted and not prompted:
      found = found._replace(unmatched=np.zeros_like(found.unmatched))
    lives, verdict = judge(self.lives, found, alive, frame, reverse, rules)
    lives, occluded = hide_occluded(
      lives, pairwise_iou(inside, inside), empty, frame, reverse, rules
    )
    reconditions = found.reconditions >= 0
    every = rules.recondition_every_nth_frame
    if not every or frame % every:
      reconditions[:] = False
    reconditions &= object_logits > rules.recondition_min_logit
    new = np.flatnonzero(found.new)
    new = new[np.argsort(found.order[new], kind="stable")]
    self.lives = lives.added(frame, len(new), rules)
    self.ids += range(first_id, first_id + len(new))
    for identity, row in zip(self.ids[len(ids) :], new, strict=True):
      self.scores[identity] = float(detections.scores[row])
    removed, gone = ids[verdict.removed].tolist(), ids[verdict.gone].tolist()
    self.remove([*removed, *gone])
    confirmed = dict(zip(self.ids, self.lives.confirmed, strict=True))
    shown = rules.masklet_confirmation_enable
    return Decision(
      new=dict(zip(range(first_id, first_id + len(new)), new.tolist(), strict=True)),
      removed=removed,
      gone=gone,
      occluded=ids[occluded].tolist(),
      hidden=ids[verdict.hidden].tolist(),
      unconfirmed=[one for one, known in confirmed.items() if shown and not known],
      reconditions={int(ids[n]): int(found.reconditions[n]) for n in np.flatnonzero(reconditions)},
      refined=_best_matches(ids, iou, rules.trust_detections),
      dropped=int(found.dropped),
    )

  def remove(self, ids: Iterable[int]) -> None:
    """Removes objects for good."""
    gone = np.isin(np.array(self.ids, np.int64), list(ids))
    self.lives = self.lives.without(gone)
    for identity in np.array(self.ids, np.int64)[gone].tolist():
      self.ids.remove(identity)
      del self.scores[identity]


def replace_lost(objects: Sequence[ConceptObjects], decisions: Sequence[Decision]) -> None:
  """Removes objects for detections for which there is no room on a frame: those that were lost the
  longest, of any concept. Adds their ids to `gone` of the decisions, one for each concept."""
  missing = sum(one.dropped - len(one.removed) - len(one.gone) for one in decisions)
  lost = [
    (-int(frames), identity, n)
    for n, one in enumerate(objects)
    for identity, frames in zip(one.ids, one.lives.lost, strict=True)
    if frames
  ]
  for _, identity, n in sorted(lost)[: max(0, missing)]:
    objects[n].remove([identity])
    decisions[n].gone.append(identity)


def _best_matches(
  ids: Int[np.ndarray, " N"], iou: Float[np.ndarray, "Q N"], threshold: float
) -> dict[int, int]:
  """The detection of each object, by id, where both match each other best and well enough."""
  if not threshold or not iou.size:
    return {}
  rows, columns = iou.argmax(axis=0), iou.argmax(axis=1)
  return {
    int(identity): int(rows[n])
    for n, identity in enumerate(ids)
    if columns[rows[n]] == n and iou[rows[n], n] >= threshold
  }
