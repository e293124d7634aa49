"""The frames of an uploaded video, decoded in a process of its own."""

from collections.abc import Generator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from sam3_jax.inputs.video_file import VideoFile
from sam3_jax.inputs.video_source import Frame, VideoSource
from sam3_jax.server.errors import ApiError
from sam3_jax.server.settings import Settings
from sam3_jax.server.video.reader import NAME, VideoReader


class UploadedVideo(VideoSource):
  """A `VideoSource` whose frames another process decodes; see `VideoReader`."""

  def __init__(self, path: Path, seconds: float):
    """Arguments and errors as those of `VideoReader`."""
    self._reader = VideoReader(path, seconds)
    opened = self._reader.opened
    self.name, self.size, self.fps, self._times = NAME, opened.size, opened.fps, opened.times
    self.length = None if opened.times is None else len(opened.times)
    self.random_access = opened.times is not None

  @property
  def times(self) -> Float[np.ndarray, " length"] | None:
    return self._times

  def close(self) -> None:
    self._reader.close()

  def _forward(self, wanted: Sequence[int]) -> Generator[Frame]:
    if len(wanted) == 1:
      yield self._reader.read(wanted[0])
    else:
      yield from self._chosen(wanted, False)

  def _backward(self, wanted: Sequence[int]) -> Generator[Frame]:
    yield from self._chosen(wanted, True)

  def _chosen(self, wanted: Sequence[int], reverse: bool) -> Generator[Frame]:
    chosen = set(wanted)
    for frame in self._reader.frames(wanted[0], wanted[-1] + 1, reverse):
      if frame.index in chosen:
        yield frame


def open_upload(path: Path, settings: Settings) -> VideoSource:
  """Opens an uploaded file.

  Raises:
    ApiError: it is not a video that the server takes.
  """
  try:
    if settings.readers:
      source: VideoSource = UploadedVideo(path, settings.decode_seconds)
    else:
      source = VideoFile(path, note=lambda _: None)
  except (ValueError, ImportError) as error:
    raise ApiError("unsupported_video", str(error).replace(str(path), NAME)) from None
  try:
    _check(source, settings)
  except ApiError:
    source.close()
    raise
  return source


def _check(source: VideoSource, settings: Settings) -> None:
  height, width = source.size
  if source.length is None:
    raise ApiError(
      "unsupported_video", f"{NAME} has no time stamps, so its frames cannot be looked up: save it "
      "as MP4.",
    )  # fmt: skip
  if source.length > settings.max_video_frames:
    raise ApiError(
      "too_many_frames",
      f"{NAME} has {source.length:,} frames, and this server takes {settings.max_video_frames:,}: "
      "cut it into shorter videos.",
    )
  if height * width > settings.max_video_pixels:
    raise ApiError(
      "too_many_pixels",
      f"the frames of {NAME} have {width} x {height} pixels, and this server takes "
      f"{settings.max_video_pixels:,} pixels: make it smaller.",
    )
