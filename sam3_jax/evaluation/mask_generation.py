"""How many of the annotated objects are found by generating masks of everything in an image."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sam3_jax.datasets.annotations import Pair
from sam3_jax.evaluation.clicks import images_with_objects, object_mask
from sam3_jax.evaluation.detect import Progress
from sam3_jax.inference.mask_generator import MaskGeneration
from sam3_jax.inference.predictor import Sam3
from sam3_jax.ops.masks import mask_iou

MIN_IOU = 0.5  # between a mask and an object that it matches


def evaluate(
  model: Sam3,
  pairs: Sequence[Pair],
  images: str | Path,
  options: MaskGeneration | None = None,
  *,
  progress: Progress | None = None,
) -> dict[str, float]:
  """Generates masks of everything in each image; arguments and errors as in `clicks.evaluate`.

  Args:
    options: of `Sam3.generate_masks`.

  Returns:
    In percent, the fraction `found` of all objects (matched with a mask at an IoU of at least 0.5,
    one to one) and the fraction `false` of masks without a match; and the numbers of `objects` and
    `masks`.
  """
  found = total_objects = total_masks = 0
  for image, objects in images_with_objects(pairs, images, progress):
    segments = model.generate_masks(image, options)
    truths = [object_mask(target) for target in objects]
    ious = np.array(
      [[mask_iou(mask, truth) for truth in truths] for mask in np.asarray(segments.masks)]
    )
    found += len(greedy_matches(ious.reshape(len(segments), len(truths))))
    total_objects, total_masks = total_objects + len(objects), total_masks + len(segments)
  return {
    "found": 100 * found / total_objects,
    "false": 100 * (total_masks - found) / max(total_masks, 1),
    "objects": total_objects,
    "masks": total_masks,
  }


def greedy_matches(ious: np.ndarray) -> list[tuple[int, int]]:
  """Matches masks with objects, given their IoU [masks, objects]: the pair with the highest IoU
  first, down to `MIN_IOU`, each mask and object in one pair only."""
  left, matches = np.array(ious, np.float64), []
  while left.size and left.max() >= MIN_IOU:
    mask, target = np.unravel_index(left.argmax(), left.shape)
    matches.append((int(mask), int(target)))
    left[mask], left[:, target] = -1, -1
  return matches
