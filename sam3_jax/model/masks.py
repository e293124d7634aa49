"""The segmentation head: a mask for each query, and one for the concept as a whole (MaskFormer's
product of queries with a fine map, Cheng et al. 2021, arXiv:2107.06278).

Meta's checkpoint has a third pair of convolution and norm that its code never runs: not built.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from sam3_jax.config import Config
from sam3_jax.model.layers import Attention, Mlp, conv, layer_norm


class MaskHead(nn.Module):
  """Mask logits of the queries and of the concept, on the fine map's grid."""

  config: Config
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self,
    states: Float[Array, "P K D"],
    memory: Float[Array, "P H W D"],
    levels: tuple[Float[Array, "P H2 W2 D"], Float[Array, "P Hm Wm D"]],
    prompt: Float[Array, "P S D"],
    valid: Bool[Array, "P S"],
  ) -> tuple[Float[Array, "P K Hm Wm"], Float[Array, "P Hm Wm"]]:
    """`levels` are the middle and the fine map; `memory` stands in for the coarse one."""
    width = self.config.width
    tokens = memory.reshape(len(memory), -1, width)
    normed = layer_norm(dtype=self.dtype, name="prompt_norm")(tokens)
    attend = Attention(self.config.heads, self.dtype, name="prompt_attn")
    x = (tokens + attend(normed, prompt, prompt, valid=valid)).reshape(memory.shape)

    for i, level in enumerate(levels):
      x = level + x.repeat(2, axis=1).repeat(2, axis=2)
      x = conv(width, 3, self.dtype, f"conv{i}")(x)
      norm = nn.GroupNorm(
        8, epsilon=1e-5, dtype=self.dtype, use_fast_variance=False, name=f"norm{i}"
      )
      x = nn.relu(norm(x))

    instance = conv(width, 1, self.dtype, "instance_project")(x)
    embedding = Mlp((width,) * 3, self.dtype, name="mask_embed")(states)
    masks = jnp.einsum(
      "pkd,phwd->pkhw", embedding, instance, preferred_element_type=jnp.float32
    ).astype(self.dtype)
    return masks, conv(1, 1, self.dtype, "semantic_project")(x)[..., 0]
