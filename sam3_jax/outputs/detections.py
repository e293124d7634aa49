"""The results of `Sam3.decode` and `Sam3.decode_visual`: arrays, with conversion to instances."""

from collections.abc import Sequence

from flax import struct

from sam3_jax import types
from sam3_jax.outputs import instances
from sam3_jax.outputs.instances import Instances
from sam3_jax.outputs.masks import Masks


@struct.dataclass
class Detections(types.Detections):
  __doc__ = types.Detections.__doc__

  def instances(self, threshold: float | Sequence[float] = 0.5) -> list[Instances]:
    """The instances with scores above `threshold`; see `sam3_jax.outputs.instances.instances`."""
    return instances.instances(self, threshold)


@struct.dataclass
class VisualMasks(types.VisualMasks):
  __doc__ = types.VisualMasks.__doc__

  def masks(self, hole_area: int = 0) -> list[Masks]:
    """The K masks of each prompt over the source image; see `outputs.instances.visual_masks`."""
    return instances.visual_masks(self, hole_area)

  def instances(self, hole_area: int = 0) -> list[Instances]:
    """The best mask of each prompt as an instance; see `outputs.instances.visual_instances`."""
    return instances.visual_instances(self, hole_area=hole_area)
