"""Lists the frames of a video file without decoding them: time stamps and key frames.

The number of a frame is its rank among the time stamps. So a frame has the same number and time
whether it is reached from the beginning, after a seek, or backwards.
"""

import dataclasses
import functools
from typing import Any

import numpy as np
from jaxtyping import Float, Int

_END_SLACK = 0.1  # seconds between the last packet and the end that a complete file may have


@dataclasses.dataclass(frozen=True)
class KeyFrame:
  """A frame that can be decoded without others.

  Attributes:
    index: its number.
    seek: time stamp to seek to, in units of the stream.
  """

  index: int
  seek: int


@dataclasses.dataclass(frozen=True)
class Scan:
  """The frames of a video stream.

  Attributes:
    stamps: presentation time stamps in units of the stream, increasing. None if the file has no
      usable ones, as a raw H.264 stream; then frames can only be counted.
    keys: the key frames, increasing; the first is frame 0.
    unit: seconds of a unit of time.
    fault: how the file is incomplete, such as "is cut off after 34 of its 40 frames"; "" if it is
      complete as far as known.
  """

  stamps: Int[np.ndarray, " n"] | None
  keys: tuple[KeyFrame, ...]
  unit: float
  fault: str

  @functools.cached_property
  def times(self) -> Float[np.ndarray, " n"] | None:
    """Seconds since the first frame."""
    return None if self.stamps is None else (self.stamps - self.stamps[0]) * self.unit

  def index(self, stamp: int | None) -> int | None:
    """The number of the frame with a time stamp; None if there is none."""
    if stamp is None or self.stamps is None:
      return None
    index = int(np.searchsorted(self.stamps, stamp))
    return index if index < len(self.stamps) and self.stamps[index] == stamp else None

  def key_before(self, index: int) -> KeyFrame:
    """The last key frame at or before a frame."""
    return max((key for key in self.keys if key.index <= index), key=lambda key: key.index)

  def without(self, count: int) -> "Scan":
    """Without the first `count` frames; a key frame must remain."""
    if self.stamps is None or not count:
      return self
    keys = tuple(KeyFrame(max(0, key.index - count), key.seek) for key in self.keys)
    kept = [key for key in keys if key.index > 0]
    first = max((key for key in keys if key.index == 0), key=lambda key: key.seek)
    return dataclasses.replace(self, stamps=self.stamps[count:], keys=(first, *kept))


def scan(container: Any, stream: Any, error: type[Exception]) -> Scan:
  """Reads all packets of an open container.

  Args:
    container: a PyAV container, at its beginning.
    stream: its video stream.
    error: the type of PyAV's errors.
  """
  stamps: list[int | None] = []
  keys: list[tuple[int, int]] = []
  packets, end, fault = 0, 0.0, ""
  try:
    for packet in container.demux():
      if packet.size == 0:
        continue
      if packet.stream_index != stream.index:
        end = max(end, _end(packet))
        continue
      cut = is_cut_off(packet, container)
      packets += not cut
      if cut or packet.is_discard or _is_hidden(packet, stream):
        continue
      end = max(end, _end(packet))
      if not stamps and not packet.is_keyframe:
        continue  # nothing can be decoded before the first key frame
      if packet.is_keyframe and packet.pts is not None:
        stamp = int(packet.pts)
        keys.append((stamp, stamp if packet.dts is None else min(stamp, int(packet.dts))))
      stamps.append(None if packet.pts is None else int(packet.pts))
  except error as reason:
    fault = f"is damaged after {end:.4g} seconds ({_text(reason)})"
  if stream.frames > packets and "mov" in container.format.name:
    fault = fault or f"is cut off after {packets} of its {stream.frames} frames"
  elif container.duration and "matroska" in container.format.name:
    whole = container.duration / 1e6
    if end < whole - _END_SLACK:
      fault = fault or f"is cut off after {end:.4g} of its {whole:.4g} seconds"
  unit = float(stream.time_base or 0)
  known = [stamp for stamp in stamps if stamp is not None]
  if not known or len(known) < len(stamps) or len(set(known)) < len(known) or not keys:
    return Scan(None, (KeyFrame(0, 0),), unit, fault if stamps else fault or "has no frames")
  first = keys[0][0]  # frames shown before it are parts of an earlier, missing group
  shown = np.sort(np.array([stamp for stamp in known if stamp >= first], np.int64))
  ranks = np.searchsorted(shown, [stamp for stamp, _ in keys]).tolist()
  found = [KeyFrame(rank, seek) for rank, (_, seek) in zip(ranks, keys, strict=True)]
  return Scan(shown, tuple(sorted(found, key=lambda key: key.index)), unit, fault)


def is_cut_off(packet: Any, container: Any) -> bool:
  """Whether the file ends within a packet."""
  # In a transport stream, the mark means that data may have been lost before the packet.
  return packet.is_corrupt and container.format.name != "mpegts"


def _is_hidden(packet: Any, stream: Any) -> bool:
  """Whether a packet is only a reference for others, and no frame by itself."""
  # VP8 says so in a bit (RFC 6386, section 9.1); VP9 and AV1 put such frames into other packets.
  return stream.codec_context.name == "vp8" and not memoryview(packet)[0] >> 4 & 1


def _end(packet: Any) -> float:
  """When a packet ends, in seconds of the container."""
  if packet.pts is None or packet.time_base is None:
    return 0.0
  return float((packet.pts + (packet.duration or 0)) * packet.time_base)


def _text(error: Exception) -> str:
  return str(getattr(error, "strerror", "") or type(error).__name__)
