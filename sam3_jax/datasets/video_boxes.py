"""Boxes of an object in each frame of a video, in files of annotations and of predictions."""

from collections.abc import Sequence
from typing import Any

from sam3_jax.outputs.rle import Box, Rle, bounds
from sam3_jax.utils.json_text import shown
from sam3_jax.utils.validation import are_finite


def read_boxes(bboxes: Any, rles: Sequence[Rle | None], what: str) -> tuple[Box | None, ...]:
  """Validates the boxes of an object, one for each frame.

  Args:
    bboxes: a list of x, y, width, height in pixels for each frame; null, or zeros only, where the
      object is not visible. None for the bounding boxes of the masks.
    rles: the masks of the object; None where it is not visible.
    what: the name of the object in messages.

  Returns:
    The boxes; None where there is no mask.

  Raises:
    ValueError: there is another number of boxes than of frames, a box is invalid, or a frame has a
      mask and no box.
  """
  if bboxes is None:
    return tuple(None if rle is None else bounds(rle) for rle in rles)
  if not isinstance(bboxes, list) or len(bboxes) != len(rles):
    got = len(bboxes) if isinstance(bboxes, list) else shown(bboxes, 40)
    raise ValueError(
      f"{what}: bboxes must be a list with a box or null for each of {len(rles)} frames; got {got}"
    )
  return tuple(
    None if rle is None else _box(box, f"{what}, frame {t}")
    for t, (box, rle) in enumerate(zip(bboxes, rles, strict=True))
  )


def _box(box: Any, what: str) -> Box:
  if box is None or box == [0, 0, 0, 0]:
    raise ValueError(f"{what}: it has a mask, but its box is {shown(box, 20)}")
  if not isinstance(box, list) or len(box) != 4 or not are_finite(box) or min(box[2:]) < 0:
    raise ValueError(
      f"{what}: a box must be x, y, width, height in pixels, none of the sides negative; got "
      f"{shown(box, 60)}"
    )
  x, y, w, h = (float(value) for value in box)
  return x, y, w, h
