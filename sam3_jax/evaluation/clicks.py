"""How well clicks and boxes segment the objects of annotated images.

The first click is at the point of an object that is farthest from its edges. The next clicks are at
that point of the error (as in SAM 2, Ravi et al. 2024, arXiv:2408.00714, section 6.1). Masks are
compared at the size of the image.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, UInt8

from sam3_jax.datasets.annotations import Object, Pair
from sam3_jax.evaluation.detect import Progress
from sam3_jax.inference.predictor import Sam3
from sam3_jax.inputs.preprocess import read_image
from sam3_jax.inputs.visual_prompts import ComputedPrompt
from sam3_jax.ops.masks import mask_iou
from sam3_jax.outputs.rle import decode
from sam3_jax.types import ImageEmbedding

Mask = Bool[np.ndarray, "h w"]

CORRECTIONS = 2  # clicks after the first


def evaluate(
  model: Sam3, pairs: Sequence[Pair], images: str | Path, *, progress: Progress | None = None
) -> dict[str, float]:
  """Segments each object of each image once, whatever phrases name it.

  Args:
    model: with a head for visual prompts.
    pairs: from `annotations.read`; crowds are left out.
    images: the directory of their file names.
    progress: called with the name of an image and the fraction done.

  Returns:
    Mean IoU over objects in percent: after one `click`, of the mask with the highest predicted IoU,
    and `click_best` of the best of the three masks; after `three_clicks`, two of which correct
    errors; and after a `box`. And the number of `objects`.

  Raises:
    ValueError: there are no objects, or the checkpoint has no head for visual prompts.
    FileNotFoundError: an image is missing.
  """
  ious: dict[str, list[float]] = {}
  for image, objects in images_with_objects(pairs, images, progress):
    embedding = model.encode(image, visual=True)
    for name, values in _ious(model, embedding, objects).items():
      ious.setdefault(name, []).extend(values)
  metrics = {name: 100 * float(np.mean(values)) for name, values in ious.items()}
  return metrics | {"objects": len(ious["click"])}


class DeepestPoint(NamedTuple):
  """The point of a mask that is farthest from its edges, and its distance to them, in pixels."""

  x: float
  y: float
  depth: float


def deepest_point(mask: Mask) -> DeepestPoint:
  """The first such point in row-major order; the depth is 0 for an empty mask."""
  from scipy import ndimage  # imported here because it is slow to import

  distances: Any = ndimage.distance_transform_edt(np.pad(mask, 1))
  row, column = np.unravel_index(distances[1:-1, 1:-1].argmax(), mask.shape)
  return DeepestPoint(column + 0.5, row + 0.5, float(distances[row + 1, column + 1]))


def corrective_click(mask: Mask, truth: Mask) -> tuple[tuple[float, float], int]:
  """The next click of a user, and its label: at the deepest point of the missing or of the extra
  pixels, whichever is deeper; on the object if the mask is correct."""
  missing, extra = deepest_point(truth & ~mask), deepest_point(mask & ~truth)
  label = int(missing.depth >= extra.depth)
  correct = missing.depth == extra.depth == 0
  chosen = deepest_point(truth) if correct else missing if label else extra
  return (chosen.x, chosen.y), label


def images_with_objects(
  pairs: Sequence[Pair], images: str | Path, progress: Progress | None
) -> Iterator[tuple[UInt8[np.ndarray, "h w 3"], list[Object]]]:
  """The images that have objects, each with all its objects, without duplicates."""
  by_image: dict[str, dict[Any, Object]] = {}
  for pair in pairs:
    own = by_image.setdefault(pair.file_name, {})
    own |= {target.rle["counts"]: target for target in pair.objects if not target.crowd}
  objects = {name: list(own.values()) for name, own in by_image.items() if own}
  if not objects:
    raise ValueError(f"none of the {len(pairs)} pairs has an object to segment; give others.")
  for i, (name, own) in enumerate(objects.items()):
    if progress is not None:
      progress(name, i / len(objects))
    yield read_image(Path(images) / name), own


def object_mask(target: Object) -> Mask:
  """The mask of an annotated object."""
  return decode(target.rle).astype(bool)


def _ious(
  model: Sam3, embedding: ImageEmbedding, objects: Sequence[Object]
) -> Mapping[str, list[float]]:
  """The IoU of each object with its mask, by kind of prompt."""
  truths = [object_mask(target) for target in objects]
  points = [[tuple(deepest_point(truth)[:2])] for truth in truths]
  labels = [[1] for _ in truths]
  found = model.decode_visual(embedding, [ComputedPrompt(point) for point in points])
  chosen = np.asarray(found.iou).argmax(axis=1)
  multimask = [
    [mask_iou(mask, truth) for mask in np.asarray(masks)]
    for masks, truth in zip(found.masks(), truths, strict=True)
  ]
  ious = {
    "click": [values[k] for values, k in zip(multimask, chosen, strict=True)],
    "click_best": [max(values) for values in multimask],
  }
  for _ in range(CORRECTIONS):
    for masks, k, truth, point, label in zip(
      found.masks(), chosen, truths, points, labels, strict=True
    ):
      where, kind = corrective_click(masks[int(k)], truth)
      point.append(where)
      label.append(kind)
    logits = np.asarray(found.mask_logits)
    prompts = [
      ComputedPrompt(point, label, mask=logits[i, chosen[i]])
      for i, (point, label) in enumerate(zip(points, labels, strict=True))
    ]
    found = model.decode_visual(embedding, prompts, multimask=False)
    chosen = np.zeros(len(truths), int)
  ious["three_clicks"] = _single_mask_ious(found, truths)
  boxes = [(x, y, x + w, y + h) for x, y, w, h in (target.box for target in objects)]
  found = model.decode_visual(
    embedding, [ComputedPrompt(box=box) for box in boxes], multimask=False
  )
  ious["box"] = _single_mask_ious(found, truths)
  return ious


def _single_mask_ious(found: Any, truths: Sequence[Mask]) -> list[float]:
  return [mask_iou(masks[0], truth) for masks, truth in zip(found.masks(), truths, strict=True)]
