"""Checks that boxes agree with their masks, and recognizes common mistakes.

Valid fields may contradict each other: a box given by its corners, in fractions, or of another
object consists of four valid numbers, and would become a training target.
"""

import numpy as np
from jaxtyping import Bool, Float

from sam3_jax.ops.boxes import iou

SLACK = 2.0  # tolerance of a box in pixels: tools round, and count from 0 or from 1
RELATIVE_SLACK = 0.02  # tolerance as a fraction of the mask's longer side, for resized images
MIN_IOU = 0.5  # of the box and the bounds of the mask; below, they belong to different objects

Boxes = Float[np.ndarray, "n 4"]  # x, y, width, height in pixels


@np.errstate(over="ignore", invalid="ignore")  # of boxes of any size
def agree(boxes: Boxes, *bounds: Boxes) -> Bool[np.ndarray, " n"]:
  """Whether each box equals one of the `bounds` of its mask, up to rounding."""
  found = np.zeros(len(boxes), bool)
  for one in bounds:
    slack = np.maximum(SLACK, RELATIVE_SLACK * one[:, 2:].max(axis=1, initial=0))
    found |= np.abs(_corners(boxes) - _corners(one)).max(axis=1, initial=0) <= slack
  return found


@np.errstate(over="ignore", invalid="ignore")
def overlaps(boxes: Boxes, bounds: Boxes) -> Float[np.ndarray, " n"]:
  """IoU of each box with the bounds of its mask; 0 for boxes without area."""
  return iou(_corners(boxes), _corners(bounds))


def describe(
  box: Float[np.ndarray, "4"], bounds: Float[np.ndarray, "4"], width: int, height: int
) -> str:
  """Describes the likely mistake of a box that differs from the bounds of its mask.

  Returns:
    Text such as " (it looks like corners x0, y0, x1, y1)"; "" if no known mistake fits.
  """
  of_image, unit = "", box
  if box.max() <= 1:
    of_image, unit = " in fractions of the image", box * [width, height, width, height]
  a, b, c, d = unit
  formats = {
    "corners x0, y0, x1, y1": (a, b, c - a, d - b),
    "a center, width and height": (a - c / 2, b - d / 2, c, d),
    "y, x, height, width": (b, a, d, c),
  }
  if of_image:
    formats = {"x, y, width, height": (a, b, c, d)} | formats
  for name, candidate in formats.items():
    if agree(np.array([candidate]), bounds[None])[0]:
      return f" (it looks like {name}{of_image})"
  return ""


def _corners(boxes: Boxes) -> Boxes:
  return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
