"""Writes H.264 videos in MP4, in pieces, so that a killed run can resume.

While a video is written, its pieces are in the directory PATH.pieces, each complete or absent. At
the end they are joined without encoding again, and the directory is removed. Frames are encoded
without B-frames: each packet is one frame, so a piece can be cut after any frame.
"""

import contextlib
import re
import shutil
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self

import numpy as np
from jaxtyping import UInt8

from sam3_jax.inputs.video_container import import_av
from sam3_jax.utils.atomic_files import Draft
from sam3_jax.utils.lease import PARTIAL

PIECE = 500  # frames
TICKS = 90_000  # per second, as in MPEG; times are rounded to them

_CODEC = "libx264"
_OPTIONS = {"crf": "20", "preset": "veryfast", "bf": "0"}
_KEY_EVERY = 50  # frames; players seek to key frames
_NAME = re.compile(r"(\d{9})-(\d{15})\.mp4")


class _Piece(NamedTuple):
  """A complete piece: its first frame, the time of that in ticks, and its file."""

  first: int
  start: int
  path: Path


class VideoWriter:
  """Writes a video, frame by frame.

  with VideoWriter(path, (height, width), fps=25) as video:
    video.write(image, time)
    video.finish()

  Leaving `with` before `finish` keeps the complete pieces, for a later writer with `keep`.

  Times are kept, also if they vary: they are rounded to 1/90,000 s, and the first frame is at 0 s.
  H.264 stores colors for pairs of rows and columns: an odd height or width is increased by one
  by repeating the last row or column. Colors are BT.709.

  Attributes:
    path: of the video.
    frames: number of frames written.
  """

  def __init__(
    self, path: str | Path, size: tuple[int, int], fps: float | None = None, keep: int = 0
  ):
    """Prepares to write; nothing is opened yet.

    Args:
      path: of the video; an existing file is replaced by `finish`.
      size: height and width of the images in pixels.
      fps: frames per second on average, for the duration of the last frame; 25 by default.
      keep: frames to keep of an earlier, interrupted run; the others are discarded.

    Raises:
      ImportError: PyAV is not installed.
      ValueError: PyAV has no H.264 encoder, or fewer frames than `keep` are complete.
    """
    av = import_av()
    if _CODEC not in av.codecs_available:
      raise ValueError(f"this PyAV has no H.264 encoder ({_CODEC}): pip install av has one.")
    self.path, self.size, self.frames = Path(path), size, keep
    self._step = max(1, round(TICKS / (fps or 25)))
    self._folder = self.path.with_name(self.path.name + ".pieces")
    self._encoder: _Encoder | None = None
    self._last = self._cut(keep)  # ticks of the last frame

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    if self._encoder is not None:
      self._encoder.discard()
      self._encoder = None

  def write(self, image: UInt8[np.ndarray, "h w 3"], time: float) -> None:
    """Appends a frame.

    Args:
      image: RGB.
      time: seconds; must increase.

    Raises:
      OSError: the file cannot be written, such as if the disk is full.
      ValueError: another size, or a time that does not increase.
    """
    ticks = round(time * TICKS)
    if image.shape != (*self.size, 3) or image.dtype != np.uint8:
      raise ValueError(
        f"frames of {self.path} are uint8 [{self.size[0]}, {self.size[1]}, 3]; got {image.dtype} "
        f"{list(image.shape)}."
      )
    if self._last is not None and ticks <= self._last:
      raise ValueError(
        f"times of frames must increase; got {time:g} after {self._last / TICKS:g} seconds."
      )
    if self._encoder is None:
      self._encoder = _Encoder(self._folder, self.frames, ticks, self.size, self._step)
    self._encoder.write(image, ticks)
    self.frames, self._last = self.frames + 1, ticks
    if self._encoder.count == PIECE:
      self.checkpoint()

  def checkpoint(self) -> int:
    """Completes the current piece; returns the number of frames that `keep` may name."""
    if self._encoder is not None:
      self._encoder.commit()
      self._encoder = None
    return self.frames

  def finish(self) -> None:
    """Joins the pieces to the video and removes them; nothing is written without frames."""
    self.checkpoint()
    pieces = _pieces(self._folder)
    if pieces:
      with Draft(self.path) as draft:
        with draft.naming():
          _join(pieces, draft.file)
        draft.commit()
    shutil.rmtree(self._folder, ignore_errors=True)

  def _cut(self, keep: int) -> int | None:
    """Discards all but the first `keep` frames of the pieces; returns the ticks of the last one."""
    last, complete = None, 0
    if self._folder.is_dir():
      for draft in self._folder.glob(f".*{PARTIAL}"):
        draft.unlink(missing_ok=True)
    for piece in _pieces(self._folder):
      if piece.first >= keep:
        piece.path.unlink()
      elif piece.first == complete:
        stamps = _stamps(piece.path)
        kept = stamps[: keep - piece.first]
        if len(kept) < len(stamps):
          with Draft(piece.path) as draft:
            with draft.naming():
              _join([piece], draft.file, len(kept))
            draft.commit()
        complete, last = complete + len(kept), piece.start + kept[-1]
    if complete < keep:
      raise ValueError(
        f"{self._folder} has only {complete} of the {keep} frames to continue after: remove it and "
        "the checkpoint of this run to start again."
      )
    return last


