"""Label Studio's protocol for ML backends: predictions for tasks, and for an annotator's clicks.

Label Studio sends tasks with the project's label config. Without a context, each label is a text
prompt. With a context, an annotator drew key points or boxes, and waits for the result.
"""

import asyncio
import math
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from sam3_jax import __version__
from sam3_jax.server.data_uri import is_data_uri, read_data_uri
from sam3_jax.server.errors import ApiError, refusing_prompts
from sam3_jax.server.json_body import JsonRoute
from sam3_jax.server.known_images import Instance, KnownImages
from sam3_jax.server.label_config import BOXES, Control, Label, LabelConfig, parse_label_config
from sam3_jax.server.label_context import read_context
from sam3_jax.server.label_results import regions
from sam3_jax.server.origin_client import OriginClient, parse_origin
from sam3_jax.server.schemas import Concept, PromptsRequest, error_responses
from sam3_jax.server.service import Service
from sam3_jax.server.settings import MAX_PROMPTS
from sam3_jax.utils.json_text import shown

PREFIX = "/label-studio"
THRESHOLD = 0.5  # without model_score_threshold
MAX_TASKS = 16  # more would take longer than the 100 s for which Label Studio waits
_FETCHES = 4  # at a time
_AGAIN = ("busy", "not_ready")  # errors that concern the server, not a task


class _Sent(BaseModel):
  """Label Studio sends more fields, and new versions send others."""

  model_config = ConfigDict(extra="ignore")


class Task(_Sent):
  data: dict[str, Any] = Field(description="Fields of the task; one contains the image.")


class Params(_Sent):
  context: dict[str, Any] | None = Field(default=None, description="What an annotator drew.")


class PredictRequest(_Sent):
  """Tasks to predict."""

  model_config = ConfigDict(
    extra="ignore",
    json_schema_extra={
      "examples": [
        {
          "tasks": [{"id": 1, "data": {"image": "/data/upload/1/lions.jpg"}}],
          "label_config": '<View><Image name="image" value="$image"/><BrushLabels name="brush" '
          'toName="image"><Label value="lion"/></BrushLabels></View>',
        }
      ]
    },
  )
  tasks: list[Task] = Field(min_length=1, max_length=100_000)
  label_config: str
  params: Params | None = None


class PredictResponse(BaseModel):
  """A prediction for each task, in their order; an empty list for a task that failed."""

  results: list[Any]
  model_version: str


class SetupResponse(BaseModel):
  model_version: str


class Health(BaseModel):
  status: str
  model_class: str


