"""What the routes and the adapters for label tools share: upload an image, prompt it.

Images are decoded in processes, embeddings are loaded and results are converted in threads, so
neither the event loop nor the device waits for them.
"""

import asyncio
import atexit
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import Request

from sam3_jax.checkpoint.bundle import VISUAL
from sam3_jax.inference.mask_generator import MaskGeneration, segment_embedding
from sam3_jax.inference.predictor import Sam3
from sam3_jax.inputs.prompts import Prompt, check_boxes
from sam3_jax.inputs.visual_prompts import VisualPrompt, check_visual
from sam3_jax.outputs.detections import VisualMasks
from sam3_jax.server import results
from sam3_jax.server.device_work import Concept, DeviceWork, Image, Unit, Visual
from sam3_jax.server.disconnect import Disconnected, in_pool, result
from sam3_jax.server.engine import IMAGES, POINTS, PROMPTS, Engine, Outcome
from sam3_jax.server.errors import ApiError, busy
from sam3_jax.server.metrics import Metrics
from sam3_jax.server.readers import Readers
from sam3_jax.server.schemas import EverythingRequest, PromptsRequest
from sam3_jax.server.settings import MAX_PROMPTS, Settings
from sam3_jax.server.store import Store, StoredImage
from sam3_jax.server.warm_up import Compiler, Step, warm_up

THREADS = 4  # that load embeddings and convert results


