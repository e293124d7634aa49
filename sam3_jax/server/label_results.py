"""Writes instances as regions of a Label Studio prediction, in percent of the image."""

import uuid
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from sam3_jax.batch.polygons import mask_to_polygons
from sam3_jax.server.brush_rle import encode_brush
from sam3_jax.server.known_images import Instance
from sam3_jax.server.label_config import BOXES, MASKS, POLYGONS, Control
from sam3_jax.server.simplify import simplify

POLYGON_TOLERANCE = 1.0  # pixels


def regions(
  control: Control, label: str, instance: Instance, image: str, size: tuple[int, int]
) -> list[dict[str, Any]]:
  """The regions of an instance: one, or for polygons one for each connected part.

  Args:
    control: brush, polygon or rectangle labels.
    label: one of its labels.
    image: `to_name`.
    size: height and width of the image as displayed, in pixels.
  """
  height, width = size
  values = []
  mask = instance.mask() if control.type in (MASKS, POLYGONS) else None
  if control.type == MASKS and mask is not None and mask.any():
    values = [{"format": "rle", "rle": encode_brush(mask)}]
  elif control.type == POLYGONS and mask is not None:
    values = [{"points": points, "closed": True} for points in _polygons(mask)]
  elif control.type == BOXES:
    values = [_rectangle(instance.box, height, width)]
    values = [value for value in values if value["width"] > 0 and value["height"] > 0]
  return [
    {
      "id": uuid.uuid4().hex[:10],
      "from_name": control.name,
      "to_name": image,
      "type": control.type,
      "original_width": width,
      "original_height": height,
      "image_rotation": 0,
      "score": instance.score,
      "value": value | {control.type: [label]},
    }
    for value in values
  ]


def _polygons(mask: Bool[np.ndarray, "h w"]) -> list[list[list[float]]]:
  height, width = mask.shape
  percent = 100 / np.array([width, height])
  parts = (simplify(polygon, POLYGON_TOLERANCE) for polygon in mask_to_polygons(mask))
  return [(part * percent).round(4).tolist() for part in parts]


def _rectangle(box: Float[np.ndarray, "4"], height: int, width: int) -> dict[str, float]:
  size = np.array([width, height])
  corners = np.clip(np.asarray(box, np.float64).reshape(2, 2), 0, size) * 100 / size
  (x, y), (w, h) = corners[0].round(4).tolist(), (corners[1] - corners[0]).round(4).tolist()
  return {"x": x, "y": y, "width": w, "height": h, "rotation": 0}
