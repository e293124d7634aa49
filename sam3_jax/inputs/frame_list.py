"""Videos given as images: a directory, a list or array of frames, or an iterator of frames."""

import os
import re
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from sam3_jax.inputs.frame_range import FrameRange
from sam3_jax.inputs.image_listing import is_image
from sam3_jax.inputs.preprocess import ImageSource, check_range, displayed_size, read_image
from sam3_jax.inputs.video_source import ASSUMED_FPS, Frame, Note, VideoSource
from sam3_jax.utils.notes import ListingNotes
from sam3_jax.utils.os_errors import error_text, remedy


def natural_order(name: str) -> tuple[Any, ...]:
  """A key that sorts names by the numbers in them: frame2 before frame10."""
  texts = re.split(r"(\d+)", name)  # text, digits, text, ... text
  pairs = zip(texts[::2], [*texts[1::2], "-1"], strict=True)
  return (*((text.casefold(), int(digits)) for text, digits in pairs), name)


class FrameList(VideoSource):
  """Frames that can be read in any order: a directory or a sequence of images, or an array.

  Args:
    frames: paths or other images, or uint8 [T, h, w, 3].
    name: in messages.
    fps: frames per second, if it is known.

  Raises:
    ValueError: there are no frames, or the first one cannot be read. Later: another frame cannot be
      read, or has another size.
  """

  def __init__(self, frames: Sequence[ImageSource], name: str, fps: float | None):
    if not len(frames):
      raise ValueError(f"{name} has no frames: give at least one.")
    self._frames, self.name, self.fps, self.length = frames, name, fps, len(frames)
    self._ahead = not isinstance(frames, np.ndarray)
    first = frames[0]
    if isinstance(first, str | os.PathLike):
      self.size = displayed_size(first)
    else:
      self.size = read_image(first, dark=True).shape[:2]

  @property
  def paths(self) -> list[str]:
    return [os.fspath(frame) for frame in self._frames if isinstance(frame, str | os.PathLike)]

  def _forward(self, wanted: Sequence[int]) -> Generator[Frame]:
    for index in wanted:
      source = self._frames[index]
      image = checked(source, _name(source, index, self.name), self.size)
      yield Frame(index, index / (self.fps or ASSUMED_FPS), image)


class FrameIterator(VideoSource):
  """Frames that come one after another, such as those of a camera; the length is unknown.

  They can be read once, and only forwards. Each frame is taken from the iterator when it is asked
  for, in the caller's thread. Reading may be interrupted, and continued with a later `frames` from
  the next frame on.

  Args:
    frames: yields uint8 [h, w, 3], or other images.
    fps: frames per second, if it is known.

  Raises:
    ValueError: there is no frame, or the first one cannot be read. Later: another frame cannot be
      read, or has another size.
  """

  random_access = False
  _ahead = False

  def __init__(self, frames: Iterator[ImageSource], fps: float | None):
    self.name, self.fps, self._frames = "the iterator of frames", fps, frames
    self._next = 0  # number of the next frame
    for source in frames:
      self._first: np.ndarray | None = read_image(source, dark=True)
      self.size = self._first.shape[:2]
      return
    raise ValueError("the iterator of frames has no frames: give at least one.")

  def _forward(self, wanted: Sequence[int]) -> Generator[Frame]:
    return self._counted(FrameRange(wanted[0], wanted[-1] + 1))

  def _counted(self, chosen: FrameRange) -> Generator[Frame]:
    if self._next and isinstance(chosen.start, int) and chosen.start < self._next:
      raise ValueError(
        f"frames up to {self._next - 1} were taken from the iterator and cannot be read again: "
        f"give start={self._next} or more."
      )
    while True:
      index = self._next
      time = index / (self.fps or ASSUMED_FPS)
      if chosen.is_over(index, time):
        return
      source = self._first if self._first is not None else next(self._frames, None)
      if source is None:
        return
      self._first, self._next = None, index + 1
      if chosen.takes(index, time):
        yield Frame(index, time, checked(source, f"frame {index}", self.size))


def open_directory(path: Path, fps: float | None, note: Note) -> FrameList:
  """The images in a directory as frames, in natural order; other files are skipped with a note.

  Raises:
    ValueError: the directory cannot be read or has no images.
  """
  notes = ListingNotes()
  try:
    entries = sorted(os.scandir(path), key=lambda entry: natural_order(entry.name))
  except OSError as error:
    raise ValueError(f"{path} cannot be read ({error_text(error)}); {remedy(error)}.") from error
  folders = [entry.name for entry in entries if entry.is_dir()]
  images = [entry.path for entry in entries if not entry.is_dir() and is_image(entry.name, notes)]
  if not images:
    hint = f"give a directory in it, such as {folders[0]}" if folders else "give another directory"
    raise ValueError(f"{path} has no images: {hint}, or a video file.")
  if line := notes.line():
    note(f"{path}: {line}.")
  return FrameList(images, str(path), fps)


def array_frames(array: Any, fps: float | None) -> FrameList:
  """A video given as an array.

  Raises:
    TypeError: it is not uint8.
    ValueError: it is not [T, h, w, 3], or its values are all 0 and 1.
  """
  frames = np.asarray(array)
  if frames.ndim != 4 or frames.shape[3] != 3:
    raise ValueError(f"a video array must be uint8 [T, h, w, 3], not {list(frames.shape)}.")
  if frames.dtype != np.uint8:
    raise TypeError(f"a video array must be uint8, 0..255, not {frames.dtype}: round and cast it.")
  check_range(frames, "the video array")
  return FrameList(frames, "the video array", fps)  # pyright: ignore[reportArgumentType]


def checked(source: Any, name: str, size: tuple[int, int]) -> UInt8[np.ndarray, "h w 3"]:
  """Reads a frame; raises ValueError if it cannot be read, or unless it has the given size."""
  image = read_image(source, dark=True)
  if image.shape[:2] != size:
    (height, width), (h, w) = image.shape[:2], size
    raise ValueError(
      f"{name} is {width} x {height}, but the first frame is {w} x {h}: all frames must have the "
      "same size."
    )
  return image


def _name(source: Any, index: int, video: str) -> str:
  return str(source) if isinstance(source, str | os.PathLike) else f"frame {index} of {video}"
