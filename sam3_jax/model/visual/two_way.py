"""The two-way transformer: tokens attend to the image, and the image to the tokens (Segment
Anything, Kirillov et al. 2023, arXiv:2304.02643, appendix A)."""

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
  """Updates tokens and image by attention to each other.

  The initial tokens serve as the tokens' positional encodings in every layer. An image with a
  single row is broadcast over the prompts: what does not depend on them is then computed once.
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
    """`valid` is False on padding tokens, to which nothing attends."""
    x = tokens
    for i in range(LAYERS):
      layer = TwoWayLayer(first=i == 0, dtype=self.dtype, name=f"layer{i}")
      x, image = layer(x, tokens, valid, image, position)
    attend = Attention(HEADS, self.dtype, inner=tokens.shape[-1] // 2, name="final_attn")
    x = x + attend(x + tokens, image + position, image)
    return LayerNorm(dtype=self.dtype, name="norm_final")(x), image


class TwoWayLayer(nn.Module):
  """Post-norm layer: tokens among themselves, tokens to the image, MLP, image to the tokens.

  The first layer adds no positional encodings in self-attention, whose output replaces the tokens
  rather than being added to them. The weights were trained this way.
  """

  first: bool
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "P I D"],
    token_position: Float[Array, "P I D"],
    valid: Bool[Array, "P I"],
    image: Float[Array, "P2 HW D"],
    position: Float[Array, "HW D"],
  ) -> tuple[Float[Array, "P I D"], Float[Array, "P HW D"]]:
    width = x.shape[-1]

    def attend(name, inner=width):
      return Attention(HEADS, self.dtype, inner=inner, name=name)

    def norm(name, y):
      return LayerNorm(dtype=self.dtype, name=name)(y)

    keyed = x if self.first else x + token_position
    branch = attend("self_attn")(keyed, keyed, x, valid=valid)
    x = norm("norm1", branch if self.first else x + branch)
    keys = image + position
    x = norm("norm2", x + attend("image_attn", width // 2)(x + token_position, keys, image))
    x = norm("norm3", x + Mlp((MLP_WIDTH, width), self.dtype, name="mlp")(x))
    back = attend("token_attn", width // 2)(keys, x + token_position, x, valid=valid)
    return x, norm("norm4", image + back)
