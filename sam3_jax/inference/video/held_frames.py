"""Frames that are held back until the fate of new objects is known."""

import dataclasses
from collections import deque
from collections.abc import Iterator

from sam3_jax.inference.video.results import ShownObject, shown_frame
from sam3_jax.outputs.tracked_frame import TrackedFrame
from sam3_jax.rules import Rules


@dataclasses.dataclass
class HeldFrame:
  """A tracked frame.

  Attributes:
    index, time: as in `TrackedFrame`.
    objects: that may be shown.
    new: ids of objects that were found on it.
    removed: ids of objects that it showed to be wrong.
    gone: ids of objects that end with it.
    unconfirmed: ids of objects that were not detected often enough so far.
  """

  index: int
  time: float
  objects: list[ShownObject] = dataclasses.field(default_factory=list)
  new: list[int] = dataclasses.field(default_factory=list)
  removed: list[int] = dataclasses.field(default_factory=list)
  gone: list[int] = dataclasses.field(default_factory=list)
  unconfirmed: list[int] = dataclasses.field(default_factory=list)


class HeldFrames:
  """The last frames of a pass, oldest first.

  Attributes:
    frames: those that were not shown yet.
    hidden: ids of objects that are not shown any more.
  """

  def __init__(self, size: tuple[int, int], rules: Rules):
    self.frames = deque[HeldFrame]()
    self.hidden: set[int] = set()
    self._size, self._rules = size, rules

  def add(self, frame: HeldFrame, hold: int) -> Iterator[TrackedFrame]:
    """Adds a frame; yields the oldest frames while more than max(0, hold - 1) are held."""
    self.frames.append(frame)
    self.hidden.update(frame.removed)
    while len(self.frames) > max(0, hold - 1):
      yield self._next()

  def rest(self) -> Iterator[TrackedFrame]:
    """Yields all frames that are left, at the end of a pass."""
    while self.frames:
      yield self._next()

  def _next(self) -> TrackedFrame:
    delay = self._rules.masklet_confirmation_consecutive_det_thresh - 1
    later = self.frames[min(delay, len(self.frames) - 1)]
    hidden = {*self.hidden, *later.unconfirmed}
    frame = self.frames.popleft()
    objects = [one for one in frame.objects if one.identity not in hidden]
    return shown_frame(frame.index, frame.time, self._size, objects)
