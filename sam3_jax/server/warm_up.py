"""Compiles programs by running them: the common ones before the first request, others later."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from sam3_jax.checkpoint.bundle import VISUAL
from sam3_jax.inference.predictor import Sam3, prompts_at_once
from sam3_jax.inference.visual import VISUAL_BATCHES
from sam3_jax.inputs.prompts import BOX_SIZES, Prompt
from sam3_jax.inputs.visual_prompts import POINT_SIZES, VisualPrompt
from sam3_jax.server.device_work import Concept, DeviceWork, Image, Unit, Visual
from sam3_jax.server.engine import Engine
from sam3_jax.server.model_card import no_videos
from sam3_jax.types import ImageEmbedding

NO_IMAGE: Any = None
IDLE = 2.0  # seconds without work after which another program is compiled
Step = Callable[[str, float], None]  # name of the next step, fraction of the work done so far


def warm_up(model: Sam3, step: Step) -> None:
  """Compiles the programs for an upload, a concept, and a click, a box or a mask on one object.

  Args:
    model: of the server.
    step: is told of the progress.
  """
  step("compiling the encoders and the decoder ...", 0.0)
  model.compile(images=1, prompts=1)
  work = DeviceWork(model)
  step("compiling the programs for points, boxes and masks ...", 0.6)
  embedding = _embedding(work)
  concept = Unit(Concept(embedding, Prompt("object"), 0.5))
  for count in sorted(prompts_at_once(model.platform)):
    work.compute([concept] * count)
  if VISUAL in model.params:
    prompts = [(_prompt(model, 1), True), (_prompt(model, 1), False)]
    prompts.append((_prompt(model, 1, masked=True), False))
    with ThreadPoolExecutor() as pool:
      units = [Unit(Visual(embedding, *prompt)) for prompt in prompts]
      list(pool.map(lambda unit: work.compute([unit]), units))


class Compiler:
  """A thread that compiles less common programs once the server is ready, and has nothing to do.

  Programs that it has not compiled yet are compiled by the first requests that need them.
  """

  def __init__(self, model: Sam3, engine: Engine):
    self._model, self._engine, self._stopping = model, engine, threading.Event()
    self._thread = threading.Thread(target=self._run, name="sam3-compile", daemon=True)

  def start(self) -> None:
    self._thread.start()

  @property
  def is_running(self) -> bool:
    """Whether the thread exists, even after `stop`, if it still compiles."""
    return self._thread.is_alive()

  def stop(self, timeout: float | None = 1.0) -> None:
    """Ends the thread, or after `timeout` seconds lets it compile its current program."""
    self._stopping.set()
    if self._thread.ident is not None:
      self._thread.join(timeout)

  def _run(self) -> None:
    while not self._engine.wait_ready(0.2):
      if self._stopping.is_set() or self._engine.error:
        return
    with contextlib.suppress(OSError, AttributeError):  # Linux has a priority of each thread
      os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
    work = DeviceWork(self._model)
    embedding = None
    for units in _less_common(self._model):
      if not self._wait_idle():
        return
      if embedding is None:
        embedding = _embedding(work)
      work.compute([Unit(unit._replace(embedding=embedding)) for unit in units])
    for step in _video_steps(self._model):
      if not self._wait_idle():
        return
      step()

  def _wait_idle(self) -> bool:
    """Waits until the server has nothing to do; False if it stops."""
    while self._engine.idle_seconds < IDLE:
      if self._stopping.wait(IDLE / 4):
        return False
    return True


def _less_common(model: Sam3) -> Iterator[list[Any]]:
  """Batches of "everything", of several points, of masks and points, and of many boxes; without
  their embeddings."""
  if VISUAL in model.params:
    more = POINT_SIZES[0] + 1
    yield [Visual(NO_IMAGE, _prompt(model, 1), True)] * VISUAL_BATCHES[0]
    yield [Visual(NO_IMAGE, _prompt(model, more), False)]
    yield [Visual(NO_IMAGE, _prompt(model, 1, masked=True), True)]
    yield [Visual(NO_IMAGE, _prompt(model, more, masked=True), False)]
    yield [Visual(NO_IMAGE, _prompt(model, more), True)]
  side = model.config.image_size
  boxes = [[0, 0, side, side]] * (BOX_SIZES[0] + 1)
  yield [Concept(NO_IMAGE, Prompt("object", boxes), 0.5)]


def _video_steps(model: Sam3) -> Iterator[Callable[[], object]]:
  """Calls that compile the programs for videos: one object, two, a correction, and a phrase."""
  if no_videos(model):
    return
  gray = np.full((3, 64, 64, 3), 128, np.uint8)
  middle = VisualPrompt(points=[[32, 32]])
  with model.video(gray) as session:
    for prompt in (
      lambda: session.add(middle),
      lambda: session.add(middle),
      lambda: session.correct(1, 1, points=[[32, 32]]),
    ):
      yield prompt
      frames = session.run()
      for _ in gray:
        yield lambda: next(frames)  # noqa: B023
  with model.video(gray) as session:
    yield lambda: session.find("object")


def _embedding(work: DeviceWork) -> ImageEmbedding:
  """Of a black image."""
  side = work.model.config.image_size
  pixels = np.zeros((side, side, 3), np.uint8)
  return work.compute([Unit(Image(pixels, (side, side)))])[0]


def _prompt(model: Sam3, points: int, masked: bool = False) -> VisualPrompt:
  middle = model.config.image_size / 2
  mask: Any = np.ones((model.config.mask_size,) * 2, np.float32) if masked else None
  return VisualPrompt(points=[[middle, middle]] * points, mask=mask)
