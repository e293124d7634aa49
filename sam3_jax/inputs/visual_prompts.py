"""Visual prompts: what a user may ask, checked, and packed into the head's padded arrays."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from sam3_jax.inputs.prompts import are_fractions, as_box, as_labels, check_box, numbers, rows_of
from sam3_jax.types import VisualPrompts
from sam3_jax.utils.validation import as_array, is_number, shown

POINT_SIZES = (3, 16, 64)  # points of a prompt, a box being two, are padded to one of these
MOST_POINTS = POINT_SIZES[-1] - 2
MASK_LIMIT = 32.0  # of the logits of a mask that is asked with, as Meta's predictor has it
PADDING, CORNERS = -1, (2, 3)  # labels


@dataclasses.dataclass(frozen=True, eq=False)
class VisualPrompt:
  """Points, a box, an earlier mask, or several of them: "this one object".

  Attributes:
    points: x, y of each point, in pixels of the source image as displayed (EXIF orientation
      applied); at most 62.
    point_labels: 1 for a point on the object, 0 for one off it, one a point; None for all 1.
    box: x0, y0, x1, y1 in the same pixels, with an area; it may reach beyond the image.
    mask: [Hm, Wm] logits of an earlier `decode_visual`, `found.mask_logits[prompt, k]`.

  Raises:
    ValueError: neither points nor a box nor a mask, or they or the labels are faulty.
  """

  points: Any = None
  point_labels: Any = None
  box: Any = None
  mask: Any = None

  def __post_init__(self):
    points = as_points(self.points)
    if len(points) > MOST_POINTS:
      raise ValueError(f"a visual prompt takes at most {MOST_POINTS} points; got {len(points)}.")
    if not points and self.box is None and self.mask is None:
      raise ValueError(
        "a visual prompt needs points, a box or a mask: VisualPrompt(points=[[x, y]]), "
        "VisualPrompt(box=[x0, y0, x1, y1])."
      )
    object.__setattr__(self, "points", points)
    object.__setattr__(self, "point_labels", as_point_labels(self.point_labels, len(points)))
    if self.box is not None:
      object.__setattr__(self, "box", _box(self.box))
    if self.mask is not None:
      object.__setattr__(self, "mask", _mask(self.mask))

  @property
  def slots(self) -> int:
    """Points and corners."""
    return len(self.points) + 2 * (self.box is not None)

  @property
  def leaves_doubt(self) -> bool:
    """Whether it may mean a part, a whole or a group: `multimask` has a reading of each."""
    return len(self.points) < 2 and self.box is None


class ComputedPrompt(VisualPrompt):
  """A visual prompt whose coordinates a program computed: they may lie within the first pixel,
  where those of a user are fractions by mistake."""


def visual_as_json(prompt: VisualPrompt) -> dict[str, Any]:
  """A prompt as plain values, without its mask."""
  return {
    "points": [list(point) for point in prompt.points],
    "point_labels": list(prompt.point_labels),
    "box": prompt.box and list(prompt.box),
  }


def as_visual_prompts(prompts: Any) -> list[VisualPrompt]:
  """One or several visual prompts as a list; raises where there is none, or something else."""
  rows = None if isinstance(prompts, VisualPrompt | None) else rows_of(prompts)
  found: list[Any] = [prompts] if rows is None else rows
  if not found:
    raise ValueError("no prompt given; pass a VisualPrompt or a list of them.")
  for prompt in found:
    if not isinstance(prompt, VisualPrompt):
      raise TypeError(
        f"pass a VisualPrompt or a list of them; got {shown(prompt)}. Phrases and example boxes "
        "(Prompt) are for decode."
      )
  return found


def check_visual(
  prompt: VisualPrompt, height: int, width: int, mask_size: int | None = None
) -> None:
  """Raises ValueError unless each point lies in the image of this size (its edges included), the
  box touches it, and the mask is of the decoder's grid."""
  computed = isinstance(prompt, ComputedPrompt)
  places = [value for point in prompt.points for value in point]
  if not computed and are_fractions(places, height, width) and any(value % 1 for value in places):
    raise ValueError(
      f"points {[list(point) for point in prompt.points]!s:.60} lie within the first pixel of the "
      f"{width} x {height} image: points are x, y in its pixels; multiply fractions by width and "
      "height."
    )
  for x, y in prompt.points:
    if not (0 <= x <= width and 0 <= y <= height):
      raise ValueError(
        f"point [{x:g}, {y:g}] lies outside the {width} x {height} image; points are x, y in "
        "its pixels."
      )
  if prompt.box is not None:
    check_box(prompt.box, height, width, fractions=computed)
  if prompt.mask is not None and mask_size and prompt.mask.shape != (mask_size, mask_size):
    raise ValueError(
      f"mask must be the [{mask_size}, {mask_size}] logits of an earlier decode_visual, "
      f"found.mask_logits[prompt, k]; got shape {list(prompt.mask.shape)}."
    )


