"""Rotary position embedding over two axes (Su et al. 2021, arXiv:2104.09864; axial, as in SAM 2).

The first half of a head's channels holds the real parts and the second half the imaginary parts, as
stride-2 access takes twice the time on a TPU. Meta's weights alternate the two; the converters
reorder the columns of the query and key projections.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

THETA = 10000


def rope_table(side: int, scale: float, channels: int) -> tuple[np.ndarray, np.ndarray]:
  """Cosine and sine [side * side, channels / 2] for the cells of a square grid, row by row.

  Args:
    side: cells per side.
    scale: distance between adjacent cells.
    channels: of a head; the first half of the channel pairs rotates with x, the second with y.
  """
  frequencies = THETA ** (-np.arange(0, channels, 4) / channels)
  y, x = scale * np.indices((side, side)).reshape(2, -1)
  angles = np.concatenate([np.outer(x, frequencies), np.outer(y, frequencies)], axis=1)
  return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rotate(
  x: Float[Array, "A I Heads C"], table: tuple[np.ndarray, np.ndarray]
) -> Float[Array, "A I Heads C"]:
  """Rotates each channel pair by the angle of its token, in float32."""
  cosine, sine = (jnp.asarray(part)[:, None] for part in table)
  real, imaginary = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  rotated = [real * cosine - imaginary * sine, real * sine + imaginary * cosine]
  return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
