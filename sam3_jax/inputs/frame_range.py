"""Positions in a video, and ranges of frames: `start`, `stop` and `every` as frames or seconds."""

import math
import re
from typing import NamedTuple, TypeAlias

Position: TypeAlias = int | str  # a frame number, or its text "120", or a time such as "12.5s"

CLOSE = 1e-6  # seconds; time stamps are fractions of a second, rounded to float64

_TEXT = re.compile(r"\s*(\d+)\s*|\s*(\d+\.?\d*|\.\d+)\s*s\s*", re.ASCII)


class Seconds(NamedTuple):
  """A time since the first frame, or a distance in time."""

  value: float

  def __str__(self) -> str:
    return f"{self.value:g}s"


_POSITION = "a frame number from 0, or a time such as '12.5s'"
_STEP = "1 or more frames, or a time such as '0.5s'"


def parse_position(
  value: Position, name: str = "the position", expected: str = _POSITION
) -> int | Seconds:
  """A frame number or a time.

  Args:
    value: a frame number from 0, as a number or a text, or a time such as "12.5s".
    name: of the value in messages, such as "start".
    expected: what messages ask for.

  Raises:
    ValueError: it is neither, or negative.
  """
  if isinstance(value, str) and (found := _TEXT.fullmatch(value)):
    return int(found[1]) if found[1] else Seconds(float(found[2]))
  if not isinstance(value, int) or isinstance(value, bool) or value < 0:
    raise ValueError(f"{name} is {value!r:.40}: give {expected}.")
  return value


class FrameRange:
  """Chooses frames, one after another in the order of their numbers.

  Args:
    start: the first frame. A time stands for the first frame at or after it.
    stop: the frame after the last one; None for the end of the video.
    every: 1 for all frames; n for each n-th one from `start`. With a time, the frames at or after
      `start`, `start + every`, `start + 2 * every` and so on.

  Raises:
    ValueError: a value is neither a frame number nor a time, `every` is 0, or `stop` is not after
      `start`.
  """

  def __init__(self, start: Position = 0, stop: Position | None = None, every: Position = 1):
    self.start = parse_position(start, "start")
    self.stop = None if stop is None else parse_position(stop, "stop")
    self.every = parse_position(every, "every", _STEP)
    if not (self.every.value if isinstance(self.every, Seconds) else self.every):
      raise ValueError(f"every is {every!r}: give {_STEP}.")
    if type(self.start) is type(self.stop) and self.stop <= self.start:  # pyright: ignore
      raise ValueError(f"stop must be after start; got start={start!r} and stop={stop!r}.")
    self._first: tuple[int, float] | None = None  # number and time of the first chosen frame
    self._chosen = 0  # multiple of `every`, in seconds, of the next frame

  def has_times(self) -> bool:
    """Whether one of the values is a time."""
    return any(isinstance(value, Seconds) for value in (self.start, self.stop, self.every))

  def is_over(self, index: int, time: float) -> bool:
    """Whether a frame and all frames after it are outside."""
    return self.stop is not None and _reached(self.stop, index, time)

  def takes(self, index: int, time: float) -> bool:
    """Whether a frame is chosen, by its number and time; it must not be over."""
    if self._first is None:
      if not _reached(self.start, index, time):
        return False
      start = self.start
      self._first = index, start.value if isinstance(start, Seconds) else time
    number, begin = self._first
    if not isinstance(self.every, Seconds):
      return (index - number) % self.every == 0
    step = self.every.value
    if time < begin + self._chosen * step - CLOSE:
      return False
    self._chosen = math.floor((time - begin + CLOSE) / step) + 1
    return True


def _reached(position: int | Seconds, index: int, time: float) -> bool:
  if isinstance(position, Seconds):
    return time >= position.value - CLOSE
  return index >= position
