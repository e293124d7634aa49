"""Opens videos: files, directories of images, arrays, and iterators such as cameras."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import jax
import numpy as np

from sam3_jax.inputs.frame_list import FrameIterator, FrameList, array_frames, open_directory
from sam3_jax.inputs.frame_range import Position, Seconds, parse_position
from sam3_jax.inputs.preprocess import ImageSource
from sam3_jax.inputs.video_file import VideoFile
from sam3_jax.inputs.video_source import Frame, Note, VideoSource, warn
from sam3_jax.utils.validation import check_number

__all__ = [
  "Frame",
  "Position",
  "Seconds",
  "VideoInput",
  "VideoSource",
  "open_video",
  "parse_position",
]

VideoInput: TypeAlias = (
  str | os.PathLike | np.ndarray | jax.Array | Sequence[ImageSource] | Iterator[ImageSource]
  | VideoSource
)  # fmt: skip


def open_video(source: VideoInput, *, fps: float | None = None, note: Note = warn) -> VideoSource:
  """Opens a video.

  Frames are RGB, uint8 and upright, as `read_image` reads images. Nothing is resized.

  Args:
    source: one of
      - a path of a video file, which needs the extra `video` (see `VideoFile`);
      - a path of a directory of images, which become frames in natural order (frame2 before
        frame10);
      - an array uint8 [T, h, w, 3], RGB;
      - a list of images: paths, PIL images or arrays uint8 [h, w, 3];
      - an iterator of such images, such as a generator that reads a camera. It may be endless.
        Frames are read once, forwards, and their number is unknown;
      - an open video, which is returned.
    fps: frames per second of a video that is not a file. Without it, positions are frame numbers
      only, and the times of frames are those of 25 frames per second.
    note: takes notes of one line, such as about a truncated file; by default they are warnings.

  Raises:
    FileNotFoundError: no such file or directory.
    ImportError: PyAV is not installed.
    TypeError: another type of source, or an array that is not uint8.
    ValueError: the source is not a video, cannot be read or has no frames; `fps` is not a positive
      number, or is given for a file.
  """
  if fps is not None:
    check_number("fps", fps, 0, ends="(]", remedy="Give the frames per second, such as 25.")
  if isinstance(source, VideoSource | str | os.PathLike):
    if isinstance(source, str | os.PathLike) and os.path.isdir(source):
      return open_directory(Path(source), fps, note)
    if fps is not None:
      raise ValueError(f"fps is {fps:g}, but the video has its own times: leave fps out.")
    return source if isinstance(source, VideoSource) else VideoFile(source, note)
  if isinstance(source, np.ndarray | jax.Array):
    return array_frames(source, fps)
  if isinstance(source, Sequence) and not isinstance(source, bytes | bytearray | memoryview):
    return FrameList(source, "the list of frames", fps)
  if isinstance(source, Iterator):
    return FrameIterator(source, fps)
  raise TypeError(
    "a video must be a path, an array, a list of images or an iterator of images, not "
    f"{type(source).__name__}: iter(...) makes an iterator."
  )
