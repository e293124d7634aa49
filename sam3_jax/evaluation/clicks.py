"""How well clicks, boxes, and an image alone find the objects of annotated images.

A click is at the heart of an object, the point farthest from its edges; the clicks that follow are
at the heart of what is wrong (SAM 2's, Ravi et al. 2024, arXiv:2408.00714, section 6.1). Masks are
compared over the image.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, UInt8

from sam3_jax.datasets.annotations import Object, Pair
from sam3_jax.evaluation.predict import Progress
from sam3_jax.inference.mask_generator import MaskGeneration
from sam3_jax.inference.predictor import Sam3
from sam3_jax.inputs.preprocess import read_image
from sam3_jax.inputs.visual_prompts import ComputedPrompt
from sam3_jax.outputs.rle import decode
from sam3_jax.types import ImageEmbedding

Mask = Bool[np.ndarray, "h w"]

FOUND = 0.5  # IoU from which a mask is that of an object
MENDING = 2  # clicks after the first


def evaluate(
  model: Sam3, pairs: Sequence[Pair], images: str | Path, *, progress: Progress | None = None
) -> dict[str, float]:
  """Asks for each object of each image, once, whatever phrases name it.

  Args:
    model: with a head for visual prompts.
    pairs: of `annotations.read`; crowds are no objects.
    images: the folder that their file names are below.
    progress: is called with an image's name and the fraction done.

  Returns:
    Means over objects of the IoU in per cent: after one `click`, of the mask that the model thinks
    best, and `click_best` of the best of the three; after `three_clicks`, two of which mend; and
    after a `box`. And the number of `objects`.

  Raises:
    ValueError: no objects, or a checkpoint without the head.
    FileNotFoundError: an image is missing.
  """
  overlaps: dict[str, list[float]] = {}
  for image, objects in _images(pairs, images, progress):
    embedding = model.encode(image, visual=True)
    for name, values in _ask(model, embedding, objects).items():
      overlaps.setdefault(name, []).extend(values)
  figures = {name: 100 * float(np.mean(values)) for name, values in overlaps.items()}
  return figures | {"objects": len(overlaps["click"])}


def evaluate_everything(
  model: Sam3,
  pairs: Sequence[Pair],
  images: str | Path,
  options: MaskGeneration | None = None,
  *,
  progress: Progress | None = None,
) -> dict[str, float]:
  """Asks for everything in each image; arguments and errors as of `evaluate`.

  Args:
    options: of `Sam3.generate_masks`.

  Returns:
    In per cent, the `found` of all objects (a mask has an IoU of 0.5 with it or more, each mask
    standing for one object) and the `false` of all masks, those that stand for none; and the
    numbers of `objects` and `masks`.
  """
  objects_found = objects_there = masks = 0
  for image, objects in _images(pairs, images, progress):
    segments = model.generate_masks(image, options)
    truths = [_mask(one) for one in objects]
    overlaps = np.array(
      [[iou(mask, truth) for truth in truths] for mask in np.asarray(segments.masks)]
    )
    objects_found += len(matched(overlaps.reshape(len(segments), len(truths))))
    objects_there, masks = objects_there + len(objects), masks + len(segments)
  return {
    "found": 100 * objects_found / objects_there,
    "false": 100 * (masks - objects_found) / max(masks, 1),
    "objects": objects_there,
    "masks": masks,
  }


def matched(overlaps: np.ndarray) -> list[tuple[int, int]]:
  """Masks and objects that belong together, by their IoU [masks, objects]: the best pair first, as
  long as it is `FOUND` or more, each in one pair only."""
  left, pairs = np.array(overlaps, np.float64), []
  while left.size and left.max() >= FOUND:
    mask, one = np.unravel_index(left.argmax(), left.shape)
    pairs.append((int(mask), int(one)))
    left[mask], left[:, one] = -1, -1
  return pairs


class Heart(NamedTuple):
  """The point of a mask that is farthest from its edges, in pixels of the image, and how far."""

  x: float
  y: float
  depth: float


def heart(mask: Mask) -> Heart:
  """The first such point, by rows; of an empty mask, with depth 0."""
  from scipy import ndimage  # not at the top: it is slow to import

  distances: Any = ndimage.distance_transform_edt(np.pad(mask, 1))
  row, column = np.unravel_index(distances[1:-1, 1:-1].argmax(), mask.shape)
  return Heart(column + 0.5, row + 0.5, float(distances[row + 1, column + 1]))


def correction(mask: Mask, truth: Mask) -> tuple[tuple[float, float], int]:
  """Where a user would click next, and the label: at the heart of what is missing or of what is too
  much, whichever is deeper; on the object, if nothing is wrong."""
  missing, extra = heart(truth & ~mask), heart(mask & ~truth)
  label = int(missing.depth >= extra.depth)
  chosen = heart(truth) if missing.depth == extra.depth == 0 else missing if label else extra
  return (chosen.x, chosen.y), label


def iou(mask: Mask, truth: Mask) -> float:
  """Of two masks; 0 of two empty ones."""
  return float((mask & truth).sum() / max(1, (mask | truth).sum()))


def _ask(
  model: Sam3, embedding: ImageEmbedding, objects: Sequence[Object]
) -> Mapping[str, list[float]]:
  truths = [_mask(one) for one in objects]
  points = [[tuple(heart(truth)[:2])] for truth in truths]
  labels = [[1] for _ in truths]
  found = model.decode_visual(embedding, [ComputedPrompt(point) for point in points])
  chosen = np.asarray(found.iou).argmax(axis=1)
  readings = [
    [iou(mask, truth) for mask in np.asarray(masks)]
    for masks, truth in zip(found.masks(), truths, strict=True)
  ]
  figures = {
    "click": [of[k] for of, k in zip(readings, chosen, strict=True)],
    "click_best": [max(of) for of in readings],
  }
  for _ in range(MENDING):
    for masks, k, truth, point, label in zip(
      found.masks(), chosen, truths, points, labels, strict=True
    ):
      where, kind = correction(masks[int(k)], truth)
      point.append(where)
      label.append(kind)
    logits = np.asarray(found.mask_logits)
    prompts = [
      ComputedPrompt(point, label, mask=logits[i, chosen[i]])
      for i, (point, label) in enumerate(zip(points, labels, strict=True))
    ]
    found = model.decode_visual(embedding, prompts, multimask=False)
    chosen = np.zeros(len(truths), int)
  figures["three_clicks"] = _single(found, truths)
  boxes = [(x, y, x + w, y + h) for x, y, w, h in (one.box for one in objects)]
  found = model.decode_visual(
    embedding, [ComputedPrompt(box=box) for box in boxes], multimask=False
  )
  figures["box"] = _single(found, truths)
  return figures


def _single(found: Any, truths: Sequence[Mask]) -> list[float]:
  return [iou(masks[0], truth) for masks, truth in zip(found.masks(), truths, strict=True)]


def _images(
  pairs: Sequence[Pair], images: str | Path, progress: Progress | None
) -> Iterator[tuple[UInt8[np.ndarray, "h w 3"], list[Object]]]:
  """Images that have objects, each with all of its objects, once."""
  objects: dict[str, dict[Any, Object]] = {}
  for pair in pairs:
    own = objects.setdefault(pair.file_name, {})
    own |= {one.rle["counts"]: one for one in pair.objects if not one.crowd}
  there = {name: list(own.values()) for name, own in objects.items() if own}
  if not there:
    raise ValueError(f"none of the {len(pairs)} pairs has an object to ask for; give others.")
  for i, (name, own) in enumerate(there.items()):
    if progress is not None:
      progress(name, i / len(there))
    yield read_image(Path(images) / name), own


def _mask(one: Object) -> Mask:
  return decode(one.rle).astype(bool)
