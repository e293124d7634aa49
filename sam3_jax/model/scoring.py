"""Scores how well each query matches the prompt."""

import math

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from sam3_jax.config import Config
from sam3_jax.model.layers import Mlp, dense
from sam3_jax.model.norms import LayerNorm
from sam3_jax.ops.precision import einsum

LIMIT = 12.0  # logits are clamped to +- this


class Scoring(nn.Module):
  """Scaled dot product of each query with the mean of the prompt's valid tokens."""

  config: Config
  dtype: DTypeLike = jnp.float32
  train: bool = False

  @nn.compact
  def __call__(
    self,
    states: Float[Array, "*layers P Q D"],
    prompt: Float[Array, "P S D"],
    valid: Bool[Array, "P S"],
  ) -> Float[Array, "*layers P Q"]:
    width, rate = self.config.width, self.config.dropout
    widths = (self.config.mlp_width, width)
    branch = Mlp(widths, self.dtype, dropout=rate, train=self.train, name="prompt_mlp")(prompt)
    branch = nn.Dropout(rate, deterministic=not self.train)(branch)
    prompt = LayerNorm(dtype=jnp.float32, name="prompt_norm")(prompt + branch)
    mean = jnp.mean(prompt, axis=1, where=valid[..., None])
    concept = dense(width, jnp.float32, "prompt_project")(mean)
    queries = dense(width, jnp.float32, "query_project")(states)
    logits = einsum("...pqd,pd->...pq", queries, concept) / math.sqrt(width)
    return jnp.clip(logits, -LIMIT, LIMIT)
