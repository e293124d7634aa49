"""Draws the objects of a video over its frames: NAME.sam3.mp4."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from sam3_jax.inputs.video_source import VideoSource
from sam3_jax.outputs.colors import color
from sam3_jax.outputs.track_lines import TrackReader
from sam3_jax.outputs.tracked_frame import TrackedFrame
from sam3_jax.outputs.video_writer import VideoWriter, frames_written
from sam3_jax.outputs.visualize import Item, draw

SUFFIX = ".sam3.mp4"


def draw_objects(
  image: UInt8[np.ndarray, "h w 3"], frame: TrackedFrame
) -> UInt8[np.ndarray, "h w 3"]:
  """A copy of a frame with its objects: filled, outlined, boxed, and labelled with their ids.

  An id has the same color in all frames and all videos; ids from 1 have those of the instances of
  an image. Objects without a pixel are left out.

  Args:
    image: the frame, RGB.
    frame: its objects, of the same size.

  Raises:
    ValueError: the sizes differ.
  """
  if image.shape != (*frame.size, 3):
    raise ValueError(
      f"frame {frame.index} has objects of a frame of {frame.size[1]} x {frame.size[0]}, but the "
      f"image is {image.shape[1]} x {image.shape[0]}."
    )
  drawing = Image.fromarray(image)
  height, width = frame.size
  found = frame.instances
  boxes = np.clip(found.boxes, 0, np.array([width, height] * 2) - 1).tolist()
  items = [
    Item(
      str(int(one)), float(score), color(max(0, int(one) - 1)), tuple(box), found.masks, i, False
    )
    for i, (one, score, box) in enumerate(zip(found.ids, found.scores, boxes, strict=True))
    if box[2] > box[0] or box[3] > box[1]
  ]
  draw(drawing, items)
  return np.asarray(drawing)


class OverlayWriter(VideoWriter):
  """A `VideoWriter` of frames with their objects drawn over them."""

  def draw(self, image: UInt8[np.ndarray, "h w 3"], frame: TrackedFrame) -> None:
    """Appends a frame; raises like `write`."""
    self.write(draw_objects(image, frame), frame.time)


def write_overlay(
  source: VideoSource,
  tracks: TrackReader,
  path: str | Path,
  progress: Callable[[int], object] = lambda _: None,
) -> None:
  """Draws a file of tracks over its video, in the order of frames.

  This serves tracks that were written in another order, as when tracking backwards. Frames that
  were not tracked are left out. An interrupted call is continued.

  Args:
    source: the video; it must allow reading from the first tracked frame on.
    tracks: its objects.
    path: of the new video.
    progress: called with the number of frames that are drawn.

  Raises:
    OSError: the new video cannot be written.
    ValueError: a tracked frame is not in the video or has another size.
  """
  keep = frames_written(path)
  with OverlayWriter(path, source.size, source.fps, keep) as video:
    wanted = tracks.frames[keep:]
    if wanted:
      frames = source.frames(wanted[0], wanted[-1] + 1)
      chosen = set(wanted)
      images = (frame.image for frame in frames if frame.index in chosen)
      objects = (tracked for tracked in tracks if tracked.index in chosen)
      for image, tracked in zip(images, objects, strict=True):
        video.draw(image, tracked)
        progress(video.frames)
    video.finish()
