"""The text encoder of SAM 3 LiteText: MobileCLIP's (Vasu et al. 2024, arXiv:2311.17049), distilled
from SAM 3's (arXiv:2602.12173).

The smallest size has a convolution block (RepMixer; FastViT, Vasu et al. 2023, arXiv:2303.14189)
before and after the transformer layers. Attention is not causal, so it includes the padding after a
phrase.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from sam3_jax.config import LiteTextConfig
from sam3_jax.model.layers import PLAIN, Block, Layering, Mlp, dense, gelu, stacked
from sam3_jax.model.norms import LayerNorm
from sam3_jax.model.text import PADDING
from sam3_jax.ops.precision import precision_of
from sam3_jax.types import TextEmbedding

LAYER_SCALE = 1e-5  # initial value


class LiteTextEncoder(nn.Module):
  """Encodes token ids as one vector per token.

  The released weights were distilled with padding id 0 and attention to the padding, which changes
  the vectors of the phrase; this is the default. transformers 5.23 pads with the end token's id and
  masks the padding in attention, but not in the mixers. `config.mask_padding` selects that, for
  weights that were trained with transformers.
  """

  config: LiteTextConfig
  width: int
  dtype: DTypeLike = jnp.float32
  train: bool = False
  layering: Layering = PLAIN

  @nn.compact
  def __call__(self, tokens: Int[Array, "P T"]) -> TextEmbedding:
    config, valid = self.config, tokens != PADDING
    attended = valid if config.mask_padding else None
    ids = jnp.where(valid, tokens, config.vocabulary - 1) if config.mask_padding else tokens
    table = nn.Embed(config.vocabulary, config.width, dtype=self.dtype, name="token_embedding")
    shape = (config.context, config.width)
    position = self.param("position", nn.initializers.normal(0.01), shape, jnp.float32)
    x = table(ids) + position[: tokens.shape[1]].astype(self.dtype)
    if config.mixers:
      x = Mixer(config.kernel, config.mlp_width, self.dtype, name="first")(x)
    blocks = stacked(Block, config.layers, layering=self.layering)(
      config.heads, config.mlp_width, self.dtype, train=self.train, name="blocks"
    )
    x, _ = blocks(x, 0.0, attended)
    if config.mixers:
      x = Mixer(config.kernel, config.mlp_width, self.dtype, name="last")(x)
    x = LayerNorm(dtype=self.dtype, name="norm_final")(x)
    return TextEmbedding(dense(self.width, self.dtype, "project")(x), valid)


class Mixer(nn.Module):
  """RepMixer block with separate branches, as in training: a convolution along the phrase mixes the
  tokens, then each token passes through a convolution and an MLP."""

  kernel: int
  mlp_width: int
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "P T C"]) -> Float[Array, "P T C"]:
    width = x.shape[-1]

    def along(name: str) -> nn.Conv:  # depthwise
      return nn.Conv(
        width,
        (self.kernel,),
        feature_group_count=width,
        use_bias=False,
        dtype=self.dtype,
        precision=precision_of(self.dtype),
        name=name,
      )

    def norm(name: str) -> FixedNorm:
      return FixedNorm(self.dtype, name=name)

    def scale(name: str) -> Array:
      start = nn.initializers.constant(LAYER_SCALE)
      return self.param(name, start, (width,), jnp.float32).astype(self.dtype)

    mixed = norm("mix_norm")(along("mix")(x)) + norm("skip_norm")(x) - norm("reference_norm")(x)
    x = x + scale("mix_scale") * mixed
    y = norm("feed_norm")(along("feed")(x))
    y = Mlp((self.mlp_width, width), self.dtype, gelu, name="mlp")(y)
    return x + scale("feed_scale") * y


class FixedNorm(nn.Module):
  """Batch norm with fixed statistics, those of the original training."""

  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "P T C"]) -> Float[Array, "P T C"]:
    zeros, ones = nn.initializers.zeros, nn.initializers.ones

    def parameter(name: str, initializer: nn.initializers.Initializer) -> Array:
      return self.param(name, initializer, x.shape[-1:], jnp.float32).astype(jnp.float32)

    scale, bias = parameter("scale", ones), parameter("bias", zeros)
    mean = jax.lax.stop_gradient(parameter("mean", zeros))
    variance = jax.lax.stop_gradient(parameter("variance", ones))
    factor = scale * jax.lax.rsqrt(variance + 1e-5)
    return (x.astype(jnp.float32) * factor + (bias - mean * factor)).astype(self.dtype)
