"""Sine positional encodings (Vaswani et al. 2017; in 2-D as in DETR, Carion et al. 2020)."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

TEMPERATURE = 10000


def sine_code(coordinates: Float[Array, "*rows"], channels: int) -> Float[Array, "*rows channels"]:
  """Encoding of coordinates in [0, 1]: sine on even channels, cosine on odd ones, float32."""
  pair = np.arange(channels) // 2 * 2
  angles = coordinates[..., None] * np.float32(2 * np.pi)
  angles = angles / np.power(np.float32(TEMPERATURE), np.float32(pair / channels))
  return jnp.where(np.arange(channels) % 2 == 0, jnp.sin(angles), jnp.cos(angles))


def sine_map(height: int, width: int, channels: int) -> Float[Array, "H W channels"]:
  """Encoding of each cell of a grid: the row in the first half of the channels, then the column."""
  rows, columns = (
    jnp.arange(1, n + 1, dtype=jnp.float32) / np.float32(n + 1e-6) for n in (height, width)
  )
  rows, columns = sine_code(rows, channels // 2), sine_code(columns, channels // 2)
  shape = (height, width, channels // 2)
  return jnp.concatenate(
    [jnp.broadcast_to(rows[:, None], shape), jnp.broadcast_to(columns[None], shape)], axis=-1
  )
