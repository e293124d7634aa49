"""The fusion encoder: image tokens look at each other and at the prompt (DETR's encoder with
cross-attention, Carion et al. 2020, arXiv:2005.12872)."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from sam3_jax.config import Config
from sam3_jax.model.layers import PLAIN, ContextLayer, Layering, stacked


class FusionEncoder(nn.Module):
  """The coarse map's tokens, conditioned on the prompt; no final norm."""

  config: Config
  dtype: DTypeLike = jnp.float32
  train: bool = False
  layering: Layering = PLAIN

  @nn.compact
  def __call__(
    self,
    image: Float[Array, "P HW D"],
    position: Float[Array, "HW D"],
    prompt: Float[Array, "P S D"],
    valid: Bool[Array, "P S"],
  ) -> Float[Array, "P HW D"]:
    config = self.config
    layers = stacked(ContextLayer, config.fusion_layers, layering=self.layering)(
      config.heads, config.mlp_width, self.dtype, config.dropout, self.train, name="layers"
    )
    x, _ = layers(image, position, None, prompt, prompt, valid)
    return x
