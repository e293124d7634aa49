"""Which earlier frames a tracked frame reads, as Meta's released tracker selects them.

All of this is per group of objects, on the host, from a few numbers a frame. A frame reads
conditioning frames (those with prompts) and previous frames (those tracked without prompts) that
the group's score calls good. "Previous" means the last entries of that selection, not the last
frames of the video. A pass may run backward; all frames below are then counted from the other end.
"""

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import Float

POINTERS = 16  # frames that selection and pointer times look at; a shorter video has fewer


def frame_score(object_logits: Float[np.ndarray, " n"], iou: Float[np.ndarray, " n"]) -> float:
  """How well a group was seen on a frame, in [0, 1].

  The mean over the objects of 2 sigmoid(logit) - 1, which is 0 for an absent object, times the mean
  of their estimated IoU. (Not the mean of the products: Meta's code broadcasts the two.)
  """
  logits = np.asarray(object_logits, np.float32)
  present = np.where(logits > 0, 2 / (1 + np.exp(-np.maximum(logits, 0))) - 1, 0)
  return float(present.mean(dtype=np.float32) * np.asarray(iou, np.float32).mean(dtype=np.float32))


def closest_conditioning(frames: Collection[int], frame: int, limit: int) -> list[int]:
  """The conditioning frames to read.

  Args:
    frames: all of them, in the order in which they were added.
    frame: the frame that reads.
    limit: reads at most N.

  Returns:
    All in their order if there are at most `limit`. Else the nearest earlier one, the nearest later
    one (or `frame` itself), then the nearest others, the first added of equally near ones.
  """
  if len(frames) <= limit:
    return list(frames)
  earlier, later = [t for t in frames if t < frame], [t for t in frames if t >= frame]
  chosen = [max(earlier)] if earlier else []
  chosen += [min(later)] if later else []
  others = sorted((t for t in frames if t not in chosen), key=lambda t: abs(t - frame))
  return chosen + others[: limit - len(chosen)]


def previous_frames(
  scores: Mapping[int, float],
  frame: int,
  *,
  length: int | None,
  min_score: float,
  reverse: bool = False,
) -> list[int]:
  """The previous frames to read, oldest first.

  Args:
    scores: of the frames tracked without prompts.
    frame: the frame that reads.
    length: frames of the video; None if unknown, which is taken for long.
    min_score: frames are kept if their score is above it.
    reverse: whether the pass runs backward.

  Returns:
    Nothing on the first frame of the direction. Else at most 15 kept frames (fewer in a video of
    less than 16), then the neighbor if it is not among them, whether it exists or not. Frame 0 is
    never kept.
  """
  if frame == (0 if not reverse else -1 if length is None else length - 1):
    return []
  neighbor = frame + 1 if reverse else frame - 1
  if reverse:
    last = max(scores, default=frame) if length is None else length - 1
    walk: Iterable[int] = range(neighbor, last + 1)
  else:
    walk = range(neighbor, 0, -1)
  limit, kept, left = pointer_span(length), [], len(scores)
  for t in walk:
    if len(kept) == limit or not left:
      break
    if (score := scores.get(t)) is not None:
      left -= 1
      if score > min_score:
        kept.append(t)
  kept.reverse()
  return kept if neighbor in kept else [*kept, neighbor]


def pointer_span(length: int | None) -> int:
  """The largest time of a pointer, by which times are divided, and the most frames kept."""
  return (POINTERS if length is None else min(length, POINTERS)) - 1


@dataclasses.dataclass(frozen=True)
class Reading:
  """What a group reads on a frame.

  Attributes:
    memories: frame, and row of the table of temporal codes, of each spatial memory, in order.
    pointers: frame, and time, of each object pointer, in order.
    selected: the previous frames, for tests and reports.
  """

  memories: Sequence[tuple[int, int]] = ()
  pointers: Sequence[tuple[int, float]] = ()
  selected: Sequence[int] = ()

  @property
  def frames(self) -> set[int]:
    """All frames whose memories or pointers are read."""
    return {frame for frame, _ in (*self.memories, *self.pointers)}


def plan_reading(
  conditioning: Sequence[int],
  previous: Sequence[int],
  stored: Collection[int],
  frame: int,
  *,
  memories: int,
  length: int | None,
  reverse: bool = False,
) -> Reading:
  """The memories and pointers to read, in the order of the tokens.

  Args:
    conditioning: from `closest_conditioning`.
    previous: from `previous_frames`.
    stored: frames tracked without prompts; any other one gives nothing.
    frame, length, reverse: as in `previous_frames`.
    memories: rows of the table of temporal codes: 1 for conditioning frames, which is the last one,
      and one for each previous frame, 0 for the latest.
  """
  spatial = [(t, memories - 1) for t in conditioning]
  latest = list(previous[-(memories - 1) :])
  spatial += [
    (t, age) for age, t in zip(range(len(latest) - 1, -1, -1), latest, strict=True) if t in stored
  ]
  sign = -1 if reverse else 1
  past = [(t, sign * (frame - t)) for t in conditioning if sign * (frame - t) >= 0]
  # The oldest selected frame gives a memory, but no pointer: Meta's loop ends one entry early.
  ranks = range(1, min(len(previous), pointer_span(length) + 1))
  past += [(previous[-rank], rank) for rank in ranks if previous[-rank] in stored]
  # A video of one frame divides nothing: its only pointers have time 0.
  span = max(1, pointer_span(length))
  return Reading(spatial, [(t, time / span) for t, time in past], tuple(previous))
