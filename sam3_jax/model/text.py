"""The text encoder: CLIP's causal transformer (Radford et al. 2021, arXiv:2103.00020). Uses the
states of all tokens, projected to the detector's width."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Int

from sam3_jax.config import TextConfig
from sam3_jax.model.layers import PLAIN, Block, Layering, dense, stacked
from sam3_jax.model.norms import LayerNorm
from sam3_jax.types import TextEmbedding

PADDING = 0  # also the id of "!" inside a word, which is masked too, as in Meta's code


class TextEncoder(nn.Module):
  """Encodes token ids as one vector per token.

  Padding needs no mask: it comes last, so causal attention hides it from the valid tokens.
  """

  config: TextConfig
  width: int
  dtype: DTypeLike = jnp.float32
  train: bool = False
  layering: Layering = PLAIN

  @nn.compact
  def __call__(self, tokens: Int[Array, "P T"]) -> TextEmbedding:
    config = self.config
    table = nn.Embed(config.vocabulary, config.width, dtype=self.dtype, name="token_embedding")
    shape = (config.context, config.width)
    position = self.param("position", nn.initializers.normal(0.01), shape, jnp.float32)
    x = table(tokens) + position[: tokens.shape[1]].astype(self.dtype)
    blocks = stacked(Block, config.layers, layering=self.layering)(
      config.heads, config.mlp_width, self.dtype, causal=True, train=self.train, name="blocks"
    )
    x, _ = blocks(x, 0.0)
    x = LayerNorm(dtype=self.dtype, name="norm_final")(x)
    return TextEmbedding(dense(self.width, self.dtype, "project")(x), tokens != PADDING)
