"""Videos of the server: open, show frames, prompt, correct, export.

A session of the model is used by the thread of the device only, one step at a time, so prompts on
images and on other videos are computed in between. Frames are decoded in a process per video, and
results are converted and written in threads.
"""

import io
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fastapi import Request
from PIL import Image

from sam3_jax.inference.predictor import Sam3
from sam3_jax.inputs.video_source import VideoSource
from sam3_jax.inputs.visual_prompts import VisualPrompt
from sam3_jax.server.device_work import Call, Unit
from sam3_jax.server.disconnect import in_pool, result
from sam3_jax.server.engine import VIDEOS, Engine, Outcome
from sam3_jax.server.errors import ApiError
from sam3_jax.server.metrics import Metrics
from sam3_jax.server.model_card import no_videos
from sam3_jax.server.service import receive_file
from sam3_jax.server.settings import Settings
from sam3_jax.server.video.schemas import Correction, VideoPrompt
from sam3_jax.server.video.source import open_upload
from sam3_jax.server.video.store import StoredVideo, VideoStore, unknown

THREADS = 4  # that decode single frames and convert results
MAX_SIDE = 4096  # pixels of a frame as JPEG
_QUALITY = 90
_MIN_FREE = 2**30  # bytes of disk that tracking leaves


class VideoService:
  """The videos of a server.

  Attributes:
    model, settings, engine: the arguments.
    store: the open videos.
    pool: threads for work that needs no device.
  """

  def __init__(
    self, model: Sam3, settings: Settings, engine: Engine, directory: Path, metrics: Metrics
  ):
    """
    Args:
      model, settings: of the server.
      engine: has the thread of the device.
      directory: for uploaded videos and their results; it is deleted with its content.
      metrics: shows the number of videos.
    """
    self.model, self.settings, self.engine = model, settings, engine
    self._directory = directory
    self.store = VideoStore(directory, settings, self._close)
    self.pool = ThreadPoolExecutor(THREADS, "sam3-video")
    metrics.watch("videos", "Open videos.", lambda: len(self.store))

  def start(self) -> None:
    self.store.start()

  def stop(self) -> None:
    """Stops tracking, and deletes all videos; before the engine is stopped."""
    self.store.stop()

  def close(self) -> None:
    """Ends the threads, and deletes what is left; after the engine is stopped."""
    self.pool.shutdown(wait=True, cancel_futures=True)
    shutil.rmtree(self._directory, ignore_errors=True)

  def check(self) -> None:
    """Raises ApiError if this server takes no videos."""
    if why := no_videos(self.model):
      raise ApiError("unsupported_video", why)

  async def open(self, request: Request, session: str | None) -> dict[str, Any]:
    """Receives and opens a video; returns a value as `schemas.VideoUploadResponse`.

    Raises:
      ApiError: it is not a usable video, or too many are open.
    """
    self.check()
    with self.store.arriving() as directory:
      file = directory / "video"
      try:
        await receive_file(request, file)
      except OSError as error:
        raise no_space(error) from None
      start = time.perf_counter()
      source = await in_pool(request, self.pool, open_upload, file, self.settings)
      identity = self.store.add(directory, source, session)
    milliseconds = {"read": round(1000 * (time.perf_counter() - start), 1)}
    return _facts(identity, source) | {"milliseconds": milliseconds}

  def state(self, identity: str, stored: StoredVideo) -> dict[str, Any]:
    """A value as `schemas.VideoStateResponse`."""
    return _facts(identity, stored.source) | {
      "objects": stored.objects,
      "phrases": stored.phrases,
      "tracked": len(stored.results),
      "running": stored.running is not None,
    }

  async def frame(self, request: Request, stored: StoredVideo, number: int, side: int) -> bytes:
    """A frame as JPEG, with a longer side of up to `side` pixels; raises ApiError."""
    return await in_pool(request, self.pool, _jpeg, stored.source, number, side)

  def objects(self, stored: StoredVideo, number: int) -> dict[str, Any]:
    """What is known of a frame, as `schemas.VideoFrame`; raises ApiError."""
    try:
      number = stored.source.frame_number(number)
    except ValueError as error:
      raise ApiError("not_found", str(error)) from None
    if (found := stored.results.get(number)) is not None:
      return found
    times = stored.source.times
    return {"frame": number, "time": float(times[number]) if times is not None else 0.0} | {
      "objects": []
    }

  async def prompt(
    self, request: Request, stored: StoredVideo, asked: VideoPrompt
  ) -> dict[str, Any]:
    """Adds an object, or a phrase; returns a value as `schemas.VideoPromptResponse`.

    Raises:
      ApiError: an invalid prompt, or too many objects.
    """
    limit = self.settings.max_video_objects

    def add(session: Any) -> tuple[list[int], Any]:
      if len(session.objects) >= limit:
        raise ValueError(f"a video takes {limit} objects on this server: remove one first.")
      if asked.phrase is None:
        ids = [session.add(_visual(asked), asked.frame)]
      else:
        ids = session.find(_phrase(asked, session.phrases), asked.frame)
      return ids, session.at(asked.frame)

    return await self._change(request, stored, add)

  async def correct(
    self, request: Request, stored: StoredVideo, identity: int, asked: Correction
  ) -> dict[str, Any]:
    """Corrects an object; returns a value as `schemas.VideoPromptResponse`; raises ApiError."""

    def act(session: Any) -> tuple[list[int], Any]:
      prompt = _visual(asked)
      session.correct(
        identity, asked.frame,
        points=prompt.points or None, point_labels=prompt.point_labels or None, box=prompt.box,
      )  # fmt: skip
      return [identity], session.at(asked.frame)

    return await self._change(request, stored, act)

  async def remove(self, request: Request, stored: StoredVideo, identity: int) -> None:
    """Removes an object from the session and from all results; raises ApiError."""
    await self.on_device(request, stored, lambda session: session.remove(identity))
    stored.results.remove([identity])

  async def forget(self, request: Request, stored: StoredVideo, phrase: str) -> None:
    """Removes a phrase and its objects, also from all results; raises ApiError."""
    done = await self.on_device(request, stored, lambda session: session.forget(phrase))
    stored.results.remove(done.values[0])

  async def _change(
    self, request: Request, stored: StoredVideo, act: Callable[[Any], tuple[list[int], Any]]
  ) -> dict[str, Any]:
    """Calls a function that gives ids, and what is known of their frame; keeps that."""
    done = await self.on_device(request, stored, act)
    ids, frame = done.values[0]
    try:
      found = await in_pool(request, self.pool, stored.results.put, frame, ids)
    except ValueError:  # the file of results is closed
      raise unknown() from None
    except OSError as error:
      raise no_space(error) from None
    return {"objects": ids, "result": found, "milliseconds": _times(done)}

  async def on_device(
    self, request: Request, stored: StoredVideo, function: Callable[[Any], Any]
  ) -> Outcome:
    """Calls a function with the session of a video in the thread of the device.

    Raises:
      ApiError: the function raised ValueError or TypeError, or the video was deleted.
    """

    def call() -> Any:
      if stored.closed:
        return unknown()
      try:
        value = function(self._session(stored))
        stored.note()
        return value
      except (ValueError, TypeError) as error:
        return ApiError("invalid_prompt", str(error))
      except OSError as error:
        return no_space(error)

    done = await result(request, self.engine.submit(VIDEOS, [Unit(Call(call))]))
    stored.used = time.time()
    if isinstance(done.values[0], ApiError):
      raise done.values[0]
    return done

  def check_disk(self, stored: StoredVideo) -> None:
    """Raises ApiError if tracking may fill the disk."""
    try:
      free = shutil.disk_usage(stored.directory).free
    except OSError:  # the video was deleted
      return
    if free < _MIN_FREE:
      raise no_space(None)

  def _session(self, stored: StoredVideo) -> Any:
    if stored.session is None:
      budget = self.settings.video_memory // self.settings.max_videos
      stored.session = self.model.video(
        stored.source, budget=budget, directory=stored.directory / "frames"
      )
    return stored.session

  def _close(self, stored: StoredVideo) -> None:
    """Closes a video that was removed; its session, in the thread of the device."""
    if stored.running is not None:
      stored.running.stop()
    stored.source.close()
    try:
      self.engine.submit(VIDEOS, [Unit(Call(stored.close))])
    except ApiError:  # the engine has stopped, or has not started
      threading.Thread(target=stored.close).start()


