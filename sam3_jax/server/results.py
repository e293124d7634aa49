"""Results as JSON values: masks as run lengths, polygons or 1-bit PNG; and masks as prompts."""

import base64
import io
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from sam3_jax.batch.polygons import mask_to_polygons
from sam3_jax.ops.masks import mask_to_box
from sam3_jax.outputs.instances import Instances
from sam3_jax.outputs.masks import LazyMasks, Masks
from sam3_jax.outputs.rle import bounds, runs
from sam3_jax.server.errors import ApiError
from sam3_jax.server.settings import MAX_MASK_PIXELS

FORMATS = ("rle", "polygons", "png", "none")
_SAMPLES = 4  # of a mask prompt for each cell of the grid, along each side
# The logits of a mask that was given without logits, as SAM 2 makes them: -10 outside, 10 inside.
_LOGIT = 10.0


def check_masks(count: int, size: tuple[int, int], form: str) -> None:
  """Refuses masks that would take too long to write.

  Args:
    count: of the masks.
    size: height and width of the image.
    form: one of `FORMATS`.

  Raises:
    ApiError: they have more pixels than `MAX_MASK_PIXELS` allows.
  """
  height, width = size
  if (pixels := count * height * width) > (limit := MAX_MASK_PIXELS.get(form, pixels)):
    raise ApiError(
      "too_many_pixels",
      f"{count} masks of {width} x {height} pixels have {pixels:,} pixels, and a response with "
      f"format {form} takes {limit:,}; raise the threshold, lower max_detections, or send a "
      "smaller image.",
    )


def instances_as_json(found: Instances, form: str) -> list[dict[str, Any]]:
  """Instances in their order; see `mask_as_json`."""
  return [
    {"score": float(score), "box": [float(x) for x in box]} | mask_as_json(found.masks, i, form)
    for i, (score, box) in enumerate(zip(found.scores, found.boxes, strict=True))
  ]


def visual_as_json(
  logits: Float[np.ndarray, "K Hm Wm"],
  iou: Float[np.ndarray, " K"],
  size: tuple[int, int],
  form: str,
) -> list[dict[str, Any]]:
  """The masks of a visual prompt in the model's order, with boxes of the masks.

  Args:
    logits: of the masks.
    iou: their estimated IoU.
    size: height and width of the image.
    form: one of `FORMATS`. With "none" the boxes are of the decoder's grid, stretched to the image.
  """
  masks, rows = Masks(logits, size), []
  for k, score in enumerate(iou):
    if form == "none":
      height, width = logits.shape[1:]
      stretch = np.tile([size[1] / width, size[0] / height], 2)
      box = np.asarray(mask_to_box(logits[k] > 0)) * stretch
      rows.append({"score": float(score), "box": box.tolist(), "area": -1, "mask": None})
      continue
    value = mask_as_json(masks, k, form)
    rle = value["mask"] if form == "rle" else masks.rle(k)
    x, y, w, h = bounds(rle)
    rows.append({"score": float(score), "box": [x, y, x + w, y + h]} | value)
  return rows


def mask_as_json(masks: LazyMasks, index: int, form: str) -> dict[str, Any]:
  """The mask of an instance in one of `FORMATS`, and its area in pixels (-1 with "none")."""
  if form == "none":
    return {"area": -1, "mask": None}
  if form == "rle":
    rle = masks.rle(index)
    return {"area": int(runs(rle)[1::2].sum()), "mask": rle}
  mask = masks[index]
  area = int(np.count_nonzero(mask))
  if form == "png":
    return {"area": area, "mask": _png(mask)}
  polygons = mask_to_polygons(mask)
  return {"area": area, "mask": [polygon.reshape(-1).tolist() for polygon in polygons]}


def mask_logits(
  rle: dict[str, Any], size: tuple[int, int], side: int
) -> Float[np.ndarray, "Hm Wm"]:
  """The logits of a mask over the image, on the decoder's grid, as the prompt of `decode_visual`.

  Takes the same time for an image of any size: it samples the run lengths.

  Args:
    rle: COCO's compressed run lengths.
    size: height and width of the image, which the mask must have.
    side: of the decoder's grid.

  Raises:
    ValueError: the mask has another size, is damaged, or is empty.
  """
  ends = np.cumsum(runs(rle, size))
  height, width = size
  centers = (np.arange(side * _SAMPLES) + 0.5) / (side * _SAMPLES)
  y, x = ((centers * length).astype(np.int64) for length in (height, width))
  pixel = x[None, :] * height + y[:, None]  # runs go down the columns
  inside = np.searchsorted(ends, pixel, side="right") % 2
  share = inside.reshape(side, _SAMPLES, side, _SAMPLES).mean(axis=(1, 3))
  if not share.any():
    raise ValueError("its mask is empty; give a mask with pixels, or points or a box")
  return ((2 * share - 1) * _LOGIT).astype(np.float32)


def _png(mask: np.ndarray) -> str:
  buffer = io.BytesIO()
  Image.fromarray(mask).save(buffer, "PNG")
  return base64.b64encode(buffer.getvalue()).decode("ascii")
