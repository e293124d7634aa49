"""Concept prompts: what a user may ask, checked, and packed into the model's padded arrays."""

import dataclasses
from collections.abc import Mapping, Sequence, Set
from typing import Any

import numpy as np
from jaxtyping import Int

from sam3_jax.inputs.tokenizer import phrase_fault
from sam3_jax.types import Prompts, TextEmbedding
from sam3_jax.utils.validation import as_array, is_number, plain, shown

BOXES_ALONE = "visual"  # the phrase that Meta's code encodes for a prompt of boxes alone
BOX_SIZES = (8, 128)  # boxes of a prompt are padded to one of these, so that few programs do


@dataclasses.dataclass(frozen=True)
class Prompt:
  """A noun phrase, example boxes, or both: "all instances of this".

  Attributes:
    text: a short noun phrase, "yellow school bus"; None for boxes alone.
    boxes: x0, y0, x1, y1 of each example, in pixels of the source image as displayed (EXIF
      orientation applied); at most 128. They may reach beyond the image, be up to twice its size,
      and have no area.
    box_labels: 1 for an example, 0 for a counterexample, one a box; None for all 1.

  Raises:
    ValueError: neither text nor a box, an empty phrase, or faulty boxes or labels.
    TypeError: text is no string.
  """

  text: str | None = None
  boxes: Any = None
  box_labels: Any = None

  def __post_init__(self):
    if self.text is not None:
      if not isinstance(self.text, str):
        raise TypeError(f"text must be a string; got {shown(self.text)}. Use one Prompt a phrase.")
      if fault := phrase_fault(self.text):
        empty = fault.endswith(" is empty")
        fault = "the phrase is empty" if empty else fault
        raise ValueError(f"{fault}; name what to find, or leave text out and give boxes.")
      object.__setattr__(self, "text", str(self.text))  # not NumPy's kind
    boxes = _boxes(self.boxes)
    if self.text is None and not boxes:
      raise ValueError("a prompt needs a phrase or a box: Prompt(text=...), Prompt(boxes=...).")
    object.__setattr__(self, "boxes", boxes)
    labels = as_labels(self.box_labels, len(boxes), "box", "1 (example) or 0 (counterexample)")
    object.__setattr__(self, "box_labels", tuple(map(bool, labels)))

  @property
  def phrase(self) -> str:
    """What the text encoder reads."""
    return BOXES_ALONE if self.text is None else self.text


def as_prompts(prompts: str | Prompt | Sequence[str | Prompt]) -> list[Prompt]:
  """One or several phrases or prompts as a list of prompts."""
  if isinstance(prompts, (str, Prompt)):
    prompts = [prompts]
  # The keys of a mapping are not all that it says, and a set has no order.
  if isinstance(prompts, bytes | bytearray | Mapping | Set):
    raise TypeError(f"pass a phrase, a Prompt, or a list of them; got {shown(prompts)}.")
  try:
    prompts = list(prompts)
  except TypeError:
    message = f"pass a phrase, a Prompt, or a list of them; got {shown(prompts)}."
    raise TypeError(message) from None
  if not prompts:
    raise ValueError("no prompt given; pass a phrase, a Prompt, or a list of them.")
  return [one if isinstance(one, Prompt) else Prompt(text=one) for one in prompts]


def prompt_as_json(prompt: Prompt) -> dict[str, Any]:
  """A prompt as plain values."""
  return {
    "text": prompt.text,
    "boxes": [list(box) for box in prompt.boxes],
    "box_labels": [int(label) for label in prompt.box_labels],
  }


def check_boxes(prompt: Prompt, height: int, width: int) -> None:
  """Raises ValueError unless each box touches the image of this size, is at most twice as large,
  and is not given in fractions."""
  for box in prompt.boxes:
    check_box(box, height, width)


def check_box(box: tuple[float, ...], height: int, width: int, *, fractions: bool = False) -> None:
  """Raises ValueError as `check_boxes` does; `fractions`: it may lie within the first pixel."""
  x0, y0, x1, y1 = box
  if not fractions and are_fractions(box, height, width) and (x1 > x0 or y1 > y0):
    raise ValueError(
      f"box {list(box)} lies within the first pixel of the {width} x {height} image: boxes are x0, "
      "y0, x1, y1 in its pixels; multiply fractions by width and height."
    )
  if x1 < 0 or y1 < 0 or x0 > width or y0 > height:
    raise ValueError(
      f"box {list(box)} lies wholly outside the {width} x {height} image; "
      "boxes are x0, y0, x1, y1 in its pixels."
    )
  if x1 - x0 > 2 * width or y1 - y0 > 2 * height:
    raise ValueError(
      f"box {list(box)} is more than twice as large as the {width} x {height} image; "
      "boxes are x0, y0, x1, y1 in its pixels."
    )


def are_fractions(values: Sequence[float], height: int, width: int) -> bool:
  """Whether coordinates lie within the first pixel of an image of more than a few pixels, where
  nobody means pixels."""
  return min(height, width) > 8 and all(0 <= value <= 1 for value in values)


