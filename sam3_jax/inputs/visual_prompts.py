"""Visual prompts: points, boxes and masks, validated and packed into padded arrays."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from sam3_jax.inputs.prompts import are_fractions, as_box, as_labels, check_box, numbers, rows_of
from sam3_jax.types import VisualPrompts
from sam3_jax.utils.json_text import shown
from sam3_jax.utils.validation import as_array, is_number

POINT_SIZES = (3, 16, 64)  # points of a prompt are padded to one of these; a box counts as two
MAX_POINTS = POINT_SIZES[-1] - 2
MASK_LIMIT = 32.0  # the logits of mask prompts are clipped to it, as in Meta's predictor
PADDING, CORNERS = -1, (2, 3)  # labels


@dataclasses.dataclass(frozen=True, eq=False)
class VisualPrompt:
  """A prompt for a single object: points, a box, an earlier mask, or a combination.

  Attributes:
    points: x, y of each point, in pixels of the source image as displayed (EXIF orientation
      applied); at most 62.
    point_labels: 1 for a point on the object, 0 for a point off it, for each point; None for all 1.
    box: x0, y0, x1, y1 in the same pixels, with an area; it may extend beyond the image.
    mask: [Hm, Wm] logits of an earlier `decode_visual`, `found.mask_logits[prompt, k]`.

  Raises:
    ValueError: there are neither points nor a box nor a mask, or an attribute is invalid.
  """

  points: Any = None
  point_labels: Any = None
  box: Any = None
  mask: Any = None

  def __post_init__(self):
    points = as_points(self.points)
    if len(points) > MAX_POINTS:
      raise ValueError(f"a visual prompt takes at most {MAX_POINTS} points; got {len(points)}.")
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
    """Number of points, including two corners for a box."""
    return len(self.points) + 2 * (self.box is not None)

  @property
  def is_ambiguous(self) -> bool:
    """Whether the prompt may refer to several objects, such as a part and the whole.

    Multimask outputs are meant for such prompts: a single click, or only a mask.
    """
    return len(self.points) < 2 and self.box is None


class ComputedPrompt(VisualPrompt):
  """A visual prompt computed by a program: its coordinates may be within the first pixel.

  Coordinates from a user in that range are assumed to be fractions by mistake.
  """


def visual_as_json(prompt: VisualPrompt) -> dict[str, Any]:
  """A prompt as JSON values, without its mask."""
  return {
    "points": [list(point) for point in prompt.points],
    "point_labels": list(prompt.point_labels),
    "box": prompt.box and list(prompt.box),
  }


def as_visual_prompts(prompts: Any) -> list[VisualPrompt]:
  """Converts a visual prompt or a list of them to a list.

  Raises:
    TypeError: something else is given.
    ValueError: the list is empty.
  """
  rows = None if isinstance(prompts, VisualPrompt | None) else rows_of(prompts)
  several: list[Any] = [prompts] if rows is None else rows
  if not several:
    raise ValueError("no prompt given; pass a VisualPrompt or a list of them.")
  for prompt in several:
    if not isinstance(prompt, VisualPrompt):
      raise TypeError(
        f"pass a VisualPrompt or a list of them; got {shown(prompt)}. Phrases and exemplar boxes "
        "(Prompt) are for decode."
      )
  return several


def check_visual(
  prompt: VisualPrompt, height: int, width: int, mask_size: int | None = None
) -> None:
  """Checks a prompt against its image.

  Args:
    prompt: the prompt.
    height, width: size of the image.
    mask_size: side of the decoder's grid; None to skip the check of the mask.

  Raises:
    ValueError: a point is outside the image (its edges are inside), the box does not touch it,
      coordinates are fractions, or the mask has another size.
  """
  computed = isinstance(prompt, ComputedPrompt)
  values = [value for point in prompt.points for value in point]
  if not computed and are_fractions(values, height, width) and any(value % 1 for value in values):
    raise ValueError(
      f"points {[list(point) for point in prompt.points]!s:.60} are within the first pixel of the "
      f"{width} x {height} image: points are x, y in pixels; multiply fractions by width and "
      "height."
    )
  for x, y in prompt.points:
    if not (0 <= x <= width and 0 <= y <= height):
      raise ValueError(
        f"point [{x:g}, {y:g}] is outside the {width} x {height} image; points are x, y in pixels."
      )
  if prompt.box is not None:
    check_box(prompt.box, height, width, fractions=computed)
  if prompt.mask is not None and mask_size and prompt.mask.shape != (mask_size, mask_size):
    raise ValueError(
      f"mask must be the [{mask_size}, {mask_size}] logits of an earlier decode_visual, "
      f"found.mask_logits[prompt, k]; got shape {list(prompt.mask.shape)}."
    )


def pack_visual(prompts: Sequence[VisualPrompt], sizes: np.ndarray, image: Any) -> VisualPrompts:
  """Packs visual prompts into NumPy arrays; points become fractions, padded to `POINT_SIZES`.

  Args:
    prompts: checked with `check_visual`.
    sizes: height and width of each prompt's image, [P, 2].
    image: index of each prompt's image in the embedding.
  """
  slots = padded_slots(max(prompt.slots for prompt in prompts))
  xy = np.zeros((len(prompts), slots, 2), np.float32)
  labels = np.full((len(prompts), slots), PADDING, np.int32)
  for i, (prompt, (height, width)) in enumerate(zip(prompts, sizes, strict=True)):
    corners = () if prompt.box is None else (prompt.box[:2], prompt.box[2:])
    points = [*corners, *prompt.points]
    if points:
      xy[i, : len(points)] = np.asarray(points) / [width, height]
      labels[i, : len(points)] = [*CORNERS[: len(corners)], *prompt.point_labels]
  masks = [prompt.mask for prompt in prompts]
  has_mask = np.array([mask is not None for mask in masks])
  arrays: dict[str, Any] = {"image": image, "xy": xy, "labels": labels}
  if has_mask.any():
    shape = next(mask.shape for mask in masks if mask is not None)
    stacked = np.stack([np.zeros(shape, np.float32) if mask is None else mask for mask in masks])
    arrays |= {"mask": np.clip(stacked, -MASK_LIMIT, MASK_LIMIT), "has_mask": has_mask}
  return VisualPrompts(**arrays)


def padded_slots(slots: int) -> int:
  """The smallest of `POINT_SIZES` that is at least `slots`."""
  return next(size for size in POINT_SIZES if size >= slots)


def as_points(points: Any) -> tuple[tuple[float, float], ...]:
  """Converts points to pairs; raises ValueError for an invalid point."""
  rows = [points] if is_number(points) else rows_of(points)
  if rows is None:
    raise ValueError(f"points must be a list of x, y in pixels; got {shown(points)}.")
  return tuple(_point(row, i) for i, row in enumerate(rows))


def _point(row: Any, i: int) -> tuple[float, float]:
  point = numbers(row, 2)
  if point is None:
    raise ValueError(
      f"point {i} must be two numbers x, y in pixels; got {shown(row)}. Use points=[[x, y], ...]."
    )
  x, y = point
  if not (math.isfinite(x) and math.isfinite(y)):
    raise ValueError(f"point {i} must be finite; got {[x, y]}.")
  return x, y


def as_point_labels(labels: Any, count: int) -> tuple[int, ...]:
  """Converts the labels of `count` points; raises ValueError if they are invalid."""
  return as_labels(labels, count, "point", "1 (on the object) or 0 (off it)")


def _box(box: Any) -> tuple[float, ...]:
  x0, y0, x1, y1 = box = as_box(box, "the box")
  if x0 == x1 or y0 == y1:
    raise ValueError(f"the box {list(box)} has no area; for a click use points=[[x, y]].")
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
    raise ValueError("mask has values that are not finite; pass unchanged logits.")

  return array