class Backend:
  """Predicts tasks. Its images are known by their content, over all requests."""

  def __init__(self, service: Service):
    settings = service.settings
    self.version = f"{service.model.info.get('name', 'sam3')} ({__version__})"
    self._images = KnownImages(service)
    self._max_bytes = settings.max_bytes
    self._fetching = asyncio.Semaphore(_FETCHES)
    self._site: OriginClient | None = None
    if settings.label_studio_url is not None:
      origin = parse_origin(settings.label_studio_url)
      self._site = OriginClient(origin, settings.label_studio_key, max_bytes=self._max_bytes)

  async def predict(self, request: Request, sent: PredictRequest) -> list[Any]:
    """The prediction of each task.

    Of several tasks, those that fail have an empty list, and Label Studio continues.

    Raises:
      ApiError: the label config or the only task is invalid, all tasks failed, or the server is
        busy.
    """
    try:
      config = parse_label_config(sent.label_config)
    except ValueError as error:
      raise ApiError("bad_request", str(error)) from None
    context = sent.params.context if sent.params else None
    if len(sent.tasks) > MAX_TASKS:
      # For one result for many tasks, Label Studio sends the tasks again, one by one.
      return [[]]
    results, first = [], None
    for task in sent.tasks:
      try:
        results.append(await self._task(request, task, config, context))
      except ApiError as error:
        if error.code in _AGAIN:
          raise
        first = first or error
        results.append([])
    if first is not None and not any(results):
      raise first
    return results

  async def _task(
    self, request: Request, task: Task, config: LabelConfig, context: dict[str, Any] | None
  ) -> dict[str, Any]:
    data = await self._read(task.data.get(config.field), config.field)
    image = await self._images.upload(request, data)
    size = image.height, image.width
    if context is None:
      found = await self._labels(request, data, config)
    else:
      found = await self._drawn(request, data, config, context, size)
    written, score = await asyncio.to_thread(_write, found, config.image, size)
    return {"result": written, "score": score, "model_version": self.version}

  async def _read(self, source: Any, field: str) -> bytes:
    if not isinstance(source, str):
      raise ApiError(
        "bad_request", f"data.{field} of a task must be a string; got {shown(source)}."
      )
    if is_data_uri(source):
      return await asyncio.to_thread(read_data_uri, source, self._max_bytes)
    if self._site is None:
      raise ApiError(
        "bad_request",
        f"the image {shown(source)} is not a data URI; to read files of Label Studio, start the "
        "server with --label-studio-url URL.",
      )
    async with self._fetching:
      return await asyncio.to_thread(self._site.read, source)

  async def _labels(
    self, request: Request, data: bytes, config: LabelConfig
  ) -> list[tuple[Control, str, Instance]]:
    """Instances of all labels, found by their phrases."""
    wanted = [
      (control, label, phrase)
      for control, label in config.result_labels()
      for phrase in label.phrases
    ]
    found: list[tuple[Control, str, Instance]] = []
    for start in range(0, len(wanted), MAX_PROMPTS):
      part = wanted[start : start + MAX_PROMPTS]
      rows = await self._concepts(request, data, part)
      for (control, label, _), instances in zip(part, rows, strict=True):
        limit = _threshold(control)
        found += [(control, label.name, one) for one in instances if one.score > limit]
    return found

  async def _concepts(
    self, request: Request, data: bytes, wanted: Sequence[tuple[Control, Label, str]]
  ) -> list[list[Instance]]:
    with refusing_prompts():
      asked = PromptsRequest(
        concepts=[Concept(phrase=phrase) for _, _, phrase in wanted],
        threshold=min(_threshold(control) for control, _, _ in wanted),
        format="none" if all(control.type == BOXES for control, _, _ in wanted) else "rle",
      )
    return (await self._images.prompts(request, data, asked))[0]

  async def _drawn(
    self,
    request: Request,
    data: bytes,
    config: LabelConfig,
    context: dict[str, Any],
    size: tuple[int, int],
  ) -> list[tuple[Control, str, Instance]]:
    """What an annotator's key points, boxes and text describe."""
    with refusing_prompts():
      drawn = read_context(context.get("result"), config, size[1], size[0])
      control, label = _target(config, drawn.label, [one.phrase for one in drawn.concepts])
      asked = PromptsRequest(
        concepts=drawn.concepts, visual=drawn.visual, threshold=_threshold(control), format="rle"
      )
    concepts, visual = await self._images.prompts(request, data, asked)
    found = [one for instances in concepts for one in instances]
    found += [max(masks, key=lambda one: one.score) for masks in visual]
    return [(control, label, one) for one in found]


def router(service: Service) -> APIRouter:
  """Routes of the protocol below /label-studio.

  Raises:
    ValueError: `label_studio_url` of the settings is invalid.
  """
  backend = Backend(service)
  routes = APIRouter(
    prefix=PREFIX,
    tags=["Label Studio"],
    route_class=JsonRoute,
    responses=error_responses(413, 415, 429, 503),
  )

  @routes.get("/")
  @routes.get("/health")
  async def health() -> Health:
    """Reports that the server is running."""
    return Health(status="UP", model_class="sam3-jax")

  @routes.post("/setup")
  async def setup() -> SetupResponse:
    """Returns the version of the model; `hostname` and `access_token` are not used."""
    return SetupResponse(model_version=backend.version)

  @routes.get("/versions")
  async def versions() -> dict[str, list[str]]:
    """Returns the only version of the model."""
    return {"versions": [backend.version]}

  @routes.post("/predict")
  async def predict(request: Request, sent: PredictRequest) -> PredictResponse:
    """Predicts tasks, from the label config or from what an annotator drew."""
    return PredictResponse(
      results=await backend.predict(request, sent), model_version=backend.version
    )

  @routes.post("/webhook")
  async def webhook() -> dict[str, str]:
    """Ignores changed annotations: the model is not trained on them."""
    return {}

  return routes


def _write(
  found: Sequence[tuple[Control, str, Instance]], image: str, size: tuple[int, int]
) -> tuple[list[dict[str, Any]], float]:
  """The regions of instances, and their mean score."""
  written, scores = [], []
  for control, label, instance in found:
    rows = regions(control, label, instance, image, size)
    written += rows
    scores += [instance.score] * bool(rows)
  return written, math.fsum(scores) / len(scores) if scores else 0.0


def _threshold(control: Control) -> float:
  return THRESHOLD if control.threshold is None else control.threshold


def _target(
  config: LabelConfig, name: str | None, phrases: Sequence[str | None]
) -> tuple[Control, str]:
  """The control and the label of a drawn region's results.

  It is the region's own label, or one that a text names, or the first label.
  """
  labels = list(config.result_labels())
  for control, label in labels:
    if label.name == name:
      return control, label.name
  named = {phrase.casefold() for phrase in phrases if phrase}
  for control, label in labels:
    if named & {phrase.casefold() for phrase in label.phrases}:
      return control, label.name
  control, label = labels[0]
  return control, label.name
