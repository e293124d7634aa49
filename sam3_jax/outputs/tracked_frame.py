"""The result of tracking for one frame of a video."""

import dataclasses

import numpy as np

from sam3_jax.outputs.instances import Instances


@dataclasses.dataclass(frozen=True)
class TrackedFrame:
  """The objects in a frame.

  Attributes:
    index: number of the frame in the video, from 0.
    time: seconds since the first frame of the video.
    size: height and width of the frame in pixels.
    instances: the objects of all prompts. An id stands for the same object in all frames. Boxes are
      xyxy in pixels of the frame; masks are lazy, over the frame.
    phrases: the phrase that found each object; None for an object of another prompt. Empty if no
      object has a phrase.
  """

  index: int
  time: float
  size: tuple[int, int]
  instances: Instances
  phrases: tuple[str | None, ...] = ()

  def __post_init__(self):
    if len(self.phrases) not in (0, len(self.instances)):
      raise ValueError(
        f"phrases must have an entry for each of {len(self.instances)} objects; got "
        f"{len(self.phrases)}."
      )

  def of(self, phrase: str | None) -> Instances:
    """The objects that a phrase found; with None, those of prompts without a phrase."""
    phrases = self.phrases or (None,) * len(self.instances)
    return self.instances[np.array([one == phrase for one in phrases], bool)]
