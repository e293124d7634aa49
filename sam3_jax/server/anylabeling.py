"""X-AnyLabeling's protocol for remote inference: text, boxes and points, answered with shapes.

Its "Remote-Server" lists the models of a server, shows the controls that a model's tasks name, and
sends the whole image as base64 with each prompt.
"""

import asyncio
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from sam3_jax.server.anylabeling_shapes import Shape, shapes
from sam3_jax.server.data_uri import is_data_uri, read_base64, read_data_uri
from sam3_jax.server.errors import ApiError, refusing_prompts
from sam3_jax.server.json_body import JsonRoute
from sam3_jax.server.known_images import KnownImages
from sam3_jax.server.schemas import (
  Concept,
  Fraction,
  Number,
  PromptsRequest,
  Visual,
  error_responses,
)
from sam3_jax.server.service import Service
from sam3_jax.server.settings import MAX_PROMPTS
from sam3_jax.utils.json_text import shown

PREFIX = "/anylabeling"
MODEL = "sam3-jax"
CONCEPT_MASKS, CONCEPT_BOXES, OBJECT = "concept-polygons", "concept-boxes", "object"  # tasks
IN_PROGRESS = "AUTOLABEL_OBJECT"  # the label of a shape that the client will ask a label for
MAX_MARKS = 200
MAX_TEXT = 10_000  # characters
_SEPARATOR = re.compile(r",|\.(?=\s|$)")

_RUN = dict.fromkeys(
  ("button_clear", "button_finish_object", "toggle_preserve_existing_annotations")
)
_CONCEPT = dict.fromkeys(
  (
    "edit_text",
    "button_send",
    "add_pos_rect",
    "add_neg_rect",
    "button_run_rect",
    "input_conf",
    "edit_conf",
  )
)
_POINTS = dict.fromkeys(("button_add_point", "button_remove_point", "button_add_rect"))
_FINENESS = dict.fromkeys(("mask_fineness_slider", "mask_fineness_value_label"))
_VALUES = {
  "edit_conf": 0.5,
  "mask_fineness_slider": 10,
  "toggle_preserve_existing_annotations": False,
}


class Mark(BaseModel):
  """A point [x, y] or a box [x0, y0, x1, y1] in pixels; the label is 1 (on) or 0 (off)."""

  model_config = ConfigDict(extra="ignore")
  type: Literal["point", "rectangle"]
  data: Annotated[list[Number], Field(min_length=2, max_length=4)]
  label: Literal[0, 1] = 1


class Params(BaseModel):
  """What the client sets; it sends more, for other models."""

  model_config = ConfigDict(extra="ignore")
  text_prompt: Annotated[str, Field(max_length=MAX_TEXT)] | None = None
  marks: Annotated[list[Mark], Field(max_length=MAX_MARKS)] = []
  conf_threshold: Fraction = 0.5
  epsilon_factor: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.001
  current_task: str | None = None


class PredictRequest(BaseModel):
  """An image and prompts."""

  model_config = ConfigDict(
    extra="ignore",
    json_schema_extra={
      "examples": [
        {
          "model": MODEL,
          "image": "data:image/png;base64,iVBORw0KGgo=",
          "params": {"text_prompt": "lion", "conf_threshold": 0.5},
        }
      ]
    },
  )
  model: str
  image: str = Field(description="A data URI, or base64 alone.")
  params: Params = Params()


class Shapes(BaseModel):
  shapes: list[Shape]
  description: str = ""


class PredictResponse(BaseModel):
  success: Literal[True] = True
  data: Shapes


class ModelsResponse(BaseModel):
  success: Literal[True] = True
  data: dict[str, Any]


class Health(BaseModel):
  status: str
  models_loaded: int


class Backend:
  """Answers prompts. Its images are known by their content, over all requests."""

  def __init__(self, service: Service):
    self._images = KnownImages(service)
    self._max_bytes = service.settings.max_bytes

  async def predict(self, request: Request, sent: PredictRequest) -> list[Shape]:
    """The shapes for an image's prompts; none without prompts.

    Raises:
      ApiError: the model is unknown, or the image or a prompt is invalid.
    """
    if sent.model != MODEL:
      raise ApiError("not_found", f"there is no model {shown(sent.model)}; use {MODEL}.")
    params = sent.params
    with refusing_prompts():
      labels, asked = _prompts(params)
    if asked is None:
      return []
    data = await asyncio.to_thread(self._read, sent.image)
    image = await self._images.upload(request, data)
    concepts, visual = await self._images.prompts(request, data, asked)
    found = [
      (label, one) for label, instances in zip(labels, concepts, strict=True) for one in instances
    ]
    found += [(IN_PROGRESS, max(masks, key=lambda one: one.score)) for masks in visual]
    fineness = None if params.current_task == CONCEPT_BOXES else params.epsilon_factor
    return await asyncio.to_thread(shapes, found, (image.height, image.width), fineness)

  def _read(self, image: str) -> bytes:
    if is_data_uri(image):
      return read_data_uri(image, self._max_bytes)
    return read_base64(image, self._max_bytes)


