"""Reads what an annotator drew with Label Studio's smart tools, as prompts."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from sam3_jax.server.errors import ApiError
from sam3_jax.server.label_config import BOXES, POINTS, LabelConfig
from sam3_jax.server.schemas import Concept, Visual
from sam3_jax.utils.json_text import shown

TEXT = "textarea"
MAX_REGIONS = 200


class Context(NamedTuple):
  """The prompts of an annotator.

  Attributes:
    label: of the last region, which its results get; None if it has none.
    concepts: phrases with exemplar boxes.
    visual: points and boxes around single objects.
  """

  label: str | None
  concepts: list[Concept]
  visual: list[Visual]


def read_context(regions: Any, config: LabelConfig, width: int, height: int) -> Context:
  """Converts the regions of `params.context.result` to prompts.

  Key points and a box describe one object. Several boxes describe one object each. Boxes of a
  control with `model_box="exemplar"`, and all boxes beside a text, are exemplars of a concept.

  Args:
    regions: of the request, in percent of the image.
    config: of the project.
    width, height: of the image in pixels.

  Raises:
    ApiError: the regions are invalid, or hold no prompt.
  """
  if not isinstance(regions, list) or len(regions) > MAX_REGIONS:
    raise _bad(f"context.result must be a list of at most {MAX_REGIONS} regions.")
  points, boxes, phrases, label = [], [], [], None
  exemplars = False
  for region in regions:
    kind, value = _parts(region)
    positive = int(bool(region.get("is_positive", True)))
    if kind == POINTS:
      points.append(([_pixel(value, "x", width), _pixel(value, "y", height)], positive))
    elif kind == BOXES:
      boxes.append((_box(value, width, height), positive))
      control = config.named(region.get("from_name"))
      exemplars |= control is not None and control.boxes_are_exemplars
    elif kind == TEXT:
      phrases += _phrases(value.get("text"))
    names = value.get(kind)
    if isinstance(names, list) and names and isinstance(names[0], str):
      label = names[0]
  if phrases or (boxes and exemplars):
    drawn = {"boxes": [box for box, _ in boxes], "box_labels": [one for _, one in boxes]}
    concepts = [Concept(phrase=phrase, **drawn) for phrase in phrases or [None]]
    return Context(label, concepts, _visual(points, []))
  around = [box for box, positive in boxes if positive]
  visual = _visual(points, around)
  if not around and not any(positive for _, positive in points):
    raise _bad("context.result has no positive key point, box or text; draw one.")
  return Context(label, [], visual)


def _visual(
  points: Sequence[tuple[list[float], int]], boxes: Sequence[list[float]]
) -> list[Visual]:
  """Visual prompts of points and boxes."""
  clicks = {"points": [point for point, _ in points], "point_labels": [one for _, one in points]}
  ambiguous = len(points) == 1 and not boxes
  if len(boxes) <= 1:
    box = boxes[0] if boxes else None
    return [Visual(**clicks, box=box, multimask=ambiguous)] if points or boxes else []
  prompts = [Visual(box=box, multimask=False) for box in boxes]
  return prompts + ([Visual(**clicks, multimask=len(points) == 1)] if points else [])


def _parts(region: Any) -> tuple[str, dict[str, Any]]:
  """Type and value of a region."""
  value = region.get("value") if isinstance(region, dict) else None
  kind = region.get("type") if isinstance(region, dict) else None
  if not isinstance(value, dict) or not isinstance(kind, str):
    raise _bad(f"a region must have a type and a value; got {shown(region)}.")
  return kind, value


def _number(value: dict[str, Any], name: str) -> float:
  number = value.get(name, 0.0 if name == "rotation" else None)
  is_number = isinstance(number, int | float) and not isinstance(number, bool)
  if not is_number or not math.isfinite(number) or abs(number) > 1e6:
    raise _bad(f"{name} of a region must be a number in percent; got {shown(number)}.")
  return float(number)


def _pixel(value: dict[str, Any], name: str, length: int) -> float:
  """A coordinate in pixels, inside of the image."""
  return min(max(_number(value, name) * length / 100, 0.0), float(length))


def _box(value: dict[str, Any], width: int, height: int) -> list[float]:
  """A box in pixels, xyxy; of a rotated rectangle, the box around it."""
  x, y = _number(value, "x") * width / 100, _number(value, "y") * height / 100
  w, h = _number(value, "width") * width / 100, _number(value, "height") * height / 100
  angle = math.radians(_number(value, "rotation"))  # clockwise around the first corner
  right, down = (
    np.array([math.cos(angle), math.sin(angle)]),
    np.array([-math.sin(angle), math.cos(angle)]),
  )
  corners = np.array([x, y]) + np.array([0 * right, w * right, h * down, w * right + h * down])
  corners = np.clip(corners, 0, [width, height])
  return [*corners.min(axis=0).tolist(), *corners.max(axis=0).tolist()]


def _phrases(text: Any) -> list[str]:
  lines = text if isinstance(text, list) else [text]
  if not all(isinstance(line, str) for line in lines):
    raise _bad(f"text of a region must be strings; got {shown(text)}.")
  return [phrase.strip() for line in lines for phrase in line.split(",") if phrase.strip()]


def _bad(message: str) -> ApiError:
  return ApiError("invalid_prompt", message)
