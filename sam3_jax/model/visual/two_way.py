"""The two-way transformer: tokens look at the image, and the image looks back (Segment Anything,
Kirillov et al. 2023, arXiv:2304.02643, appendix A)."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from sam3_jax.model.layers import Attention, Mlp
from sam3_jax.model.norms import LayerNorm

LAYERS = 2
HEADS = 8
MLP_WIDTH = 2048


class TwoWayTransformer(nn.Module):
  """Tokens and image, each having looked at the other.

  Tokens carry what they were at the start as their position. An image of one row serves all
  prompts: what does not depend on them is then computed once.
  """

  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self,
    tokens: Float[Array, "P I D"],
    valid: Bool[Array, "P I"],
    image: Float[Array, "P2 HW D"],
    position: Float[Array, "HW D"],
  ) -> tuple[Float[Array, "P I D"], Float[Array, "P HW D"]]:
    """`valid` is False on padding, which nothing looks at."""
    x = tokens
    for i in range(LAYERS):
      layer = TwoWayLayer(first=i == 0, dtype=self.dtype, name=f"layer{i}")
      x, image = layer(x, tokens, valid, image, position)
    attend = Attention(HEADS, self.dtype, inner=tokens.shape[-1] // 2, name="final_attn")
    x = x + attend(x + tokens, image + position, image)
    return LayerNorm(dtype=self.dtype, name="norm_final")(x), image


class TwoWayLayer(nn.Module):
  """Post-norm layer: tokens among themselves, tokens to the image, MLP, image to the tokens.

  In the first layer the tokens are their own positions, and self-attention takes their place
  rather than being added to them: so the weights were trained.
  """

  first: bool
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "P I D"],
    place: Float[Array, "P I D"],
    valid: Bool[Array, "P I"],
    image: Float[Array, "P2 HW D"],
    position: Float[Array, "HW D"],
  ) -> tuple[Float[Array, "P I D"], Float[Array, "P HW D"]]:
    width = x.shape[-1]

    def attend(name, inner=width):
      return Attention(HEADS, self.dtype, inner=inner, name=name)

    def norm(name, y):
      return LayerNorm(dtype=self.dtype, name=name)(y)

    placed = x if self.first else x + place
    branch = attend("self_attn")(placed, placed, x, valid=valid)
    x = norm("norm1", branch if self.first else x + branch)
    keys = image + position
    x = norm("norm2", x + attend("image_attn", width // 2)(x + place, keys, image))
    x = norm("norm3", x + Mlp((MLP_WIDTH, width), self.dtype, name="mlp")(x))
    back = attend("token_attn", width // 2)(keys, x + place, x, valid=valid)
    return x, norm("norm4", image + back)
