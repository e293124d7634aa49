"""Decodes the frames of an open video file from a given one on, and converts them to RGB."""

from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
from jaxtyping import UInt8

from sam3_jax.inputs.preprocess import read_image
from sam3_jax.inputs.video_container import import_av, open_container
from sam3_jax.inputs.video_scan import KeyFrame, Scan, is_cut_off

_UPRIGHT = (1, 0, 0, 1)


def decoded(path: str, scan: Scan, first: int = 0) -> Generator[tuple[int, Any]]:
  """Yields the numbers of frames, and the frames as PyAV decodes them.

  Starts at `first`, or at frames before it that are needed to decode it. Damaged frames are
  missing. Without time stamps, frames are counted from the beginning.
  """
  for key in _starts(scan, first):
    with open_container(path) as (container, stream):
      frames = _numbered(scan, _frames(scan, key, container, stream))
      head = next(frames, None)
      # A decoder holds frames back that it cannot decode exactly from here, as after a gradual
      # intra refresh; or the file format cannot seek to this key frame.
      if key.index == 0 or (head is not None and head[0] <= first):
        if head is not None:
          yield head
        yield from frames
        return


def _starts(scan: Scan, first: int) -> Iterator[KeyFrame]:
  """Key frames before `first` to start from, from the last one to the first, ever farther apart."""
  keys = [key for key in scan.keys if key.index <= first]
  step, at = 1, len(keys) - 1
  while at > 0:
    yield keys[at]
    at, step = at - step, 2 * step
  yield keys[0]


def _numbered(scan: Scan, frames: Iterator[Any]) -> Iterator[tuple[int, Any]]:
  for count, frame in enumerate(frames):
    index = count if scan.stamps is None else scan.index(frame.pts)
    if index is not None:
      yield index, frame


def _frames(scan: Scan, key: KeyFrame, container: Any, stream: Any) -> Iterator[Any]:
  """Decodes from a key frame on; nothing if it cannot be found."""
  failed = import_av().error.FFmpegError
  sought = key.index > 0
  try:
    if sought:
      container.seek(key.seek, stream=stream)
    for packet in container.demux(stream):
      if packet.size == 0 or is_cut_off(packet, container):
        continue
      if sought:
        if not packet.is_keyframe:
          continue
        index = scan.index(packet.pts)
        if index is None or index > key.index:
          return
        sought = False
      try:
        yield from packet.decode()
      except failed:  # the packet is damaged; the next one may be good
        continue
  except failed:  # the rest of the file cannot be read
    pass
  if sought:
    return
  try:
    yield from stream.codec_context.decode(None)
  except failed:
    return


def size_of(frame: Any) -> tuple[int, int]:
  """Height and width of a decoded frame as displayed."""
  turned = _matrix(frame)[0] == 0
  return (frame.width, frame.height) if turned else (frame.height, frame.width)


def pixels_of(frame: Any) -> UInt8[np.ndarray, "h w 3"]:
  """A decoded frame as RGB, upright; transparent pixels are composited over white."""
  # FFmpeg's default is faster, but darkens an image by 1.2 of 255 on average.
  flags = import_av().video.reformatter.Interpolation
  scaling = flags.BILINEAR | flags.ACCURATE_RND | flags.FULL_CHR_H_INT
  alpha = any(part.is_alpha for part in frame.format.components)
  rgb = frame.reformat(format="rgba" if alpha else "rgb24", interpolation=scaling)
  pixels = rgb.to_ndarray()
  if alpha:
    pixels = read_image(pixels, dark=True)
  across, down, back, along = _matrix(frame)
  if across == 0:
    pixels = pixels.swapaxes(0, 1)
    pixels = pixels[::down, ::back]
  else:
    pixels = pixels[::along, ::across]
  return np.ascontiguousarray(pixels)


def _matrix(frame: Any) -> tuple[int, int, int, int]:
  """The display matrix as -1, 0 and 1: a, b, c, d of x' = a x + c y, y' = b x + d y.

  Other angles than multiples of 90 degrees are rounded to one, as they do not fill a rectangle.
  """
  from av.sidedata.sidedata import Type

  data = frame.side_data.get(Type.DISPLAYMATRIX)
  if data is None:
    return _UPRIGHT
  a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5].tolist()
  signs = [1 if value >= 0 else -1 for value in (a, b, c, d)]
  if abs(a) >= abs(b):
    return signs[0], 0, 0, signs[3]
  return 0, signs[1], signs[2], 0
