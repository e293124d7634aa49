"""Whether boxes are the boxes of their masks, and what they look like if they are not.

Fields that are each in order may contradict each other: a box given by its corners, in fractions,
or of another object is four sound numbers, and would become the target of training.
"""

import numpy as np
from jaxtyping import Bool, Float

from sam3_jax.ops.boxes import iou

SLACK = 2.0  # pixels by which a side of a box may be off: tools round, and count from 0 or from 1
SHARE = 0.02  # likewise, as a share of the longer side of the mask: files of resized images
LEAST = 0.5  # IoU of box and mask's bounds below which they are of different things

Boxes = Float[np.ndarray, "n 4"]  # x, y, width, height in pixels


@np.errstate(over="ignore", invalid="ignore")  # of boxes of any size
def agree(boxes: Boxes, *bounds: Boxes) -> Bool[np.ndarray, " n"]:
  """Whether each box is one of the `bounds` that its mask has, up to rounding."""
  found = np.zeros(len(boxes), bool)
  for one in bounds:
    slack = np.maximum(SLACK, SHARE * one[:, 2:].max(axis=1, initial=0))
    found |= np.abs(_corners(boxes) - _corners(one)).max(axis=1, initial=0) <= slack
  return found


@np.errstate(over="ignore", invalid="ignore")
def overlaps(boxes: Boxes, bounds: Boxes) -> Float[np.ndarray, " n"]:
  """IoU of each box with the bounds of its mask; 0 for boxes without area."""
  return iou(_corners(boxes), _corners(bounds))


def describe(
  box: Float[np.ndarray, "4"], bounds: Float[np.ndarray, "4"], width: int, height: int
) -> str:
  """What a box that is not of its mask looks like, such as " (it looks like corners x0, y0, x1,
  y1)"; "" if like nothing known."""
  of_image, unit = "", box
  if box.max() <= 1:
    of_image, unit = " in fractions of the image", box * [width, height, width, height]
  a, b, c, d = unit
  readings = {
    "corners x0, y0, x1, y1": (a, b, c - a, d - b),
    "a centre, width and height": (a - c / 2, b - d / 2, c, d),
    "y, x, height, width": (b, a, d, c),
  }
  if of_image:
    readings = {"x, y, width, height": (a, b, c, d)} | readings
  for words, reading in readings.items():
    if agree(np.array([reading]), bounds[None])[0]:
      return f" (it looks like {words}{of_image})"
  return ""


def _corners(boxes: Boxes) -> Boxes:
  return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
