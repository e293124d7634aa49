"""Makes video clips with PyAV. Each frame tells its number by the colors of two bars."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np


def frame_image(number: int, height: int = 64, width: int = 96) -> np.ndarray:
  """A frame: the left half has the red level of its number, the lower right quarter is green."""
  image = np.full((height, width, 3), 40, np.uint8)
  image[:, : width // 2] = (30 + 5 * (number % 40), 30, 90)
  image[height // 2 :, width // 2 :] = (20, 200, 60)
  return image


def number_of(image: np.ndarray) -> int:
  """The number of an upright frame, modulo 40, by its red level."""
  height, width, _ = image.shape
  red = image[height // 4 : height // 2, width // 8 : 3 * width // 8, 0].mean()
  return round((float(red) - 30) / 5)


def write_clip(
  path: Path,
  count: int = 40,
  size: tuple[int, int] = (64, 96),
  *,
  codec: str = "libx264",
  pixels: str = "yuv420p",
  rate: Any = 25,
  ticks: Sequence[int] | None = None,
  unit: Fraction | None = None,
  group: int = 10,
  audio: bool = False,
  image: Callable[..., np.ndarray] = frame_image,
  options: dict[str, str] | None = None,
  container: dict[str, str] | None = None,
  format: str | None = None,
) -> Path:
  """Writes a clip of `count` frames, with a key frame every `group` frames.

  Args:
    path, size, codec, pixels, rate: of the file; `size` is height and width.
    ticks: time stamps in units of `unit`; by default the number of the frame at `rate`.
    audio: add a second of silence.
    image: makes a frame from its number, height and width.
    options, container: of the encoder and of the file format.
    format: of the file, where its suffix does not tell.
  """
  unit = unit or 1 / Fraction(rate)
  with av.open(str(path), "w", format=format, options=container or {}) as file:
    stream = file.add_stream(codec, rate=rate)
    stream.height, stream.width = size
    stream.pix_fmt = pixels
    stream.time_base = stream.codec_context.time_base = unit
    stream.gop_size = group
    stream.options = {"x265-params": "log-level=none"} if codec == "libx265" else options or {}
    sound: Any = file.add_stream("aac", rate=48000) if audio else None
    for i in range(count):
      frame = av.VideoFrame.from_ndarray(image(i, *size), format="rgb24")
      frame.pts, frame.time_base = ticks[i] if ticks is not None else i, unit
      file.mux(stream.encode(frame))
    file.mux(stream.encode(None))
    if sound is not None:
      mux_silence(file, sound)
  return path


def write_audio(path: Path) -> Path:
  """An audio file of a second."""
  with av.open(str(path), "w") as file:
    mux_silence(file, file.add_stream("aac" if path.suffix == ".m4a" else "flac", rate=48000))
  return path


def mux_silence(file: Any, stream: Any) -> None:
  for start in range(0, 48000, 1024):
    frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.int16), format="s16", layout="mono")
    frame.sample_rate, frame.pts = 48000, start
    file.mux(stream.encode(frame))
  file.mux(stream.encode(None))


def set_matrix(path: Path, a: int, b: int, c: int, d: int) -> None:
  """Sets the display matrix of an MP4 file in its track header (ISO/IEC 14496-12, 8.3.2)."""
  data = bytearray(path.read_bytes())
  header = data.index(b"tkhd") + 4
  matrix = header + (52 if data[header] == 1 else 40)
  one = 1 << 16
  values = [a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30]
  data[matrix : matrix + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in values)
  path.write_bytes(data)
