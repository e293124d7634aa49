"""Concept prompts: phrases and exemplars, validated and packed into padded arrays.

Exemplars are boxes in the image itself (`Prompt`), or were encoded in other images (`Concept`).
"""

import dataclasses
from collections.abc import Mapping, Sequence, Set
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from sam3_jax.inputs.concept import BOX_SIZES, BOXES_ALONE, Concept, padded_slots
from sam3_jax.inputs.tokenizer import phrase_fault
from sam3_jax.types import Exemplars, Prompts, TextEmbedding
from sam3_jax.utils.json_text import shown
from sam3_jax.utils.validation import as_array, as_lists, is_number


@dataclasses.dataclass(frozen=True)
class Prompt:
  """A concept prompt: a noun phrase, exemplar boxes, or both.

  Attributes:
    text: a short noun phrase, such as "yellow school bus"; None for boxes only.
    boxes: exemplar boxes x0, y0, x1, y1 in pixels of the source image as displayed (EXIF
      orientation applied); at most 128. A box may extend beyond the image, be up to twice its size,
      and have no area.
    box_labels: 1 for a positive exemplar, 0 for a negative one, for each box; None for all 1.

  Raises:
    ValueError: neither text nor boxes, an empty phrase, or invalid boxes or labels.
    TypeError: text is not a string.
  """

  text: str | None = None
  boxes: Any = None
  box_labels: Any = None

  def __post_init__(self):
    if self.text is not None:
      if not isinstance(self.text, str):
        raise TypeError(
          f"text must be a string; got {shown(self.text)}. Use one Prompt for each phrase."
        )
      if fault := phrase_fault(self.text):
        empty = fault.endswith(" is empty")
        fault = "the phrase is empty" if empty else fault
        raise ValueError(f"{fault}; name what to find, or leave text out and give boxes.")
      object.__setattr__(self, "text", str(self.text))  # converts NumPy's strings
    boxes = _boxes(self.boxes)
    if self.text is None and not boxes:
      raise ValueError("a prompt needs a phrase or a box: Prompt(text=...), Prompt(boxes=...).")
    object.__setattr__(self, "boxes", boxes)
    meaning = "1 (positive exemplar) or 0 (negative exemplar)"
    labels = as_labels(self.box_labels, len(boxes), "box", meaning)
    object.__setattr__(self, "box_labels", tuple(map(bool, labels)))

  @property
  def phrase(self) -> str:
    """The phrase to encode."""
    return BOXES_ALONE if self.text is None else self.text


ConceptPrompt = Prompt | Concept


def as_concept_prompts(
  prompts: str | ConceptPrompt | Sequence[str | ConceptPrompt],
) -> list[ConceptPrompt]:
  """Converts a phrase, a prompt, a concept, or a list of them to a list of prompts and concepts."""
  given: Any = [prompts] if isinstance(prompts, Concept) else prompts
  if not isinstance(given, list | tuple) or not any(isinstance(one, Concept) for one in given):
    return [*as_prompts(given)]
  return [one if isinstance(one, Concept) else as_prompts([one])[0] for one in given]


def as_prompts(prompts: str | Prompt | Sequence[str | Prompt]) -> list[Prompt]:
  """Converts a phrase, a prompt or a list of them to a list of prompts."""
  if isinstance(prompts, (str, Prompt)):
    prompts = [prompts]
  # Iterating over a mapping would ignore its values, and a set has no order.
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
  """A prompt as JSON values."""
  return {
    "text": prompt.text,
    "boxes": [list(box) for box in prompt.boxes],
    "box_labels": [int(label) for label in prompt.box_labels],
  }


def check_boxes(prompt: Prompt, height: int, width: int) -> None:
  """Raises ValueError unless each box touches the image, is at most twice as large as the image,
  and is given in pixels, not in fractions."""
  for box in prompt.boxes:
    check_box(box, height, width)