def pack_visual(prompts: Sequence[VisualPrompt], sizes: np.ndarray, image: Any) -> VisualPrompts:
  """Visual prompts as NumPy arrays, their points as fractions, padded to one of `POINT_SIZES`.

  Args:
    prompts: checked against their images.
    sizes: height and width of each prompt's image, [P, 2].
    image: row of the embedding, a prompt.
  """
  slots = padded_slots(max(prompt.slots for prompt in prompts))
  xy = np.zeros((len(prompts), slots, 2), np.float32)
  labels = np.full((len(prompts), slots), PADDING, np.int32)
  for i, (prompt, (height, width)) in enumerate(zip(prompts, sizes, strict=True)):
    corners = () if prompt.box is None else (prompt.box[:2], prompt.box[2:])
    places = [*corners, *prompt.points]
    if places:
      xy[i, : len(places)] = np.asarray(places) / [width, height]
      labels[i, : len(places)] = [*CORNERS[: len(corners)], *prompt.point_labels]
  masks = [prompt.mask for prompt in prompts]
  there = np.array([mask is not None for mask in masks])
  arrays: dict[str, Any] = {"image": image, "xy": xy, "labels": labels}
  if there.any():
    shape = next(mask.shape for mask in masks if mask is not None)
    stacked = np.stack([np.zeros(shape, np.float32) if mask is None else mask for mask in masks])
    arrays |= {"mask": np.clip(stacked, -MASK_LIMIT, MASK_LIMIT), "has_mask": there}
  return VisualPrompts(**arrays)


def padded_slots(slots: int) -> int:
  """The first of `POINT_SIZES` that holds so many."""
  return next(size for size in POINT_SIZES if size >= slots)


def as_points(points: Any) -> tuple[tuple[float, float], ...]:
  """Any number of points as pairs; raises ValueError of a faulty one."""
  rows = [points] if is_number(points) else rows_of(points)
  if rows is None:
    raise ValueError(f"points must be a list of x, y in pixels; got {shown(points)}.")
  return tuple(_point(row, i) for i, row in enumerate(rows))


def _point(row: Any, i: int) -> tuple[float, float]:
  point = numbers(row, 2)
  if point is None:
    raise ValueError(
      f"point {i} must be two numbers x, y in pixels; got {shown(row)}. points is [[x, y], ..]."
    )
  x, y = point
  if not (math.isfinite(x) and math.isfinite(y)):
    raise ValueError(f"point {i} must be finite; got {[x, y]}.")
  return x, y


def as_point_labels(labels: Any, count: int) -> tuple[int, ...]:
  """A label for each of so many points; raises ValueError of faulty ones."""
  return as_labels(labels, count, "point", "1 (on the object) or 0 (off it)")


def _box(box: Any) -> tuple[float, ...]:
  x0, y0, x1, y1 = box = as_box(box, "the box")
  if x0 == x1 or y0 == y1:
    raise ValueError(
      f"the box {list(box)} has no area, so nothing is in it; for a click give points=[[x, y]]."
    )
  return box


def _mask(mask: Any) -> Float[np.ndarray, "Hm Wm"]:
  array = as_array(mask)
  if array.ndim != 2 or array.dtype.kind not in "fV":  # V: bfloat16
    raise ValueError(
      "mask must be [Hm, Wm] logits of an earlier decode_visual, found.mask_logits[prompt, k]; "
      f"got {array.dtype} of shape {list(array.shape)}."
    )
  array = array.astype(np.float32)
  if not np.isfinite(array).all():
    raise ValueError("mask holds values that are not finite; pass the logits as they were.")
  return array