def router(service: Service) -> APIRouter:
  """Routes of the protocol below /anylabeling."""
  backend = Backend(service)
  info = _model_info(str(service.model.info.get("name", "SAM 3")))
  routes = APIRouter(
    prefix=PREFIX,
    tags=["X-AnyLabeling"],
    route_class=JsonRoute,
    responses=error_responses(404, 413, 415, 429, 503),
  )

  @routes.get("/health")
  async def health() -> Health:
    """Reports that the server is running."""
    return Health(status="healthy", models_loaded=1)

  @routes.get("/v1/models")
  async def models() -> ModelsResponse:
    """Lists the model with its tasks and their controls."""
    return ModelsResponse(data={MODEL: info})

  @routes.get("/v1/models/{model}/info")
  async def model(model: str) -> ModelsResponse:
    """Describes the model."""
    if model != MODEL:
      raise ApiError("not_found", f"there is no model {shown(model)}; use {MODEL}.")
    return ModelsResponse(data={"model_id": MODEL} | info)

  @routes.post("/v1/predict")
  async def predict(request: Request, sent: PredictRequest) -> PredictResponse:
    """Segments what text, boxes and points describe."""
    return PredictResponse(data=Shapes(shapes=await backend.predict(request, sent)))

  return routes


def _model_info(name: str) -> dict[str, Any]:
  """What the client needs to show a model: tasks, and the widgets of each."""
  widgets = _CONCEPT | _POINTS | _FINENESS | _RUN | {"remote_task_select_combobox": None}
  tasks = [
    (CONCEPT_MASKS, "Concept: polygons", _CONCEPT | _FINENESS | _RUN, "text_prompt"),
    (CONCEPT_BOXES, "Concept: boxes", _CONCEPT | _RUN, "text_prompt"),
    (OBJECT, "One object: polygon", _POINTS | _FINENESS | _RUN, None),
  ]
  return {
    "display_name": f"sam3-jax: {name}",
    "batch_processing_mode": "text_prompt",
    "widgets": [{"name": widget, "value": _VALUES.get(widget)} for widget in widgets],
    "available_tasks": [
      {
        "id": task,
        "name": title,
        "batch_processing_mode": mode,
        "active_widgets": {widget: {} for widget in active},
      }
      for task, title, active, mode in tasks
    ],
  }


def _prompts(params: Params) -> tuple[list[str], PromptsRequest | None]:
  """The label of each concept's shapes, and the request; None without prompts.

  Points describe one object. Boxes are exemplars, except for the task of one object and beside
  points.
  """
  points = [mark for mark in params.marks if mark.type == "point"]
  boxes = [mark for mark in params.marks if mark.type == "rectangle"]
  if any(len(mark.data) != 2 for mark in points) or any(len(mark.data) != 4 for mark in boxes):
    raise ApiError("invalid_prompt", "a point needs data [x, y], a rectangle [x0, y0, x1, y1].")
  texts = _SEPARATOR.split(params.text_prompt or "")
  phrases = list(dict.fromkeys(text.strip() for text in texts if text.strip()))[:MAX_PROMPTS]
  if points or (boxes and params.current_task == OBJECT):
    visual = _visual(points, boxes)
    return [], PromptsRequest(visual=visual, format="rle") if visual else None
  if not phrases and not any(mark.label for mark in boxes):
    return [], None
  drawn = {
    "boxes": [_ordered(mark.data) for mark in boxes],
    "box_labels": [mark.label for mark in boxes],
  }
  concepts = [Concept(phrase=phrase, **drawn) for phrase in phrases or [None]]
  form = "none" if params.current_task == CONCEPT_BOXES else "rle"
  sent = PromptsRequest(concepts=concepts, threshold=params.conf_threshold, format=form)
  return phrases or [IN_PROGRESS], sent


def _visual(points: Sequence[Mark], boxes: Sequence[Mark]) -> list[Visual]:
  """A prompt for one object, of its points and the last positive box; none if all are negative."""
  around = [_ordered(mark.data) for mark in boxes if mark.label]
  if not around and not any(mark.label for mark in points):
    return []
  return [
    Visual(
      points=[mark.data for mark in points],
      point_labels=[mark.label for mark in points],
      box=around[-1] if around else None,
      multimask=len(points) == 1 and not around,
    )
  ]


def _ordered(box: Sequence[float]) -> list[float]:
  """The box drawn from any corner as x0, y0, x1, y1."""
  x0, y0, x1, y1 = box
  return [min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)]