def check_box(box: tuple[float, ...], height: int, width: int, *, fractions: bool = False) -> None:
  """Checks one box as `check_boxes` does; `fractions` allows a box within the first pixel."""
  x0, y0, x1, y1 = box
  if not fractions and are_fractions(box, height, width) and (x1 > x0 or y1 > y0):
    raise ValueError(
      f"box {list(box)} is within the first pixel of the {width} x {height} image: boxes are x0, "
      "y0, x1, y1 in pixels; multiply fractions by width and height."
    )
  if x1 < 0 or y1 < 0 or x0 > width or y0 > height:
    raise ValueError(
      f"box {list(box)} is completely outside the {width} x {height} image; "
      "boxes are x0, y0, x1, y1 in pixels."
    )
  if x1 - x0 > 2 * width or y1 - y0 > 2 * height:
    raise ValueError(
      f"box {list(box)} is more than twice as large as the {width} x {height} image; "
      "boxes are x0, y0, x1, y1 in pixels."
    )


def are_fractions(values: Sequence[float], height: int, width: int) -> bool:
  """Whether coordinates must be fractions by mistake: all are within the first pixel of an image
  that is larger than a few pixels."""
  return min(height, width) > 8 and all(0 <= value <= 1 for value in values)


def exemplar_slots(prompt: ConceptPrompt) -> int:
  """The padded number of exemplars of a concept; 0 for a prompt. Prompts and concepts of the same
  number can share a program, in which the results of one do not depend on the others."""
  return padded_slots(len(prompt)) if isinstance(prompt, Concept) else 0


def pack(
  prompts: Sequence[ConceptPrompt],
  sizes: np.ndarray,
  *,
  image: Any,
  first_id: Any,
  text: TextEmbedding,
) -> Prompts:
  """Packs prompts into NumPy arrays; boxes become cxcywh fractions, padded to `BOX_SIZES`.

  Args:
    prompts: checked with `check_boxes`; concepts in the dtype of the model.
    sizes: height and width of each prompt's image, [P, 2].
    image, first_id, text: as in `Prompts`, one entry for each prompt.
  """
  boxes, positive, valid = pack_boxes(prompts, sizes)
  arrays: dict[str, Any] = {"boxes": boxes, "positive": positive, "valid": valid}
  exemplars = _pack_exemplars(prompts)
  return Prompts(image=image, first_id=first_id, text=text, exemplars=exemplars, **arrays)


