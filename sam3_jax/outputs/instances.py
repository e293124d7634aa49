"""Postprocessing: converts the predictions of all queries to instances of the source image.

Follows Meta's `Sam3Processor`: a strict threshold on the score, boxes scaled to the image and not
clipped, no non-maximum suppression, and mask *logits* (not probabilities, as in transformers)
resized and thresholded at zero. Masks stay on the decoder's grid until they are accessed: 200
masks of 20,000 x 15,000 pixels would need 60 GB.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Self

import jax
import numpy as np
from jaxtyping import Float, Int

from sam3_jax.ops.masks import mask_to_box
from sam3_jax.outputs.masks import LazyMasks, Masks
from sam3_jax.types import Detections, VisualMasks
from sam3_jax.utils.validation import as_array, check_number

_FILLED = 10.0  # the logit of a filled hole, as in SAM 2
_HOLE_REMEDY = "It is in cells of the grid; 0 fills none."


def instances(
  detections: Detections, threshold: float | Sequence[float] = 0.5
) -> "list[Instances]":
  """The instances of each prompt with scores above `threshold`, best first (ties by query).

  Copies scores and boxes from the device, and then only the masks of these instances.

  Args:
    detections: of `decode`; on a device or as NumPy arrays.
    threshold: in [0, 1]; one for all prompts, or one for each.

  Raises:
    TypeError: `detections` has another type.
    ValueError: a threshold is outside [0, 1] or below `decode(min_score=...)`, the number of
      thresholds is wrong, scores are NaN, or a source image has no size.
  """
  if not isinstance(detections, Detections):
    raise TypeError(f"instances takes what decode returns, then thresholds; got {detections!r:.60}")
  scores, boxes, ids, sizes, min_scores = jax.device_get(
    (
      detections.scores, detections.boxes, detections.ids, detections.sizes,
      detections.mask_min_score,
    )
  )  # fmt: skip
  thresholds = _thresholds(threshold, len(scores))
  _check_scores(scores, thresholds, min_scores)
  for prompt, (height, width) in enumerate(sizes):
    if min(height, width) < 1:
      raise ValueError(
        f"the source image of prompt {prompt} is {height} x {width} (height x width): "
        "boxes and masks need its size in pixels."
      )
  kept = []
  for row, limit in zip(scores, thresholds, strict=True):
    order = np.argsort(-row, kind="stable")
    kept.append(order[row[order] > limit])
  logits = kept_masks(detections.mask_logits, kept)
  return [
    Instances(
      ids=ids[p, queries],
      scores=scores[p, queries].astype(np.float32),
      boxes=boxes[p, queries].astype(np.float32)
      * np.array([width, height, width, height], np.float32),
      masks=Masks(logits[p], (height, width)),
    )
    for p, (queries, (height, width)) in enumerate(zip(kept, sizes, strict=True))
  ]


def visual_masks(found: VisualMasks, hole_area: int = 0) -> list[Masks]:
  """The masks of visual prompts over the source image: K masks for each prompt.

  Copies the masks of all prompts from the device.

  Args:
    found: of `decode_visual`; on a device or as NumPy arrays.
    hole_area: holes of up to this many cells of the decoder's grid are filled before resizing; 0
      fills none. Meta's predictor fills up to 256, if its GPU kernel is available.

  Raises:
    ValueError: `hole_area` is not a number of at least 0, or a source image has no size.
  """
  check_number("hole_area", hole_area, 0, remedy=_HOLE_REMEDY)
  logits, sizes = jax.device_get((found.mask_logits, found.sizes))
  if hole_area:
    logits = [np.stack([fill_holes(mask, hole_area) for mask in masks]) for masks in logits]
  return [
    Masks(masks, (height, width)) for masks, (height, width) in zip(logits, sizes, strict=True)
  ]


def visual_instances(
  found: VisualMasks, first_id: int = 1, hole_area: int = 0
) -> "list[Instances]":
  """The best mask of each visual prompt as an instance.

  Its score is the predicted IoU, and its box is the bounding box of the mask. A prompt whose best
  mask is empty has no instance.

  Args:
    found: of `decode_visual`; on a device or as NumPy arrays.
    first_id: id of the first prompt's instance; ids increase by one for each prompt.
    hole_area: as for `visual_masks`.
  """
  check_number("hole_area", hole_area, 0, remedy=_HOLE_REMEDY)
  logits, iou, sizes = jax.device_get((found.mask_logits, found.iou, found.sizes))
  rows = []
  for i, (height, width) in enumerate(sizes.tolist()):
    k = int(iou[i].argmax())
    grid = fill_holes(logits[i, k], hole_area) if hole_area else logits[i, k]
    masks = Masks(grid[None], (height, width))
    box = np.array([mask_to_box(masks[0])], np.float32)
    scores = np.asarray(iou[i, k : k + 1], np.float32)
    one = Instances(np.array([first_id + i]), scores, box, masks)
    rows.append(one[box[:, 2] > 0])
  return rows


def xywh(boxes: Float[np.ndarray, "n 4"], size: tuple[int, int]) -> Float[np.ndarray, "n 4"]:
  """Converts xyxy boxes in pixels to x, y, width, height, as in COCO files.

  The boxes are clipped to an image of `size` (height and width) and rounded to 0.01 pixels.
  """
  height, width = size
  corners = np.clip(np.asarray(boxes, np.float64).reshape(-1, 4), 0, [width, height] * 2).round(2)
  return np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1).round(2)


def fill_holes(grid: Float[np.ndarray, "Hm Wm"], area: int) -> Float[np.ndarray, "Hm Wm"]:
  """Fills holes in mask logits: 8-connected background regions of at most `area` cells."""
  from scipy import ndimage  # not at the top: it is slow to import

  found: Any = ndimage.label(grid <= 0, structure=np.ones((3, 3)))
  labels = found[0]
  sizes = np.bincount(labels.ravel())
  sizes[0] = area + 1  # label 0 is the mask itself
  return np.where((sizes <= area)[labels], np.asarray(_FILLED, grid.dtype), grid)


@dataclasses.dataclass(frozen=True)
class Instances:
  """The instances of one prompt, best first.

  Attributes:
    ids: unique within an image and one decode call, over all its prompts.
    scores: in (threshold, 1].
    boxes: xyxy in pixels of the source image; not clipped to it.
    masks: over the source image; each is resized on access.
  """

  ids: Int[np.ndarray, " n"]
  scores: Float[np.ndarray, " n"]
  boxes: Float[np.ndarray, "n 4"]
  masks: LazyMasks

  def __len__(self) -> int:
    return len(self.ids)

  def __getitem__(self, index: slice | np.ndarray | Sequence[int]) -> Self:
    """The instances selected by a slice, an array of indices or a boolean array."""
    if isinstance(index, int | np.integer):
      raise TypeError(f"use [{index}:{index + 1}], or .scores[{index}], .boxes[{index}] and so on.")
    return type(self)(*(getattr(self, field.name)[index] for field in dataclasses.fields(self)))

  def to_supervision(self, class_id: int = 0) -> Any:
    """Converts to `supervision.Detections`, with all masks over the source image in memory.

    Args:
      class_id: for all instances, such as the index of the prompt.

    Raises:
      ImportError: the package supervision is not installed.
    """
    try:
      import supervision  # pyright: ignore[reportMissingImports]
    except ImportError as error:
      raise ImportError("to_supervision needs supervision: pip install supervision.") from error
    return supervision.Detections(
      xyxy=self.boxes,
      mask=np.asarray(self.masks),
      confidence=self.scores,
      class_id=np.full(len(self), class_id),
      data={"identity": self.ids},
    )


def _check_scores(
  scores: np.ndarray, thresholds: np.ndarray, min_scores: np.ndarray | None
) -> None:
  """Raises ValueError if scores are NaN, or masks above a threshold were not computed."""
  for prompt, row in enumerate(scores):
    if np.isnan(row).any():
      raise ValueError(
        f"scores of prompt {prompt} are NaN: the embedding of its image or its phrase is not "
        "finite. Encode again; `sam3-jax inspect --verify` checks the checkpoint."
      )
    best = row.max(initial=0)
    if min_scores is not None and min_scores[prompt] > 0 and best > thresholds[prompt]:
      raise ValueError(
        f"prompt {prompt} has a score of {best:.4g}, above the threshold {thresholds[prompt]:.4g}, "
        f"but no masks: decode computed none for scores up to min_score={min_scores[prompt]:.4g}; "
        f"decode with min_score={thresholds[prompt]:.4g} or less, or raise the threshold."
      )


def _thresholds(threshold: float | Sequence[float], prompts: int) -> Float[np.ndarray, " P"]:
  values = as_array(threshold)
  if values.size and values.dtype.kind not in "iufV":  # V: bfloat16
    raise ValueError(
      f"threshold must be a number in [0, 1], or one for each prompt; got {threshold!r:.60}."
    )
  values = values.astype(np.float64)
  if values.ndim > 1 or (values.ndim == 1 and len(values) != prompts):
    raise ValueError(
      f"there are {prompts} prompts and thresholds of shape {list(values.shape)}: "
      "give one for all, or one for each."
    )
  for value in values.ravel():
    if not 0 <= value <= 1:
      raise ValueError(f"threshold is {value:g}, but scores are in [0, 1]: give one in that range.")
  # In float32, like the scores, so that a score of float32(0.3) is not above 0.3.
  return np.broadcast_to(values.astype(np.float32), (prompts,))


@jax.jit
def _mask(mask_logits, prompt, query):
  return mask_logits[prompt, query]


def kept_masks(mask_logits, kept: list[np.ndarray]) -> list[Float[np.ndarray, "n Hm Wm"]]:
  """Copies the masks of each prompt's kept queries from the device, with one compiled program."""
  if not isinstance(mask_logits, np.ndarray):
    rows = [[_mask(mask_logits, p, q) for q in queries] for p, queries in enumerate(kept)]
    rows = jax.device_get(rows)
  else:
    rows = [[mask_logits[p, q] for q in queries] for p, queries in enumerate(kept)]
  shape = (-1, *mask_logits.shape[2:])
  return [np.asarray(row, mask_logits.dtype).reshape(shape) for row in rows]
