"""The fusion encoder: image tokens attend to each other and to the prompt (DETR's encoder with
cross-attention, Carion et al. 2020, arXiv:2005.12872).

The first layer's self-attention does not depend on the prompt: `attend` runs once per image.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from sam3_jax.config import Config
from sam3_jax.model.layers import PLAIN, ContextLayer, Layering, gather, local_slice, stacked


class FusionEncoder(nn.Module):
  """Conditions the coarse map's tokens on the prompt; has no final norm.

  `axis` is the axis of a mesh whose devices split the tokens, or None.
  """

  config: Config
  dtype: DTypeLike = jnp.float32
  train: bool = False
  layering: Layering = PLAIN
  axis: str | None = None

  def setup(self):
    config = self.config
    self.layers = ContextLayer(
      config.width, config.heads, config.mlp_width, self.dtype, config.dropout, self.train,
      self.axis,
    )  # fmt: skip

  def attend(
    self, image: Float[Array, "B HW D"], position: Float[Array, "HW D"]
  ) -> Float[Array, "B HW D"]:
    """The first layer's self-attention."""
    if self.is_initializing():  # `__call__` creates the parameters of all layers
      return image
    first = functools.partial(jax.tree.map, lambda x: x[0])
    layer = self.layering(ContextLayer.attend)
    attend = nn.map_variables(layer, "params", trans_in_fn=first, variables=False)
    return gather(attend(self.layers, local_slice(image, self.axis, 1), position), self.axis, 1)

  def __call__(
    self,
    attended: Float[Array, "P HW D"],
    position: Float[Array, "HW D"],
    prompt: Float[Array, "P S D"],
    valid: Bool[Array, "P S"],
  ) -> Float[Array, "P HW D"]:
    """Runs the remaining layers. `attended` is the output of `attend` for each prompt's image."""

    def step(layer, x, first):
      return layer(x, position, None, prompt, prompt, valid, attended=first)

    length = self.config.fusion_layers
    layers = stacked(step, length, in_axes=0, layering=self.layering)
    x, _ = layers(
      self.layers, local_slice(attended, self.axis, 1), jnp.arange(length, dtype=jnp.int32) == 0
    )
    return gather(x, self.axis, 1)