class Service:
  """A model with its engine, store and readers.

  Attributes:
    model, settings, metrics: the arguments.
    engine, store, readers: of this service.
    visual: whether the model takes visual prompts.
  """

  def __init__(
    self,
    model: Sam3,
    settings: Settings,
    metrics: Metrics,
    *,
    log_error: Callable[[BaseException], None] = lambda _: None,
    max_batch: int | None = None,
  ):
    self.model, self.settings, self.metrics = model, settings, metrics
    self.visual = VISUAL in model.params
    self.engine = Engine(
      DeviceWork(model, max_batch), max_images=settings.max_images,
      max_prompts=settings.max_waiting_prompts, meter=metrics, log=log_error,
    )  # fmt: skip
    self.store = Store(
      memory=settings.memory, disk=settings.disk, origin=model.origin,
      expire_seconds=settings.expire_seconds, directory=settings.store,
    )  # fmt: skip
    self.readers = Readers(model.config.image_size, settings)
    self._pool = ThreadPoolExecutor(THREADS, "sam3-results")
    self._everything = ThreadPoolExecutor(settings.max_everything, "sam3-everything")
    self._uploads = self._generations = 0
    self._compiler = Compiler(model, self.engine)
    metrics.watch("images_waiting", "Uploads in the queue.", lambda: self.engine.waiting(IMAGES))
    metrics.watch("prompts_waiting", "Prompts in the queue.", lambda: self.engine.waiting(PROMPTS))
    metrics.watch("store_images", "Encoded images.", lambda: len(self.store))
    metrics.watch("store_memory_bytes", "Embeddings in memory.", lambda: self.store.memory_bytes)
    metrics.watch("store_disk_bytes", "Embeddings on disk.", lambda: self.store.disk_bytes)

  def start(
    self, step: Step, compiled: bool = True, failed: Callable[[], object] = lambda: None
  ) -> None:
    """Starts the engine; with `compiled`, it compiles the common programs first.

    Args:
      step: is told of the progress.
      compiled: compile before work is accepted.
      failed: is called if that fails.
    """
    threading.Thread(target=self._start_readers, daemon=True).start()
    if not compiled:
      self.engine.start()
      return
    self.engine.start(
      lambda: warm_up(self.model, step), ready=lambda: step("ready", 1.0), failed=failed
    )
    self._compiler.start()

  def _start_readers(self) -> None:
    """Starts all readers but the first once the programs are compiled, which takes all cores."""
    while not self.engine.wait_ready(1.0):
      if self.engine.error or self.readers.is_closed:
        return
    self.readers.start_rest()

  @property
  def is_compiling(self) -> bool:
    """Whether a thread compiles or computes, even after `stop`."""
    return self.engine.is_running or self._compiler.is_running

  def stop(self) -> None:
    """Finishes what waits, ends threads and processes, deletes temporary files.

    Programs that are being compiled are not waited for now, but when Python ends: XLA would crash
    if it were torn down while it compiles.
    """
    self._compiler.stop()
    self.engine.stop()
    for part in (self._compiler, self.engine):
      if part.is_running:
        atexit.register(part.stop, None)
    self.readers.close()
    for pool in (self._pool, self._everything):
      pool.shutdown(wait=True, cancel_futures=True)
    self.store.close()

  async def upload(self, request: Request, file: Path, session: str | None) -> dict[str, Any]:
    """Reads and encodes an image; deletes the file.

    Args:
      request: of the client, whose disconnection drops the work.
      file: with the bytes of the image.
      session: that will own the image; None for none.

    Returns:
      A value as `schemas.UploadResponse`.

    Raises:
      ApiError: the file is not a usable image, or the queue is full.
    """
    start = time.perf_counter()
    try:
      if self._uploads >= self.settings.max_images:
        raise busy(self._uploads * 0.1, f"{self._uploads} images are waiting to be read")
      self._uploads += 1
      try:
        image = await in_pool(request, self.readers.pool, self.readers.read, file)
      finally:
        self._uploads -= 1
    finally:
      file.unlink(missing_ok=True)
    read = 1000 * (time.perf_counter() - start)
    future = self.engine.submit(IMAGES, [Unit(Image(image.pixels, image.size))])
    done = await result(request, future)
    identity = await in_pool(
      request, self._pool, self.store.add, done.values[0], image.size, session
    )
    height, width = image.size
    times = {"read": read, "queue": done.queue, "encode": done.device}
    return {"id": identity, "width": width, "height": height, "milliseconds": _rounded(times)}

  async def prompt(
    self, request: Request, stored: StoredImage, asked: PromptsRequest
  ) -> dict[str, Any]:
    """Decodes prompts; returns a value as `schemas.PromptsResponse`.

    Raises:
      ApiError: an invalid prompt, or the queue is full.
    """
    if not asked.concepts and not asked.visual:
      raise ApiError("invalid_prompt", "there is no prompt; give concepts, visual, or both.")
    if (count := len(asked.concepts) + len(asked.visual)) > MAX_PROMPTS:
      raise ApiError("too_many_prompts", f"a request takes {MAX_PROMPTS} prompts; got {count}.")
    concepts, visual = await in_pool(request, self._pool, self._parse, stored, asked)
    embedding = await in_pool(request, self._pool, self.store.load, stored)
    units = [Unit(Concept(embedding, prompt, asked.threshold)) for prompt in concepts]
    units += [Unit(Visual(embedding, prompt, multimask)) for prompt, multimask in visual]
    done = await result(request, self.engine.submit(PROMPTS, units))
    start = time.perf_counter()
    value = await in_pool(request, self._pool, _converted, done, concepts, stored.size, asked)
    times = {"queue": done.queue, "decode": done.device}
    times["masks"] = 1000 * (time.perf_counter() - start)
    return value | {"milliseconds": _rounded(times)}

  async def everything(
    self, request: Request, stored: StoredImage, asked: EverythingRequest
  ) -> dict[str, Any]:
    """Segments everything; returns a value as `schemas.EverythingResponse`.

    Raises:
      ApiError: the model takes no visual prompts, or too many of these calls wait.
    """
    self._check_visual()
    if self._generations >= 2 * self.settings.max_everything:
      raise busy(5, f"{self._generations} calls to segment everything are waiting")
    decoder = _QueuedDecoder(self.engine)
    self._generations += 1
    try:
      embedding = await in_pool(request, self._pool, self.store.load, stored)
      start = time.perf_counter()
      found, masks, seconds = await in_pool(
        request, self._everything, _segment, decoder, embedding, asked.options, asked.format
      )
    except Disconnected:
      decoder.cancelled.set()
      raise
    finally:
      self._generations -= 1
    queue = 1000 * (time.perf_counter() - start - seconds) - decoder.device
    times = {"queue": max(0.0, queue), "decode": decoder.device, "masks": 1000 * masks}
    return {"instances": found, "milliseconds": _rounded(times)}

  def _check_visual(self) -> None:
    if not self.visual:
      raise ApiError("invalid_prompt", "this checkpoint takes no points, boxes and masks.")

  def _parse(
    self, stored: StoredImage, asked: PromptsRequest
  ) -> tuple[list[Prompt], list[tuple[VisualPrompt, bool]]]:
    """The prompts of a request, checked against the image."""
    if asked.visual:
      self._check_visual()
    side, what = self.model.config.mask_size, ""
    try:
      concepts = []
      for i, one in enumerate(asked.concepts):
        what = f"concepts[{i}]"
        prompt = Prompt(one.phrase, one.boxes or None, one.box_labels)
        check_boxes(prompt, *stored.size)
        self.model.tokenizer.check([prompt.phrase])
        concepts.append(prompt)
      visual = []
      for i, one in enumerate(asked.visual):
        what = f"visual[{i}]"
        mask = one.mask and results.mask_logits(one.mask.model_dump(), stored.size, side)
        prompt = VisualPrompt(one.points or None, one.point_labels, one.box, mask)
        check_visual(prompt, *stored.size)
        visual.append((prompt, one.multimask))
    except (ValueError, TypeError) as error:
      raise ApiError("invalid_prompt", f"{what}: {error}") from None
    return concepts, visual


