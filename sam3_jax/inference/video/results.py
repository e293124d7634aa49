"""The results of a frame, from low-resolution logits."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from sam3_jax.inference.video.tracker import ObjectResult
from sam3_jax.ops.masks import mask_to_box
from sam3_jax.outputs.instances import Instances
from sam3_jax.outputs.label_masks import JoinedMasks, LabelMasks
from sam3_jax.outputs.masks import LazyMasks, Masks
from sam3_jax.outputs.tracked_frame import TrackedFrame


@dataclasses.dataclass(frozen=True)
class ShownObject:
  """An object on a frame.

  Attributes:
    identity: its id.
    result: its mask, without small holes and islands.
    score: None for the probability that the object is on the frame.
    phrase: that found it.
    concept: the number of the concept that found it; the objects of a concept do not overlap. None
      for a clicked object.
  """

  identity: int
  result: ObjectResult
  score: float | None = None
  phrase: str | None = None
  concept: int | None = None

  @property
  def presence(self) -> float:
    """The probability that the object is on the frame."""
    return float(1 / (1 + np.exp(-np.float32(self.result.object_logit))))


def shown_frame(
  index: int, time: float, size: tuple[int, int], objects: Sequence[ShownObject]
) -> TrackedFrame:
  """The visible objects of a frame, by id.

  Boxes are those of the whole masks. Then each pixel that several objects of a concept have is left
  to the one that is on the frame with the highest probability, so a mask may end up empty.

  Args:
    index, time: of the frame.
    size: its height and width.
    objects: those that may be visible; absent ones, and those with an empty mask, are left out.
  """
  seen, boxes, pixels = [], [], []
  for one in sorted(objects, key=lambda one: one.identity):
    if one.concept is None and one.result.object_logit <= 0:
      continue
    mask = Masks(one.result.mask_logits[None], size)[0]
    box = mask_to_box(mask)
    if box[2]:
      seen.append(one)
      boxes.append(box)
      pixels.append(mask)
  phrases = tuple(one.phrase for one in seen)
  instances = Instances(
    ids=np.array([one.identity for one in seen], np.int64),
    scores=np.array([one.presence if one.score is None else one.score for one in seen], np.float32),
    boxes=np.array(boxes, np.float32).reshape(-1, 4),
    masks=_masks(seen, pixels, size),
  )
  return TrackedFrame(index, time, size, instances, phrases if any(phrases) else ())


def _masks(
  seen: Sequence[ShownObject], pixels: Sequence[np.ndarray], size: tuple[int, int]
) -> LazyMasks:
  concepts = {one.concept for one in seen} - {None}
  if not concepts:
    side = seen[0].result.mask_logits.shape if seen else (1, 1)
    logits = [one.result.mask_logits for one in seen]
    return Masks(np.array(logits, np.float32).reshape(-1, *side), size)
  parts: list[LazyMasks] = [Masks(one.result.mask_logits[None], size) for one in seen]
  for concept in concepts:
    labels = np.zeros(size, np.int16)
    mine = [i for i, one in enumerate(seen) if one.concept == concept]
    # The most probable one is drawn last; of equal ones, the first.
    for i in sorted(mine, key=lambda i: (round(seen[i].presence, 6), -i)):
      labels[pixels[i]] = 1 + i
    for i in mine:
      parts[i] = LabelMasks(labels, [1 + i])
  return JoinedMasks(parts, size)
