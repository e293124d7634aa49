"""The result of tracking for one frame of a video."""

import dataclasses

from sam3_jax.outputs.instances import Instances


@dataclasses.dataclass(frozen=True)
class TrackedFrame:
  """The objects in a frame.

  Attributes:
    index: number of the frame in the video, from 0.
    time: seconds since the first frame of the video.
    size: height and width of the frame in pixels.
    instances: the objects. An id stands for the same object in all frames. Boxes are xyxy in
      pixels of the frame; masks are lazy, over the frame.
  """

  index: int
  time: float
  size: tuple[int, int]
  instances: Instances