def pack(
  prompts: Sequence[Prompt],
  sizes: np.ndarray,
  *,
  image: Any,
  first_id: Any,
  text: TextEmbedding,
) -> Prompts:
  """Prompts as NumPy arrays, their boxes as cxcywh fractions, padded to one of `BOX_SIZES`.

  Args:
    prompts: checked against their images.
    sizes: height and width of each prompt's image, [P, 2].
    image, first_id, text: as in `Prompts`, a row a prompt.
  """
  most = max(len(prompt.boxes) for prompt in prompts)
  slots = next(size for size in BOX_SIZES if size >= most)
  boxes = np.full((len(prompts), slots, 4), 0.5, np.float32)
  positive = np.zeros((len(prompts), slots), bool)
  valid = np.zeros((len(prompts), slots), bool)
  for i, (prompt, (height, width)) in enumerate(zip(prompts, sizes, strict=True)):
    if prompt.boxes:
      n = len(prompt.boxes)
      x0, y0, x1, y1 = (np.asarray(prompt.boxes) / [width, height, width, height]).T
      boxes[i, :n] = np.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], axis=1)
      positive[i, :n] = prompt.box_labels
      valid[i, :n] = True
  rows: dict[str, Any] = {"boxes": boxes, "positive": positive, "valid": valid}
  return Prompts(image=image, first_id=first_id, text=text, **rows)


def image_rows(
  index: int | Sequence[int] | None, prompts: int, images: int
) -> Int[np.ndarray, " P"]:
  """For each of so many prompts, the row of its image among so many, as `Sam3.decode` takes it.

  Raises:
    ValueError: no image, one that is not there, several without an index, or not one a prompt.
  """
  if not images:
    raise ValueError("the embedding has no image, so nothing can be asked about it; encode some.")
  if index is None and images != 1:
    raise ValueError(
      f"the embedding has {images} images: say which one each prompt is about, image_index=[...]."
    )
  rows = as_array(0 if index is None else index)
  if rows.shape not in ((), (prompts,)) or not np.issubdtype(rows.dtype, np.integer):
    raise ValueError(f"image_index must be one integer a prompt, {prompts}; got {index!r:.60}.")
  for row in rows.reshape(-1):
    if not 0 <= row < images:
      raise ValueError(f"image_index {row} is not in the embedding, which has {images} images.")
  return np.broadcast_to(rows, prompts)


def as_box(row: Any, name: str) -> tuple[float, ...]:
  """Four numbers; raises ValueError, calling it `name`, unless they are a box."""
  box = numbers(row, 4)
  if box is None:
    raise ValueError(f"{name} must be four numbers x0, y0, x1, y1 in pixels; got {shown(row)}.")
  if not np.all(np.isfinite(box)):
    raise ValueError(f"{name} must be finite; got {list(box)}.")
  if box[2] < box[0] or box[3] < box[1]:
    raise ValueError(
      f"{name} has a negative extent: {list(box)}; the order is x0, y0, x1, y1. "
      "For cxcywh use ops.boxes.cxcywh_to_xyxy."
    )
  return box


def numbers(row: Any, count: int) -> tuple[float, ...] | None:
  """`count` numbers; None if it is something else."""
  try:
    values = plain(row, "", 1)
    if isinstance(values, list) and len(values) == count and all(map(is_number, values)):
      return tuple(map(float, values))
  except (TypeError, OverflowError):  # the latter: an integer that no float holds
    pass
  return None


def as_labels(labels: Any, count: int, what: str, meaning: str) -> tuple[int, ...]:
  """A label for each of so many things; None is 1 for all.

  Raises:
    ValueError: they are not so many, or not 0 and 1; it says `what` has them and their `meaning`.
  """
  if labels is None:
    return (1,) * count
  try:
    values = plain(labels, f"{what}_labels")
  except TypeError as error:
    raise ValueError(f"{what} labels are {meaning}: {error}") from None
  if not isinstance(values, list) or len(values) != count:
    raise ValueError(f"{what}_labels must be one a {what}: {count}; got {shown(labels)}.")
  for label in values:
    if isinstance(label, list) or label not in (0, 1):
      raise ValueError(f"{what} labels are {meaning}; got {shown(label)}.")
  return tuple(int(label) for label in values)


def rows_of(values: Any) -> list[Any] | None:
  """What a list or an array holds, none if `values` is None; None if it is neither."""
  if values is None:
    return []
  if isinstance(values, str | bytes | bytearray | Mapping | Set):
    return None
  try:
    return list(values)
  except Exception:  # an array without dimensions, or of a library whose errors are its own
    return None


def _boxes(boxes: Any) -> tuple[tuple[float, ...], ...]:
  rows = rows_of(boxes)
  if rows is None:
    raise ValueError(f"boxes must be a list of x0, y0, x1, y1 in pixels; got {shown(boxes)}.")
  if len(rows) > BOX_SIZES[-1]:
    raise ValueError(f"a prompt takes at most {BOX_SIZES[-1]} boxes; got {len(rows)}.")
  return tuple(as_box(row, f"box {i}") for i, row in enumerate(rows))