class _QueuedDecoder:
  """Decodes visual prompts through the engine, so that other requests are served in between.

  Attributes:
    cancelled: set to stop.
    device: milliseconds on the device.
  """

  def __init__(self, engine: Engine):
    self._engine, self.cancelled, self.device = engine, threading.Event(), 0.0

  def decode_visual(self, embedding: Any, prompts: Any, *, multimask: bool = True) -> VisualMasks:
    if self.cancelled.is_set():
      raise CancelledError
    units = [Unit(Visual(embedding, prompt, multimask)) for prompt in prompts]
    done = self._engine.submit(POINTS, units).result()
    self.device += done.device
    arrays: list[Any] = [np.stack(part) for part in zip(*done.values, strict=True)]
    sizes: Any = np.repeat(np.asarray(embedding.sizes), len(prompts), axis=0)
    index: Any = np.zeros(len(prompts), np.int32)
    return VisualMasks(*arrays, image_index=index, sizes=sizes)


def _segment(
  decoder: _QueuedDecoder, embedding: Any, options: MaskGeneration, form: str
) -> tuple[list[dict[str, Any]], float, float]:
  """The objects as JSON, seconds to convert them, and seconds of both outside of the device."""
  start = time.perf_counter()
  found = segment_embedding(decoder, embedding, options)
  middle = time.perf_counter()
  results.check_masks(len(found), found.masks.size, form)
  value = results.instances_as_json(found, form)
  return value, time.perf_counter() - middle, time.perf_counter() - start - decoder.device / 1000


def _converted(
  done: Outcome, concepts: list[Prompt], size: tuple[int, int], asked: PromptsRequest
) -> dict[str, Any]:
  found, visual = done.values[: len(concepts)], done.values[len(concepts) :]
  found = [one[: asked.max_detections] for one in found]
  count = sum(map(len, found)) + sum(len(one.logits) for one in visual)
  results.check_masks(count, size, asked.format)
  return {
    "concepts": [
      {
        "phrase": prompt.text,
        "instances": results.instances_as_json(one, asked.format),
      }
      for prompt, one in zip(concepts, found, strict=True)
    ],
    "visual": [
      {"masks": results.visual_as_json(one.logits, one.iou, size, asked.format)} for one in visual
    ],
  }


def _rounded(times: dict[str, float]) -> dict[str, float]:
  return {name: round(value, 1) for name, value in times.items()}


async def receive_file(request: Request, file: Path) -> None:
  """Writes the body of a request to a new file, which only this user can read."""
  file.touch(mode=0o600, exist_ok=False)
  with file.open("wb") as output:
    async for part in request.stream():
      if len(part) > 2**20:
        await asyncio.to_thread(output.write, part)
      else:
        output.write(part)
