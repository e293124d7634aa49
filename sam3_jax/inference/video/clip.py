"""A clip: the chosen frames of a video, by their position from 0.

The tracker counts positions, so that a clip with every second frame is tracked as a video of its
own. Users and results name frames by their numbers in the source.
"""

import bisect
import dataclasses
from collections.abc import Iterator
from typing import Any

from sam3_jax.inputs.frame_range import Position
from sam3_jax.inputs.video_source import Frame, VideoSource


@dataclasses.dataclass
class Pass:
  """A pass over the clip, by positions.

  Attributes:
    backward: its direction.
    start: the next position.
    stop: the position before which it ends; None for the end of the clip.
    everyone: whether objects are tracked before the first of their prompts.
  """

  backward: bool
  start: int
  stop: int | None
  everyone: bool


class Clip:
  """The frames of a source from `start` to `stop`, each `every`-th one.

  Attributes:
    source: the video.
    size: height and width of its frames.
    numbers: of the frames in the source; None if the length of the source is unknown.

  Raises:
    ValueError: an invalid range, or no frame in it.
  """

  def __init__(
    self, source: VideoSource, start: Position = 0, stop: Position | None = None,
    every: Position = 1,
  ):  # fmt: skip
    self.source, self.size = source, source.size
    self.range: tuple[Any, Any, Any] = start, stop, every
    self.numbers = source.numbers(start, stop, every)
    self._positions = {number: i for i, number in enumerate(self.numbers or ())}

  @property
  def length(self) -> int | None:
    """The number of frames; None if unknown."""
    return None if self.numbers is None else len(self.numbers)

  def position(self, frame: Position) -> int:
    """The position of a frame, given by its number or time; raises ValueError if it is outside."""
    if self.numbers is None:
      raise ValueError(
        f"{self.source.name} is read once, in order, so a session cannot go to frame {frame}: use "
        f"model.track(source, {{{frame!r}: [prompt]}})."
      )
    number = self.source.frame_number(frame)
    if number not in self._positions:
      first, last = self.numbers[0], self.numbers[-1]
      near = self.numbers[bisect.bisect(self.numbers, number) - 1]
      raise ValueError(
        f"frame {frame} is not in the clip: its frames are {first} to {last}"
        + (f", with every={self.range[2]}; give frame {near}." if first < number < last else ".")
      )
    return self._positions[number]

  def read(self, position: int) -> Frame:
    """Reads one frame."""
    if self.numbers is None:
      raise ValueError(f"{self.source.name} is read once, in order; its earlier frames are gone.")
    return self.source.read(self.numbers[position])

  def frames(self, start: int, stop: int | None, backward: bool) -> Iterator[tuple[int, Frame]]:
    """Yields positions and frames.

    Args:
      start: the first position.
      stop: the position before which the frames end, in their direction; None for the last one.
      backward: descending positions.
    """
    if self.numbers is None:
      yield from self._stream(start, stop)
      return
    if backward:
      low, high = (0 if stop is None else stop + 1), start + 1
    else:
      low, high = start, len(self.numbers) if stop is None else stop
    if low >= high:
      return
    every = self.range[2] if type(self.range[2]) is int else 1
    first, last = self.numbers[low], self.numbers[high - 1]
    for frame in self.source.frames(first, last + 1, every, reverse=backward):
      if (position := self._positions.get(frame.index)) is not None:
        yield position, frame

  def _stream(self, start: int, stop: int | None) -> Iterator[tuple[int, Frame]]:
    for position, frame in enumerate(self.source.frames(*self.range)):
      if position == stop:
        return
      if position >= start:
        yield position, frame
