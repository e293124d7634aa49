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
  index, cells = np.arange(result) + 0.5, np.arange(source)
  if antialias:
    # In float32 as in PyTorch: at the border of a mask, rounding decides about exactly 0.5.
    scale, one, half = np.float32(source) / np.float32(result), np.float32(1), np.float32(0.5)
    reach = max(scale, one)
    center = (scale * index.astype(np.float32))[:, None]
    first = np.maximum((center - reach + half).astype(np.int64), 0)
    last = np.minimum((center + reach + half).astype(np.int64), source)
    offset = cells.astype(np.float32) - center + half
    weights = np.maximum(one - np.abs(offset * (one / reach)), 0)
    weights = np.where((cells >= first) & (cells < last), weights, np.float32(0))
    total = np.cumsum(weights, axis=1, dtype=np.float32)[:, -1:]  # one after another
    return weights / total
  # PyTorch computes positions in float32, with one rounding of product and sum together.
  scale = np.float64(np.float32(source) / np.float32(result))
  position = (scale * index - 0.5).astype(np.float32).clip(0, source - 1)
  lower = position.astype(np.int64)
  weight = position - lower.astype(np.float32)
  found = np.zeros((result, source), np.float32)
  found[np.arange(result), lower] = 1 - weight
  found[np.arange(result), np.minimum(lower + 1, source - 1)] += weight
  return found
