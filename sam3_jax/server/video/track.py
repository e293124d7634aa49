"""Tracks a video for a request, and streams its frames as they leave: lines of JSON (NDJSON)."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, NamedTuple

from fastapi import Request
from fastapi.responses import StreamingResponse

from sam3_jax.outputs.tracked_frame import TrackedFrame
from sam3_jax.server.device_work import Call, Unit
from sam3_jax.server.engine import VIDEOS
from sam3_jax.server.errors import ApiError, body
from sam3_jax.server.video.schemas import TrackRequest
from sam3_jax.server.video.service import VideoService, no_space
from sam3_jax.server.video.store import StoredVideo, unknown

MEDIA_TYPE = "application/x-ndjson"
_DISK_FRAMES = 32  # between two looks at the free space of the disk


class Leaving(NamedTuple):
  """A frame that leaves, and the objects and phrases that were tracked there."""

  frame: TrackedFrame
  ids: set[int]
  phrases: set[str | None]


class Run:
  """Passes over a video, whose frames are computed one after another.

  Attributes:
    total: number of the frames to come.
    stopped: whether `stop` was called.
  """

  def __init__(self, stored: StoredVideo):
    self._stored, self._steps = stored, iter(())
    self.total, self.stopped = 0, False

  def begin(self, session: Any, asked: TrackRequest) -> None:
    """Starts; for the thread of the device. Raises ValueError as `VideoSession.run`."""
    self._session = session
    self._steps: Iterator[list[TrackedFrame]] = session.steps(
      asked.direction, start=asked.start, stop=asked.stop
    )
    length = session.clip.length
    for one in session.passes:
      end = (-1 if one.backward else length) if one.stop is None else one.stop
      self.total += max(0, one.start - end if one.backward else end - one.start)

  def next(self) -> list[Leaving] | ApiError | None:
    """Tracks a frame; for the thread of the device.

    Returns:
      The frames that leave, which may be none; None at the end; or an error.
    """
    if self._stored.closed:
      return unknown()
    if self.stopped:
      return None
    try:
      frames = next(self._steps, None)
      self._stored.note()
      if frames is None:
        return None
      current = self._session.passes[0]
      return [Leaving(one, *self._session.taking_part(one.index, current)) for one in frames]
    except ValueError as error:  # of a frame that cannot be decoded
      return unknown() if self._stored.closed else ApiError("unsupported_video", str(error))
    except OSError as error:
      return no_space(error)

  def stop(self) -> None:
    """Ends the run after the current frame."""
    self.stopped = True

  def close(self) -> None:
    """Ends the iterator; for the thread of the device."""
    close = getattr(self._steps, "close", None)
    if close is not None:
      close()


class TrackResponse(StreamingResponse):
  """A stream that calls `done` when it ends in any way, even before its first line."""

  def __init__(self, lines: AsyncIterator[bytes], done: Callable[[], object]):
    super().__init__(lines, media_type=MEDIA_TYPE)
    self._done = done

  async def __call__(self, *arguments: Any) -> None:
    try:
      await super().__call__(*arguments)
    finally:
      self._done()


async def track(
  service: VideoService, request: Request, stored: StoredVideo, asked: TrackRequest
) -> TrackResponse:
  """Starts to track; the response streams the frames.

  Raises:
    ApiError: there is nothing to track, or the video is being tracked.
  """
  if stored.running is not None:
    raise ApiError(
      "conflict", "this video is being tracked; stop that first: DELETE /v1/videos/{id}/track."
    )
  run = stored.running = Run(stored)

  def done() -> None:
    run.stop()
    stored.running, stored.used = None, time.time()
    with contextlib.suppress(ApiError):  # the engine has stopped
      service.engine.submit(VIDEOS, [Unit(Call(run.close))])

  try:
    service.check_disk(stored)
    await service.on_device(request, stored, lambda session: run.begin(session, asked))
  except BaseException:
    done()
    raise
  return TrackResponse(_lines(service, stored, run), done)


async def _lines(service: VideoService, stored: StoredVideo, run: Run) -> AsyncIterator[bytes]:
  """The lines of the stream. The next frame is computed while the last one is converted."""

  def compute() -> "asyncio.Future[Any]":
    return asyncio.wrap_future(service.engine.submit(VIDEOS, [Unit(Call(run.next))]))

  loop, start = asyncio.get_running_loop(), time.perf_counter()
  step, steps, count = None, 0, 0
  try:
    yield _line({"start": {"frames": run.total}})
    step = compute()
    while True:
      found = (await step).values[0]
      if found is None:
        break
      if isinstance(found, ApiError):
        raise found
      if steps % _DISK_FRAMES == 0:
        service.check_disk(stored)
      step, steps = compute(), steps + 1
      for one in found:
        value = await loop.run_in_executor(service.pool, _keep, stored, one)
        count += 1
        yield _line(value)
    seconds = round(time.perf_counter() - start, 3)
    yield _line({"end": {"frames": count, "stopped": run.stopped, "seconds": seconds}})
  except ApiError as error:
    yield _line(body(error.code, error.detail))
  finally:
    if step is not None:
      step.cancel()


def _keep(stored: StoredVideo, leaving: Leaving) -> dict[str, Any]:
  try:
    return stored.results.put(*leaving)
  except (ValueError, OSError) as error:
    if stored.closed:  # and its file with it
      raise unknown() from None
    if isinstance(error, OSError):
      raise no_space(error) from None
    raise


def _line(value: dict[str, Any]) -> bytes:
  return json.dumps(value, separators=(",", ":")).encode() + b"\n"
