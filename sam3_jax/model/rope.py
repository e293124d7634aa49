"""Rotary position embedding over two axes (Su et al. 2021, arXiv:2104.09864; axial, as in SAM 2).

The halves of a head's channels are the real and the imaginary parts: no stride-2 access, which
takes a TPU twice the time. Meta's weights have them in adjacent channels; the converters reorder
the columns of the query and key projections once.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

THETA = 10000


def rope_table(side: int, scale: float, channels: int) -> tuple[np.ndarray, np.ndarray]:
  """Cosine and sine [side * side, channels / 2] for the cells of a square grid, row by row.

  Args:
    side: cells a side.
    scale: cells are this far apart.
    channels: of a head; the first half of the channel pairs rotates with x, the second with y.
  """
  frequencies = THETA ** (-np.arange(0, channels, 4) / channels)
  y, x = scale * np.indices((side, side)).reshape(2, -1)
  angles = np.concatenate([np.outer(x, frequencies), np.outer(y, frequencies)], axis=1)
  return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rotate(
  x: Float[Array, "A I Heads C"], table: tuple[np.ndarray, np.ndarray]
) -> Float[Array, "A I Heads C"]:
  """Each channel pair turned by its token's angle, in float32."""
  cosine, sine = (jnp.asarray(part)[:, None] for part in table)
  real, imaginary = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  turned = [real * cosine - imaginary * sine, real * sine + imaginary * cosine]
  return jnp.concatenate(turned, axis=-1).astype(x.dtype)
