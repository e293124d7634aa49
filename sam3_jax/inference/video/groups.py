"""Groups of objects: what the tracker knows of each frame, without the arrays.

Objects that start on one frame with masks form a group, for life. They share the score of a frame,
the conditioning frames, and so the frames that are read. Each clicked object is a group of its own.
"""

import copy
import dataclasses
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float

from sam3_jax.inference.video.selection import frame_score

NEIGHBORHOOD = 7  # frames to both sides of a prompt whose masks no later correction sees


@dataclasses.dataclass(eq=False)
class FrameRecord:
  """The numbers of a group on one frame.

  Attributes:
    object_logits: whether each object is there at all; positive for present.
    iou: the estimated IoU of each object's mask.
  """

  object_logits: Float[np.ndarray, " n"]
  iou: Float[np.ndarray, " n"]

  def without(self, member: int) -> "FrameRecord":
    """The record without one object."""
    return FrameRecord(np.delete(self.object_logits, member), np.delete(self.iou, member))


@dataclasses.dataclass(eq=False)
class Group:
  """Objects that are tracked together.

  Attributes:
    objects: their ids, in the order in which they were added.
    prompted: for each object, the frames on which it was prompted.
    conditioning: records of frames on which an object was prompted, in the order of the prompts.
    previous: records of frames that were tracked without prompts.
    scores: of these frames.
    backward: for each frame that a pass went over, whether the pass ran backward.
    unseen: frames of `previous` whose masks corrections do not see (see `hide_around`).
    rows: for each frame in the bank, its row.
  """

  objects: list[int] = dataclasses.field(default_factory=list)
  prompted: dict[int, set[int]] = dataclasses.field(default_factory=dict)
  conditioning: dict[int, FrameRecord] = dataclasses.field(default_factory=dict)
  previous: dict[int, FrameRecord] = dataclasses.field(default_factory=dict)
  scores: dict[int, float] = dataclasses.field(default_factory=dict)
  backward: dict[int, bool] = dataclasses.field(default_factory=dict)
  unseen: set[int] = dataclasses.field(default_factory=set)
  rows: dict[int, int] = dataclasses.field(default_factory=dict)

  def record(self, frame: int) -> FrameRecord | None:
    """The record of a frame, of either kind."""
    return self.conditioning.get(frame) or self.previous.get(frame)

  def condition(self, frame: int, record: FrameRecord) -> None:
    """Makes a frame a conditioning frame; a repeated one keeps its place in the order."""
    self.conditioning[frame] = record
    self.previous.pop(frame, None)
    self.scores.pop(frame, None)
    self.hide_around(frame)

  def track(self, frame: int, record: FrameRecord, backward: bool) -> None:
    """Stores the record of a frame that was tracked without prompts, and its score."""
    self.scores[frame] = frame_score(record.object_logits, record.iou)
    self.previous[frame], self.backward[frame] = record, backward
    self.unseen.discard(frame)

  def pass_over(self, frame: int, backward: bool) -> None:
    """Notes that a pass went over a conditioning frame."""
    self.backward[frame] = backward
    self.hide_around(frame)

  def hide_around(self, frame: int) -> None:
    """Hides the tracked masks around a prompt from later corrections, in groups of one object.

    Meta's `clear_non_cond_mem_around_input` is meant to clear their memories, too, but does not.
    """
    if len(self.objects) == 1:
      near = range(frame - NEIGHBORHOOD, frame + NEIGHBORHOOD + 1)
      self.unseen.update(t for t in near if t in self.previous)

  def sees(self, frame: int) -> bool:
    """Whether a correction on this frame starts from the mask that the object has there."""
    return frame in self.conditioning or (frame in self.previous and frame not in self.unseen)

  def drop(self, frame: int) -> None:
    """Forgets a previous frame."""
    for table in (self.previous, self.scores, self.backward, self.rows):
      table.pop(frame, None)
    self.unseen.discard(frame)

  def forget(self, frame: int) -> None:
    """Forgets a conditioning frame."""
    for table in (self.conditioning, self.backward, self.rows):
      table.pop(frame, None)
    for frames in self.prompted.values():
      frames.discard(frame)

  def remove(self, identity: int) -> None:
    """Removes an object. Scores become those of the others; a conditioning frame on which only this
    object was prompted becomes a previous frame, with a score."""
    member = self.objects.index(identity)
    self.objects.pop(member)
    self.prompted.pop(identity)
    records = {t: record.without(member) for t, record in self.conditioning.items()}
    kept = set().union(*self.prompted.values())
    self.conditioning = {t: record for t, record in records.items() if t in kept}
    self.previous = {t: record.without(member) for t, record in self.previous.items()}
    for frame, record in records.items():
      if frame not in kept:
        self.previous[frame] = record
        self.backward.pop(frame, None)
    if self.objects:
      self.scores = {t: frame_score(x.object_logits, x.iou) for t, x in self.previous.items()}

  def split(self, identity: int) -> "Group":
    """Moves an object to a group of its own, with all that is known of it; returns that group."""
    alone = copy.deepcopy(self)
    for other in self.objects:
      if other != identity:
        alone.remove(other)
    self.remove(identity)
    return alone


def memberships(groups: list[Group]) -> Iterator[tuple[Group, int, int]]:
  """Each object: its group, its position in the group, and its id."""
  for group in groups:
    for member, identity in enumerate(group.objects):
      yield group, member, identity
