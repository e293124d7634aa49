"""A process that decodes a video, so that a hostile file harms only itself."""

import contextlib
import multiprocessing
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from sam3_jax.batch.reader_process import limit_memory
from sam3_jax.inputs.video_file import VideoFile
from sam3_jax.inputs.video_source import Frame
from sam3_jax.utils.grain_workers import exit_with_parent

NAME = "the uploaded video"  # in messages
MEMORY = 4 * 2**30  # bytes of the process, beyond what it has at its start
_START_SECONDS = 120.0
_POLL = 0.1  # seconds
_SKIPPED = 16  # frames that are decoded rather than looked for, when frames are read in order
_starting = threading.Lock()  # multiprocessing's list of processes is not thread-safe


class Opened(NamedTuple):
  """What is known of a video once it is open; see `VideoSource`."""

  size: tuple[int, int]
  fps: float
  times: Float[np.ndarray, " length"] | None


class VideoReader:
  """A process that decodes the frames of a video. Methods may be called from any thread.

  Attributes:
    opened: about the video.
  """

  def __init__(self, path: Path, seconds: float):
    """Starts the process and opens the video.

    Args:
      path: of the file.
      seconds: that opening it, or decoding a frame, may take.

    Raises:
      ValueError: it is not a video that can be read, or takes too long.
      ImportError: PyAV is not installed.
    """
    self._seconds, self._lock, self._keys = seconds, threading.Lock(), 0
    context = multiprocessing.get_context("spawn")
    with _starting:
      self._pipe, child = context.Pipe()
      self._process = context.Process(target=_serve, args=(child, str(path)), daemon=True)
      self._process.start()
      child.close()
    try:
      self._receive(_START_SECONDS)
      self.opened: Opened = self._receive(seconds)
    except BaseException:
      self.close()
      raise

  def read(self, number: int) -> Frame:
    """Decodes a frame; fast for frames in order.

    Raises:
      ValueError: it cannot be decoded, or takes too long.
    """
    return self._ask("read", number)

  def frames(self, first: int, stop: int, reverse: bool) -> Iterator[Frame]:
    """Decodes the frames of a range, in either direction; raises ValueError as `read`."""
    with self._lock:
      self._keys += 1
      key = self._keys
    self._ask("start", key, first, stop, reverse)
    try:
      while (frame := self._ask("next", key)) is not None:
        yield frame
    finally:
      with contextlib.suppress(ValueError):  # the process has ended
        self._ask("end", key)

  def close(self) -> None:
    """Ends the process."""
    with contextlib.suppress(OSError, ValueError):
      self._process.kill()
    with _starting:
      self._process.join(1.0)

  def _ask(self, *message: Any) -> Any:
    with self._lock:
      try:
        self._pipe.send(message)
      except OSError:
        raise _ended() from None
      return self._receive(self._seconds)

  def _receive(self, seconds: float) -> Any:
    """A value of the process; an array of pixels follows its frame."""
    end = time.monotonic() + seconds
    try:
      while not self._pipe.poll(_POLL):
        if time.monotonic() > end:
          self._process.kill()
          raise ValueError(f"{NAME} takes longer than {seconds:g} s to decode; save it as MP4.")
      kind, value = self._pipe.recv()
      if kind == "frame":
        index, at, shape = value
        pixels = np.frombuffer(self._pipe.recv_bytes(), np.uint8).reshape(shape)
        return Frame(index, at, pixels)
    except (EOFError, OSError):
      raise _ended() from None
    if kind == "error":
      raise (ImportError if "PyAV" in value else ValueError)(value)
    return value


def _ended() -> ValueError:
  return ValueError(f"{NAME} ended the process that decoded it; save it again as MP4.")


def _serve(pipe: Any, path: str) -> None:
  """Runs in the process: opens the video, and sends the frames that are asked for."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles it
  exit_with_parent()
  limit_memory(MEMORY)
  pipe.send(("ready", None))
  try:
    video = VideoFile(path, note=lambda _: None)
  except (ImportError, ValueError, OSError, MemoryError) as error:
    pipe.send(("error", _text(error, path)))
    return
  pipe.send(("opened", Opened(video.size, video.fps or 0.0, video.times)))
  frames = _Frames(video)
  with contextlib.suppress(EOFError, OSError):  # the parent has ended
    while True:
      kind, *values = pipe.recv()
      try:
        found = getattr(frames, kind)(*values)
      except (ValueError, MemoryError) as error:
        pipe.send(("error", _text(error, path)))
        continue
      if found is None:
        pipe.send(("none", None))
      else:
        pipe.send(("frame", (found.index, found.time, found.image.shape)))
        pipe.send_bytes(np.ascontiguousarray(found.image).data.cast("B"))


def _text(error: BaseException, path: str) -> str:
  text = str(error) or "it needs more memory to decode than this server allows: make it smaller"
  return text.replace(path, NAME)


class _Frames:
  """The frames of a video, as the parent asks for them."""

  def __init__(self, video: VideoFile):
    self._video = video
    self._ranges: dict[int, Iterator[Frame]] = {}
    self._ahead: Iterator[Frame] | None = None  # for frames that are read in order
    self._last: Frame | None = None

  def read(self, number: int) -> Frame:
    last = self._last
    if last is not None and last.index == number:
      return last
    near = last is not None and last.index < number <= last.index + _SKIPPED
    if not near:
      self._ahead = None  # the iterator is closed by its destruction
      self._last = self._video.read(number)
      return self._last
    if self._ahead is None:
      self._ahead = self._video.frames(number)
    found = next(frame for frame in self._ahead if frame.index == number)
    self._last = found
    return found

  def start(self, key: int, first: int, stop: int, reverse: bool) -> None:
    self._ranges[key] = self._video.frames(first, stop, reverse=reverse)

  def next(self, key: int) -> Frame | None:
    return next(self._ranges[key], None)

  def end(self, key: int) -> None:
    self._ranges.pop(key, None)
