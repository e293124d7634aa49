"""ROI align (He et al. 2017, arXiv:1703.06870) as two small matrix products.

Bilinear sampling and the average over a bin's grid of samples are separable: the pooled features of
a box are rows @ map @ columns, with a weight matrix for each axis. Results equal torchvision's
`roi_align(aligned=False, sampling_ratio=-1)`.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from sam3_jax.ops.precision import einsum


def roi_align(
  features: Float[Array, "P H W D"], boxes: Float[Array, "P N 4"], size: int
) -> Float[Array, "P N size size D"]:
  """Averages bilinear samples in each of size x size bins of each box.

  Args:
    features: one map for each prompt.
    boxes: xyxy as fractions of the map's extent, each side at most twice the map's (longer sides
      are sampled more sparsely than in torchvision).
    size: bins per side.
  """
  height, width = features.shape[1:3]
  boxes = boxes.astype(jnp.float32)
  rows = _axis_weights(boxes[..., 1], boxes[..., 3], height, size).astype(features.dtype)
  columns = _axis_weights(boxes[..., 0], boxes[..., 2], width, size).astype(features.dtype)
  bands = einsum("pnih,phwd->pniwd", rows, features)
  return einsum("pnjw,pniwd->pnijd", columns, bands)


def _axis_weights(
  low: Float[Array, "P N"], high: Float[Array, "P N"], cells: int, size: int
) -> Float[Array, "P N size cells"]:
  """The weight of each cell of an axis in each bin; `low` and `high` are fractions."""
  low, high = (x[..., None, None] * cells for x in (low, high))
  extent = jnp.maximum(high - low, 1)  # not aligned: at least one cell
  sample = jnp.arange(math.ceil(2 * cells / size), dtype=jnp.float32)
  # Equals ceil(extent / size). XLA's division may be off by one bit, and then ceil by one.
  samples = jnp.sum(sample * size < extent, axis=-1, keepdims=True, dtype=jnp.float32)
  bins = jnp.arange(size, dtype=jnp.float32)[:, None]
  position = low + extent / size * (bins + (sample + 0.5) / samples)
  counted = (sample < samples) & (position >= -1) & (position <= cells)
  position = jnp.clip(position, 0, cells - 1)
  hat = jnp.maximum(0, 1 - jnp.abs(position[..., None] - jnp.arange(cells, dtype=jnp.float32)))
  return jnp.sum(jnp.where(counted[..., None], hat, 0), axis=-2) / samples