def frames_written(path: str | Path) -> int:
  """Frames of an interrupted video that are complete: the largest `keep` of a `VideoWriter`."""
  complete = 0
  path = Path(path)
  for piece in _pieces(path.with_name(path.name + ".pieces")):
    if piece.first == complete:
      complete += len(_stamps(piece.path))
  return complete


class _Encoder:
  """Encodes a piece; `first`, `start` as for `_Piece`."""

  def __init__(self, folder: Path, first: int, start: int, size: tuple[int, int], step: int):
    self.count = 0
    self._start, self._step = start, step
    self._draft = Draft(folder / f"{first:09d}-{start:015d}.mp4")
    self._height, self._width = (side + side % 2 for side in size)
    try:
      self._container = import_av().open(self._draft.file, "w", format="mp4")
      self._stream = self._make_stream()
    except BaseException:
      self._draft.discard()
      raise

  def _make_stream(self) -> Any:
    stream = self._container.add_stream(_CODEC, rate=Fraction(TICKS, self._step))
    stream.height, stream.width, stream.pix_fmt = self._height, self._width, "yuv420p"
    context = stream.codec_context
    stream.time_base = context.time_base = Fraction(1, TICKS)
    context.gop_size, stream.options = _KEY_EVERY, dict(_OPTIONS)
    context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709
    context.color_range = 1  # limited
    return stream

  def write(self, image: np.ndarray, ticks: int) -> None:
    av = import_av()
    height, width, _ = image.shape
    if (height, width) != (self._height, self._width):
      margins = ((0, self._height - height), (0, self._width - width), (0, 0))
      image = np.pad(image, margins, mode="edge")
    rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
    colors, ranges = av.video.reformatter.Colorspace, av.video.reformatter.ColorRange
    frame = rgb.reformat(
      format="yuv420p", dst_colorspace=colors.ITU709, dst_color_range=ranges.MPEG
    )
    frame.pts, frame.time_base = ticks - self._start, Fraction(1, TICKS)
    with self._draft.naming():
      self._container.mux(self._stream.encode(frame))
    self.count += 1

  def commit(self) -> None:
    with self._draft.naming():
      self._container.mux(self._stream.encode(None))
      self._container.close()
    self._draft.commit()

  def discard(self) -> None:
    with contextlib.suppress(OSError):
      self._container.close()
    self._draft.discard()


def _pieces(folder: Path) -> list[_Piece]:
  """The complete pieces in a directory, in order."""
  if not folder.is_dir():
    return []
  found = []
  for path in folder.iterdir():
    if match := _NAME.fullmatch(path.name):
      found.append(_Piece(int(match[1]), int(match[2]), path))
  return sorted(found)


def _stamps(path: Path) -> list[int]:
  """Ticks of the frames of a piece since its first frame."""
  with import_av().open(str(path)) as container:
    return [packet.pts for packet, _ in _packets(container)]


def _packets(container: Any) -> Iterator[tuple[Any, Any]]:
  """Packets of a piece, with time stamps in ticks, and their stream."""
  stream = container.streams.video[0]
  scale = stream.time_base * TICKS
  for packet in container.demux(stream):
    if packet.size:
      packet.pts = packet.dts = round(packet.pts * scale)
      packet.duration = round((packet.duration or 0) * scale)
      packet.time_base = Fraction(1, TICKS)
      yield packet, stream


def _join(pieces: list[_Piece], file: BinaryIO, most: int | None = None) -> None:
  """Copies the packets of pieces, or the first `most` of them, to an MP4 file."""
  av = import_av()
  count, output = 0, None
  with av.open(file, "w", format="mp4") as target:
    for piece in pieces:
      with av.open(str(piece.path)) as container:
        for packet, stream in _packets(container):
          if count == most:
            break
          if output is None:
            output = target.add_stream_from_template(stream)
            output.time_base = Fraction(1, TICKS)
          packet.pts = packet.dts = packet.pts + piece.start - pieces[0].start
          packet.stream = output
          target.mux(packet)
          count += 1
