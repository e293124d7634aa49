"""Prompts on video frames: what an object gets from points, a box or a mask, before its memory.

Points and boxes are decoded as on still images, with the object's mask on that frame as a mask
prompt. A mask gives its object pointer through the decoder, but the mask that is shown and
remembered is the given one, without the pixels of masks that were added later on the frame.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from sam3_jax.inference.video.functions import ABSENT_LOGIT
from sam3_jax.inputs.visual_prompts import CORNERS, MASK_LIMIT, PADDING, VisualPrompt
from sam3_jax.ops.bilinear import matrix
from sam3_jax.types import VisualPrompts

MASK_LOGIT = 10.0  # object logit of a mask prompt: plus with any pixel, minus without
MASK_IOU = 1.0


@dataclasses.dataclass
class Answer:
  """What a prompt gives an object on its frame.

  Attributes:
    pointer: the object pointer.
    object_logit: positive if the object is on the frame.
    iou: the estimated IoU of the mask.
    logits: low-resolution mask logits; None for a mask prompt.
    shown: the mask over the frame of a mask prompt; None for other prompts.
  """

  pointer: Float[np.ndarray, " D"]
  object_logit: float
  iou: float
  logits: Float[np.ndarray, "Hm Wm"] | None = None
  shown: Bool[np.ndarray, "h w"] | None = None

  def mask_logits(self, side: int) -> Float[np.ndarray, "Hm Wm"]:
    """Low-resolution mask logits, `side` cells per side."""
    if self.shown is None:
      return np.asarray(self.logits, np.float32)
    ends = np.where(self.shown, np.float32(-ABSENT_LOGIT), np.float32(ABSENT_LOGIT))
    return resize_mask(ends, (side, side))


def mask_answer(
  pointer: Float[np.ndarray, " D"], mask: Bool[np.ndarray, "h w"], present: bool
) -> Answer:
  """The answer to a mask prompt; `present` is whether the mask has a pixel at the model's size."""
  return Answer(pointer, MASK_LOGIT if present else -MASK_LOGIT, MASK_IOU, shown=mask)


def give_way(answers: Sequence[Answer], mask: Bool[np.ndarray, "h w"]) -> None:
  """Removes the pixels of a mask from masks that were added before it on the same frame."""
  for answer in answers:
    if answer.shown is not None:
      answer.shown = answer.shown & ~mask


def resize_mask(
  mask: Float[np.ndarray, "h w"], size: tuple[int, int]
) -> Float[np.ndarray, "h2 w2"]:
  """Bilinear resize on the host with antialiasing, as PyTorch's up to rounding."""
  from scipy import sparse  # not at the top: it is slow to import

  mask = np.asarray(mask, np.float32)
  if mask.shape == size:
    return mask
  down, across = (
    sparse.csr_array(matrix(old, new, antialias=True))
    for old, new in zip(mask.shape, size, strict=True)
  )
  return np.ascontiguousarray(down @ (across @ mask.T).T, np.float32)


def pack_points(
  prompt: VisualPrompt,
  size: tuple[int, int],
  earlier: Float[np.ndarray, "Hm Wm"] | None,
  *,
  mask_size: int,
  max_points: int,
) -> VisualPrompts:
  """Packs the prompt of one object; always with a mask, so that there is a single program.

  Args:
    prompt: checked with `check_visual`; a mask of its own goes before `earlier`.
    size: height and width of the frame.
    earlier: the mask logits of the object on this frame, if it has any.
    mask_size: side of the grid of mask logits.
    max_points: points and corners that are read; of more, the first and the last half.
  """
  height, width = size
  corners = () if prompt.box is None else (prompt.box[:2], prompt.box[2:])
  points = [*corners, *prompt.points]
  labels = [*CORNERS[: len(corners)], *prompt.point_labels]
  if len(points) > max_points:
    half = max_points // 2
    points, labels = points[:half] + points[-half:], labels[:half] + labels[-half:]
  xy = np.zeros((1, max_points, 2), np.float32)
  marks = np.full((1, max_points), PADDING, np.int32)
  if points:
    xy[0, : len(points)] = np.asarray(points) / [width, height]
    marks[0, : len(points)] = labels
  mask: Any = prompt.mask if prompt.mask is not None else earlier
  logits = np.zeros((1, mask_size, mask_size), np.float32)
  if mask is not None:
    logits[0] = np.clip(mask, -MASK_LIMIT, MASK_LIMIT)
  arrays: Any = np.zeros(1, np.int32), xy, marks, logits, np.array([mask is not None])
  return VisualPrompts(*arrays)