def pack_boxes(
  prompts: Sequence[ConceptPrompt], sizes: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Boxes [P, N, 4] as cxcywh fractions, positive [P, N] and valid [P, N], padded to `BOX_SIZES`.

  N is 0 if there are only concepts. Arguments are as in `pack`.
  """
  counts = [len(prompt.boxes) for prompt in prompts if isinstance(prompt, Prompt)]
  slots = padded_slots(max(counts)) if counts else 0
  boxes = np.full((len(prompts), slots, 4), 0.5, np.float32)
  positive = np.zeros((len(prompts), slots), bool)
  valid = np.zeros((len(prompts), slots), bool)
  for i, (prompt, (height, width)) in enumerate(zip(prompts, sizes, strict=True)):
    if isinstance(prompt, Prompt) and prompt.boxes:
      n = len(prompt.boxes)
      x0, y0, x1, y1 = (np.asarray(prompt.boxes) / [width, height, width, height]).T
      boxes[i, :n] = np.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], axis=1)
      positive[i, :n] = prompt.box_labels
      valid[i, :n] = True
  return boxes, positive, valid


def _pack_exemplars(prompts: Sequence[ConceptPrompt]) -> Exemplars | None:
  """The exemplars of concepts as NumPy arrays, padded to `BOX_SIZES`; None without concepts."""
  concepts = {i: one for i, one in enumerate(prompts) if isinstance(one, Concept)}
  if not concepts:
    return None
  slots = max(map(exemplar_slots, concepts.values()))
  tokens = {i: np.asarray(jax.device_get(one.tokens)) for i, one in concepts.items()}
  some = next(iter(tokens.values()))
  packed: Any = np.zeros((len(prompts), slots, some.shape[1]), some.dtype)
  valid: Any = np.zeros((len(prompts), slots), bool)
  for i, rows in tokens.items():
    packed[i, : len(rows)] = rows
    valid[i, : len(rows)] = True
  return Exemplars(packed, valid)


def image_indices(
  index: int | Sequence[int] | None, prompts: int, images: int
) -> Int[np.ndarray, " P"]:
  """The index of each prompt's image in the embedding, from `image_index` of `Sam3.decode`.

  Args:
    index: one index for all prompts, one for each, or None if there is only one image.
    prompts: number of prompts.
    images: number of images in the embedding.

  Raises:
    ValueError: there is no image, an index is out of range, `index` is None and there are several
      images, or it has another number of indices.
  """
  if not images:
    raise ValueError("the embedding has no images; encode at least one image.")
  if index is None and images != 1:
    raise ValueError(
      f"the embedding has {images} images: give the image of each prompt, image_index=[...]."
    )
  indices = as_array(0 if index is None else index)
  if indices.shape not in ((), (prompts,)) or not np.issubdtype(indices.dtype, np.integer):
    raise ValueError(
      f"image_index must be one integer, or one for each of {prompts} prompts; got {index!r:.60}."
    )
  for one in indices.reshape(-1):
    if not 0 <= one < images:
      raise ValueError(f"image_index {one} is not in the embedding, which has {images} images.")
  return np.broadcast_to(indices, prompts)


def as_box(row: Any, name: str) -> tuple[float, ...]:
  """Converts a row to a box; raises ValueError with the box's `name` if it is invalid."""
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
  """Converts a row to `count` numbers; returns None if that is not possible."""
  try:
    values = as_lists(row, "", 1)
    if isinstance(values, list) and len(values) == count and all(map(is_number, values)):
      return tuple(map(float, values))
  except (TypeError, OverflowError):  # OverflowError: an integer too large for a float
    pass
  return None


def as_labels(labels: Any, count: int, what: str, meaning: str) -> tuple[int, ...]:
  """Converts labels to a tuple of 0 and 1.

  Args:
    labels: the labels; None for all 1.
    count: their required number.
    what, meaning: what the labels belong to and their meaning, for messages.

  Raises:
    ValueError: there are more or fewer labels, or values other than 0 and 1.
  """
  if labels is None:
    return (1,) * count
  try:
    values = as_lists(labels, f"{what}_labels")
  except TypeError as error:
    raise ValueError(f"{what} labels are {meaning}: {error}") from None
  if not isinstance(values, list) or len(values) != count:
    raise ValueError(
      f"{what}_labels needs one label for each {what}: {count}; got {shown(labels)}."
    )
  for label in values:
    if isinstance(label, list) or label not in (0, 1):
      raise ValueError(f"{what} labels are {meaning}; got {shown(label)}.")
  return tuple(int(label) for label in values)


def rows_of(values: Any) -> list[Any] | None:
  """The entries of a list or an array, [] for None; None if `values` is neither."""
  if values is None:
    return []
  if isinstance(values, str | bytes | bytearray | Mapping | Set):
    return None
  try:
    return list(values)
  except Exception:  # an array without dimensions, or an error of another library
    return None


def _boxes(boxes: Any) -> tuple[tuple[float, ...], ...]:
  rows = rows_of(boxes)
  if rows is None:
    raise ValueError(f"boxes must be a list of x0, y0, x1, y1 in pixels; got {shown(boxes)}.")
  if len(rows) > BOX_SIZES[-1]:
    raise ValueError(f"a prompt takes at most {BOX_SIZES[-1]} boxes; got {len(rows)}.")
  return tuple(as_box(row, f"box {i}") for i, row in enumerate(rows))
