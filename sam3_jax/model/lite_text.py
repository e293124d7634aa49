"""The text encoder of SAM 3 LiteText: MobileCLIP's (Vasu et al. 2024, arXiv:2311.17049), distilled
from SAM 3's (arXiv:2602.12173).

Its smallest size has a convolution block (RepMixer; FastViT, Vasu et al. 2023, arXiv:2303.14189) on
either side of the transformer layers. Not being causal, it sees the padding behind a phrase.
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

LAYER_SCALE = 1e-5  # at the start


class LiteTextEncoder(nn.Module):
  """Token ids to one vector a token.

  The released weights were distilled by code that pads with id 0 and attends to the padding, which
  moves the phrase's own vectors; so that is what we do. transformers 5.23 runs the same weights
  otherwise: it pads with the end's id, keeps padding from attention, but not from the mixers. With
  `config.mask_padding` we do as it does, which suits weights that were trained there.
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
    mixer = config.kernel, config.mlp_width, self.dtype
    if config.mixers:
      x = Mixer(*mixer, name="first")(x)
    blocks = stacked(Block, config.layers, layering=self.layering)
    sizes = (config.heads, config.mlp_width, self.dtype)
    x, _ = blocks(*sizes, train=self.train, name="blocks")(x, 0.0, attended)
    if config.mixers:
      x = Mixer(*mixer, name="last")(x)
    x = LayerNorm(dtype=self.dtype, name="norm_final")(x)
    return TextEmbedding(dense(self.width, self.dtype, "project")(x), valid)


class Mixer(nn.Module):
  """RepMixer block, with its branches apart as they are trained: tokens are mixed by a convolution
  along the phrase, then each goes through a convolution and an MLP."""

  kernel: int
  mlp_width: int
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "P T C"]) -> Float[Array, "P T C"]:
    width = x.shape[-1]

    def along(name: str) -> nn.Conv:  # each channel by itself
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
  """Batch norm by the statistics of its first training, which no training here changes."""

  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "P T C"]) -> Float[Array, "P T C"]:
    zeros, ones = nn.initializers.zeros, nn.initializers.ones

    def own(name: str, start: nn.initializers.Initializer) -> Array:
      return self.param(name, start, x.shape[-1:], jnp.float32).astype(jnp.float32)

    scale, bias = own("scale", ones), own("bias", zeros)
    mean, variance = (jax.lax.stop_gradient(own(*a)) for a in (("mean", zeros), ("variance", ones)))
    factor = scale * jax.lax.rsqrt(variance + 1e-5)
    return (x.astype(jnp.float32) * factor + (bias - mean * factor)).astype(self.dtype)
