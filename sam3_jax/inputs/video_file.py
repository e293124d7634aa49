"""Video files, decoded with PyAV (FFmpeg).

Each frame becomes RGB uint8, upright, as an image file does. FFmpeg converts the colors by the
matrix and range that the file names (BT.601, limited range, if it names none, as FFmpeg's own
programs do). 10-bit values are reduced to 8. Rotations and flips that the file asks for are
applied. Left as they are: pixels that are not square, interlaced frames, and the brightness of HDR.
"""

import contextlib
import os
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from sam3_jax.inputs.frame_range import FrameRange
from sam3_jax.inputs.image_limits import MAX_PIXELS, check_size
from sam3_jax.inputs.video_container import import_av, open_container
from sam3_jax.inputs.video_decoder import decoded, pixels_of, size_of
from sam3_jax.inputs.video_scan import scan
from sam3_jax.inputs.video_source import ASSUMED_FPS, Frame, Note, VideoSource, warn

REVERSE_BYTES = 256_000_000  # of the frames that are kept while a file is read backwards
_MIN_REVERSE = 4  # frames kept, however large they are


class VideoFile(VideoSource):
  """A video file.

  Opening it reads the file once, without decoding it, for the times of all frames. Time stamps that
  vary are kept; the first frame is at 0 seconds. A file without time stamps, such as a raw H.264
  stream, can only be read forwards, and its length is unknown.

  Damage: a note says after how many frames a truncated file ends. A frame in the middle that cannot
  be decoded shows the frame before it, as in video players, and a note counts them.

  Args:
    path: of the file.
    note: takes notes; by default they are warnings.

  Raises:
    FileNotFoundError: no such file.
    ImportError: PyAV is not installed.
    ValueError: not a video, no video stream, not a regular file, or nothing can be decoded.
  """

  def __init__(self, path: str | os.PathLike, note: Note = warn):
    self.name, self._note = os.fspath(path), note
    self._repeated: set[int] = set()
    self._lost = 0
    with open_container(path) as (container, stream):
      rate = stream.average_rate or stream.guessed_rate
      self._scan = scan(container, stream, import_av().error.FFmpegError)
    with contextlib.closing(decoded(self.name, self._scan)) as frames:
      first, frame = next(frames, (0, None))
    if frame is None:
      why = f"{self.name} {self._scan.fault}" if self._scan.fault else self.name
      raise ValueError(f"{why}: no frame in it can be decoded; get the file again.")
    self._scan = self._scan.without(first)
    self.size, self._stored = size_of(frame), (frame.height, frame.width)
    check_size(self.name, *self.size, MAX_PIXELS)
    self._set_rate(float(rate or 0))
    if first:
      note(f"{self.name}: the first {first} frames cannot be decoded and are left out.")
    if self._scan.fault:
      note(f"{self.name} {self._scan.fault}: the rest is left out; get the file again.")

  @property
  def paths(self) -> list[str]:
    return [self.name]

  @property
  def times(self) -> Float[np.ndarray, " length"] | None:
    return self._scan.times

  def _set_rate(self, named: float) -> None:
    """Sets the length and the frame rate, given the rate that the file names or 0."""
    times = self._scan.times
    self.random_access = times is not None
    self.fps = named or ASSUMED_FPS
    if times is None:
      return
    self.length = len(times)
    if len(times) > 1:
      mean = (len(times) - 1) / float(times[-1])
      # The named rate is exact, where time stamps may be rounded to milliseconds.
      if abs(mean / self.fps - 1) > 1e-3:
        self.fps = mean

  def _forward(self, wanted: Sequence[int]) -> Generator[Frame]:
    at = 0
    for index, frame in self._without_gaps(wanted[0], wanted[-1]):
      if index == wanted[at]:
        yield Frame(index, self._time(index), self._pixels(frame, index))
        at += 1

  def _backward(self, wanted: Sequence[int]) -> Generator[Frame]:
    height, width = self.size
    most = max(_MIN_REVERSE, REVERSE_BYTES // (height * width * 3))
    stop = len(wanted)
    while stop > 0:
      key = self._scan.key_before(wanted[stop - 1]).index
      start = max(int(np.searchsorted(wanted, key)), stop - most)
      kept = list(self._forward(wanted[start:stop]))
      while kept:
        yield kept.pop()
      stop = start

  def _counted(self, chosen: FrameRange) -> Generator[Frame]:
    for index, frame in decoded(self.name, self._scan):
      time = self._time(index)
      if chosen.is_over(index, time):
        return
      if chosen.takes(index, time):
        yield Frame(index, time, self._pixels(frame, index))

  def _without_gaps(self, first: int, last: int) -> Iterator[tuple[int, Any]]:
    """Frames from `first` to `last`; a damaged frame is replaced by the frame before it."""
    expected, before = first, None
    with contextlib.closing(decoded(self.name, self._scan, first)) as frames:
      for index, frame in frames:
        for missing in range(expected, min(index, last + 1)):
          self._repeated.add(missing)
          yield missing, frame if before is None else before
        if first <= index <= last:
          yield index, frame
        if index >= last:
          return
        expected, before = max(expected, index + 1), frame
    self._lost = max(self._lost, last + 1 - expected)

  def _time(self, index: int) -> float:
    times = self._scan.times
    return index / (self.fps or ASSUMED_FPS) if times is None else float(times[index])

  def _pixels(self, frame: Any, index: int) -> UInt8[np.ndarray, "h w 3"]:
    if (frame.height, frame.width) != self._stored:
      height, width = self._stored
      raise ValueError(
        f"frame {index} of {self.name} is {frame.width} x {frame.height}, but the first frame is "
        f"{width} x {height}: convert the video to a single size."
      )
    return pixels_of(frame)

  def _report(self) -> None:
    parts = []
    if self._repeated:
      parts.append(f"{len(self._repeated)} damaged frames repeat the frame before them")
    if self._lost:
      parts.append(f"the last {self._lost} frames cannot be decoded and are left out")
    if parts:
      self._note(f"{self.name}: {'; '.join(parts)}.")
    self._repeated, self._lost = set(), 0
