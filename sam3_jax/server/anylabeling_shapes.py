"""Writes instances as shapes of X-AnyLabeling: rectangles or polygons, in pixels."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool
from pydantic import BaseModel, Field

from sam3_jax.batch.polygons import mask_to_polygons
from sam3_jax.server.known_images import Instance
from sam3_jax.server.simplify import perimeter, simplify

MIN_PART = 0.01  # parts of an instance smaller than this share of it have no polygon


class Shape(BaseModel):
  """A polygon or a rectangle, in pixels."""

  label: str
  shape_type: Literal["polygon", "rectangle"]
  points: list[list[float]]
  score: float
  group_id: int | None = Field(default=None, description="The same for the parts of an instance.")


def shapes(
  found: Sequence[tuple[str, Instance]], size: tuple[int, int], fineness: float | None
) -> list[Shape]:
  """The shapes of instances with their labels.

  Args:
    found: labels and instances.
    size: height and width of the image.
    fineness: the tolerance of polygons, as a share of their length; None for rectangles.
  """
  written = []
  for number, (label, instance) in enumerate(found, 1):
    mask = None if fineness is None else instance.mask()
    if fineness is None or mask is None:
      written.append(
        Shape(
          label=label, shape_type="rectangle", points=_corners(instance, size), score=instance.score
        )
      )
      continue
    parts = _polygons(mask, fineness)
    group = number if len(parts) > 1 else None
    written += [
      Shape(label=label, shape_type="polygon", points=part, score=instance.score, group_id=group)
      for part in parts
    ]
  return written


def _polygons(mask: Bool[np.ndarray, "h w"], fineness: float) -> list[list[list[float]]]:
  """Closed polygons of the parts of a mask, largest first; tiny parts are left out."""
  polygons = [(_area(polygon), polygon) for polygon in mask_to_polygons(mask)]
  total = sum(area for area, _ in polygons)
  polygons = sorted(polygons, key=lambda part: -part[0])
  kept = [polygon for area, polygon in polygons if area >= MIN_PART * total]
  simple = [simplify(polygon, fineness * perimeter(polygon)) for polygon in kept]
  return [np.concatenate([polygon, polygon[:1]]).tolist() for polygon in simple]


def _area(polygon: np.ndarray) -> float:
  x, y = polygon.T
  return abs(float(np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y))) / 2


def _corners(instance: Instance, size: tuple[int, int]) -> list[list[float]]:
  height, width = size
  x0, y0, x1, y1 = np.clip(instance.box, 0, [width, height] * 2).tolist()
  return [[x0, y0], [x1, y0], [x1, y1], [x0, y1]]
