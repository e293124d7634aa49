"""Maps of few channels as blocks of cells: space to depth.

A TPU pads the channels of a map to 128 lanes, so that a map with 4 channels takes 32 times its size
in memory traffic. As blocks of n x n cells, all of whose channels lie side by side, it takes what
it should, and convolutions become products that fill the matrix units.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sam3_jax.ops.precision import einsum, precision_of

TAPS = 3  # rows and columns of the kernels


def to_blocks(maps: Float[Array, "N H W C"], side: int) -> Float[Array, "N BH BW K"]:
  """Maps as blocks of `side` x `side` cells; K counts row, column and channel in a block."""
  count, height, width, channels = maps.shape
  blocks = maps.reshape(count, height // side, side, width // side, side, channels)
  blocks = blocks.swapaxes(2, 3)
  return blocks.reshape(count, height // side, width // side, side * side * channels)


def halve(
  blocks: Float[Array, "N BH BW K"], kernel: Float[Array, "3 3 C D"], side: int
) -> Float[Array, "N BH BW K2"]:
  """Convolves with stride 2 and a margin of one cell of zeros, which halves the side of all blocks.

  Args:
    blocks: of an even number of cells per side.
    kernel: of the convolution.
    side: cells per side of a block.
  """
  taps = _taps(side)
  products = jnp.einsum("airk,bjsl,klcd->abijcrsd", taps, taps, kernel, precision="highest")
  size = side // 2
  products = products.astype(kernel.dtype)
  products = products.reshape(2, 2, blocks.shape[-1], size * size * kernel.shape[-1])
  return jax.lax.conv_general_dilated(
    blocks, products, (1, 1), ((1, 0), (1, 0)), dimension_numbers=("NHWC", "HWIO", "NHWC"),
    precision=precision_of(blocks.dtype, products.dtype),
  )  # fmt: skip


def channel_mean(blocks: Float[Array, "N BH BW K"], channels: int) -> Float[Array, "N BH BW K"]:
  """The mean over the channels of each cell, at all of its channels."""
  cell = np.arange(blocks.shape[-1]) // channels
  same = jnp.asarray(cell[:, None] == cell[None], blocks.dtype)
  return einsum("nyxk,kj->nyxj", blocks, same) / channels


def _taps(side: int) -> Float[np.ndarray, "2 side half 3"]:
  """1 where row i of the block before (0) or of the block itself (1) is tap k of row r of the
  result. The kernel's first tap of the first row is the last row of the block before."""
  row, out = np.arange(side)[:, None, None], np.arange(side // 2)[:, None]
  wanted = 2 * out - 1 + np.arange(TAPS)
  return np.stack([row - side == wanted, row == wanted]).astype(np.float32)