def no_space(error: OSError | None) -> ApiError:
  """The error for a disk that is full."""
  what = "the server's disk is nearly full" if error is None else f"the server: {error.strerror}"
  return ApiError("no_space", f"{what}; close other videos, and track again.")


def _facts(identity: str, source: VideoSource) -> dict[str, Any]:
  height, width = source.size
  return {
    "id": identity,
    "width": width,
    "height": height,
    "frames": source.length,
    "fps": round(float(source.fps or 0), 4),
  }


def _visual(asked: VideoPrompt | Correction) -> VisualPrompt:
  return VisualPrompt(asked.points or None, asked.point_labels, asked.box)


def _phrase(asked: VideoPrompt, known: list[str | None]) -> str:
  """The phrase of a prompt; raises ValueError if there is more, or if it is there already."""
  phrase = (asked.phrase or "").strip()
  if not phrase:
    raise ValueError("the phrase is empty; give a short noun phrase, or points or a box.")
  if asked.points or asked.box:
    raise ValueError("a prompt has a phrase, or points and a box, not both; send two prompts.")
  if phrase in known:
    raise ValueError(f"the phrase {phrase!r:.60} is there already; track the video.")
  return phrase


def _jpeg(source: VideoSource, number: int, side: int) -> bytes:
  try:
    number = source.frame_number(number)
  except ValueError as error:
    raise ApiError("not_found", str(error)) from None
  try:
    image = Image.fromarray(source.read(number).image)
  except ValueError as error:
    raise ApiError("unsupported_video", str(error)) from None
  if max(image.size) > side:
    image.thumbnail((side, side), Image.Resampling.BILINEAR)
  buffer = io.BytesIO()
  image.save(buffer, "JPEG", quality=_QUALITY)
  return buffer.getvalue()


def _times(done: Outcome) -> dict[str, float]:
  return {"queue": round(done.queue, 1), "device": round(done.device, 1)}
