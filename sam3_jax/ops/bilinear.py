"""Bilinear resize of maps on the device, equal to PyTorch's `interpolate` up to rounding.

Each axis is a product with a small constant matrix: two or more weights in each row.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sam3_jax.ops.precision import einsum


def resize(
  maps: Float[Array, "*rows h w"], size: tuple[int, int], *, antialias: bool = False
) -> Float[Array, "*rows h2 w2"]:
  """Resizes float32 maps to a height and a width; maps of that size are returned as they are.

  Args:
    maps: rows of cells.
    size: height and width of the result, in cells.
    antialias: widens the filter when a side shrinks, as `antialias=True` in PyTorch.
  """
  height, width = maps.shape[-2:]
  if (height, width) == size:
    return maps
  down = jnp.asarray(matrix(height, size[0], antialias))
  across = jnp.asarray(matrix(width, size[1], antialias))
  return einsum("yh,...hw,xw->...yx", down, maps, across)


def matrix(source: int, result: int, antialias: bool) -> Float[np.ndarray, "result source"]:
  """The weights of all source cells in each resulting cell, for one axis."""
  scale = source / result
  centers = scale * (np.arange(result) + 0.5)
  reach = max(scale, 1.0) if antialias else 1.0
  if not antialias:  # beyond the outermost centers, the outermost cells count alone
    centers = np.clip(centers, 0.5, source - 0.5)
  offsets = np.arange(source) + 0.5 - centers[:, None]
  weights = np.maximum(1 - np.abs(offsets) / reach, 0)
  return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
