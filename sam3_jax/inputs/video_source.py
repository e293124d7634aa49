"""What all videos have in common: the frames, and how ranges of them are read."""

import abc
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import NamedTuple, Self

import numpy as np
from jaxtyping import Float, UInt8

from sam3_jax.inputs.frame_range import CLOSE, FrameRange, Position, Seconds, parse_position
from sam3_jax.utils.read_ahead import read_ahead

ASSUMED_FPS = 25.0  # for the times of frames without a rate

Note = Callable[[str], None]  # takes one line about what was unexpected in a video


class Frame(NamedTuple):
  """A frame of a video.

  Attributes:
    index: its number in the video, from 0.
    time: seconds since the first frame.
    image: RGB, upright.
  """

  index: int
  time: float
  image: UInt8[np.ndarray, "h w 3"]


def warn(line: str) -> None:
  """Issues a note as a warning."""
  warnings.warn(line, UserWarning, stacklevel=3)


class VideoSource(abc.ABC):
  """The frames of a video, read one at a time.

  Attributes:
    name: in messages, and of the path if there is one.
    size: height and width of all frames in pixels.
    fps: frames per second on average; None if unknown. Times are then those of 25 frames per
      second.
    length: number of frames; None if it is unknown, as for a camera.
    random_access: whether frames can be read in any order, and more than once.
  """

  name: str
  size: tuple[int, int]
  fps: float | None = None
  length: int | None = None
  random_access: bool = True
  _ahead: bool = True  # read ahead in a thread

  def __iter__(self) -> Iterator[Frame]:
    return self.frames()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def close(self) -> None:  # noqa: B027, most sources hold nothing open
    """Releases what the source holds."""

  @property
  def paths(self) -> list[str]:
    """The files of the video; empty for frames in memory."""
    return []

  @property
  def times(self) -> Float[np.ndarray, " length"] | None:
    """Times of all frames in seconds; None if the number of frames is unknown."""
    if self.length is None:
      return None
    return np.arange(self.length) / (self.fps or ASSUMED_FPS)

  def frames(
    self,
    start: Position = 0,
    stop: Position | None = None,
    every: Position = 1,
    reverse: bool = False,
  ) -> Iterator[Frame]:
    """Yields frames in the order of their numbers, or in the reverse order.

    Frames of files are decoded up to 8 frames ahead in a thread, which ends when the iterator ends,
    is closed or is garbage collected.

    Args:
      start: the first frame: a number from 0, or a time such as "12.5s", which stands for the first
        frame at or after it.
      stop: the frame after the last one; None for the end of the video. It may be after the end.
      every: 1 for all frames; n for each n-th frame from `start`; a time such as "0.5s" for one
        frame in each such interval.
      reverse: yield the same frames, last first. Memory stays bounded: from the key frame before
        them, up to 256 MB of frames are decoded at a time.

    Raises:
      ValueError: an invalid position, a start after the end, a time though the video has no frame
        rate, or `reverse` if it can only be read forwards. Later: frames that cannot be read.
    """
    wanted = self.numbers(start, stop, every)
    if wanted is None:
      if reverse:
        raise ValueError(f"{self.name} can only be read forwards: convert it to MP4 first.")
      return self._noting(self._counted(FrameRange(start, stop, every)))
    return self._noting(self._backward(wanted) if reverse else self._forward(wanted))

  def numbers(
    self, start: Position = 0, stop: Position | None = None, every: Position = 1
  ) -> list[int] | None:
    """The numbers of the frames that `frames` yields; None if the number of frames is unknown.

    Raises:
      ValueError: as `frames`.
    """
    chosen = FrameRange(start, stop, every)
    if chosen.has_times() and self.fps is None:
      raise ValueError(f"{self.name} has no frame rate: give frame numbers, or fps= to open_video.")
    if (times := self.times) is None:
      return None
    wanted = _wanted(chosen, times)
    if not wanted:
      self.frame_number(start)  # raises if it is after the end
      raise ValueError(
        f"{self.name} has no frame from start={start!r} to stop={stop!r}: its {len(times)} frames "
        f"are 0 to {len(times) - 1}, at 0 to {times[-1]:.4g} seconds."
      )
    return wanted

  def read(self, index: Position) -> Frame:
    """Reads one frame; raises ValueError if there is no such frame."""
    number = self.frame_number(index)
    frames = self._forward([number])
    try:
      return next(frames)
    except StopIteration:
      raise ValueError(f"frame {number} of {self.name} cannot be decoded.") from None
    finally:
      frames.close()

  def frame_number(self, position: Position) -> int:
    """The number of a frame: the position itself, or that of the first frame at or after a time.

    Raises:
      ValueError: the video has no such frame, or its times are not known in advance.
    """
    found = parse_position(position)
    times = self.times
    if isinstance(found, Seconds):
      if self.fps is None or times is None:
        raise ValueError(
          f"{self.name} has no times that are known in advance: give a frame number, not {found}."
        )
      number = int(np.searchsorted(times, found.value - CLOSE))
    else:
      number = found
    if times is not None and number >= len(times):
      what = f"time {found}" if isinstance(found, Seconds) else f"frame {found}"
      raise ValueError(
        f"{what} is after the end of {self.name}: its {len(times)} frames are 0 to "
        f"{len(times) - 1}, at 0 to {times[-1]:.4g} seconds."
      )
    return number

  @abc.abstractmethod
  def _forward(self, wanted: Sequence[int]) -> Generator[Frame]:
    """Reads frames by their numbers, which increase."""

  def _backward(self, wanted: Sequence[int]) -> Generator[Frame]:
    """Reads the same frames, last first."""
    for index in reversed(wanted):
      yield from self._forward([index])

  def _counted(self, chosen: FrameRange) -> Generator[Frame]:
    """Reads the chosen frames, counting them; sources of unknown length must have it."""
    raise TypeError(f"{type(self).__name__} has no length and cannot count its frames.")

  def _report(self) -> None:  # noqa: B027
    """Notes what was unexpected in the frames that were read."""

  def _noting(self, frames: Generator[Frame]) -> Iterator[Frame]:
    yield from read_ahead(frames) if self._ahead else frames
    self._report()


def _wanted(chosen: FrameRange, times: np.ndarray) -> list[int]:
  numbers: list[int] = []
  for index, time in enumerate(times.tolist()):
    if chosen.is_over(index, time):
      break
    if chosen.takes(index, time):
      numbers.append(index)
  return numbers
