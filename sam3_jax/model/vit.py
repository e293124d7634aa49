"""The image trunk: a ViT with windowed and global attention (ViTDet, Li et al. 2022,
arXiv:2203.16527) and rotary positions over two axes.

A group is n windowed blocks followed by a global block. Tokens stay partitioned into windows
through the windowed blocks of a group. The groups are one scan, which keeps the program small.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sam3_jax.config import TrunkConfig
from sam3_jax.model.layers import PLAIN, Block, Layering, float32_sums, stacked
from sam3_jax.model.norms import LayerNorm
from sam3_jax.model.stem import Stem


class Trunk(nn.Module):
  """Encodes normalized images into a feature map."""

  config: TrunkConfig
  patch: int
  dtype: DTypeLike = jnp.float32
  train: bool = False
  layering: Layering = PLAIN

  @nn.compact
  def __call__(self, images: Float[Array, "B Hi Wi 3"]) -> Float[Array, "B H W C"]:
    config = self.config
    if config.stem:
      x = Stem(config.stem, self.dtype, name="stem")(images)
    else:
      x = Patches(self.patch, config.width, self.dtype, name="patch_embed")(images)
    side = x.shape[1]

    shape = (config.pretrain_grid, config.pretrain_grid, config.width)
    position = self.param("position", nn.initializers.truncated_normal(0.02), shape, jnp.float32)
    # Tiled, not interpolated, as the released weights were trained.
    repeats = -(-side // config.pretrain_grid)
    position = jnp.tile(position, (repeats, repeats, 1))[:side, :side]
    x = LayerNorm(dtype=self.dtype, name="norm_pre")(x + position.astype(self.dtype))

    x = x.reshape(len(x), side * side, config.width)
    needs_linen = any(map(self.is_mutable_collection, ("params", "intermediates")))
    if needs_linen or self.train or self.layering != PLAIN:
      drop_path = jnp.linspace(0, config.drop_path, config.blocks, dtype=jnp.float32)
      drop_path = drop_path.reshape(config.groups, -1)
      groups = stacked(Group, config.groups, in_axes=0)(
        config, side, self.dtype, self.train, self.layering, name="groups"
      )
      x, _ = groups(x, drop_path)
    else:
      x = _scan_blocks(self.variables["params"]["groups"], x, config, side, self.dtype)
    return x.reshape(-1, side, side, config.width)


def _scan_blocks(
  params: Any, x: Float[Array, "B HW C"], config: TrunkConfig, side: int, dtype: DTypeLike
) -> Float[Array, "B HW C"]:
  """As `Group` with `nn.scan`, for inference.

  `nn.scan` needs nested scans, which copy the weights of a group, 176 MB, out of their stack before
  the inner scan: 0.5 ms per group on a TPU v6e (compiler's estimate). Here the inner scan indexes
  the whole stack. Training needs Linen's random streams and lifted transformations, so it keeps
  `Group`.
  """
  windowed, global_block = (
    Block(**sizes, dtype=dtype, parent=None) for sizes in _sizes(config, side)
  )
  stack = jax.tree.map(lambda p: p.reshape(-1, *p.shape[2:]), params["windowed"])

  def block(x: Array, i: Array) -> tuple[Array, None]:
    own = jax.tree.map(lambda p: jax.lax.dynamic_index_in_dim(p, i, keepdims=False), stack)
    return windowed.apply({"params": own}, x)[0], None

  def group(x: Array, part: tuple[Array, Any]) -> tuple[Array, None]:
    first, own = part
    x = to_windows(x, side, config.window)
    x, _ = jax.lax.scan(block, x, first + jnp.arange(config.windowed, dtype=jnp.int32))
    return global_block.apply({"params": own}, from_windows(x, side, config.window))[0], None

  firsts = config.windowed * jnp.arange(config.groups, dtype=jnp.int32)
  return jax.lax.scan(group, x, (firsts, params["global"]))[0]


def _sizes(config: TrunkConfig, side: int) -> tuple[dict[str, Any], dict[str, Any]]:
  """The sizes of windowed blocks and of global blocks."""
  window = config.window
  both = {"heads": config.heads, "mlp_width": config.mlp_width}
  windowed = {"windows": (side // window) ** 2, "rope": (window, 1.0)}
  # Global blocks use the positions of pretraining: the whole grid spans one window.
  return both | windowed, both | {"rope": (side, window / side)}


class Patches(nn.Module):
  """Patch embedding as a single product. As a strided convolution it takes 0.98 ms instead of 0.04
  ms on a TPU v6e (compiler's estimate)."""

  patch: int
  width: int
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, images: Float[Array, "B Hi Wi 3"]) -> Float[Array, "B H W C"]:
    rows, side, patch = len(images), images.shape[1] // self.patch, self.patch
    shape = patch, patch, images.shape[-1], self.width
    kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, jnp.float32)
    x = images.astype(self.dtype).reshape(rows, side, patch, side, patch, -1).swapaxes(2, 3)
    x = x.reshape(rows, side, side, -1)
    return float32_sums(x, kernel.astype(self.dtype).reshape(x.shape[-1], self.width), None)


class Group(nn.Module):
  """Windowed blocks, then a global block, over tokens in row order."""

  config: TrunkConfig
  side: int
  dtype: DTypeLike = jnp.float32
  train: bool = False
  layering: Layering = PLAIN

  @nn.compact
  def __call__(
    self, x: Float[Array, "B HW C"], drop_path: Float[Array, " blocks"]
  ) -> tuple[Float[Array, "B HW C"], None]:
    config, side, window = self.config, self.side, self.config.window
    windowed_sizes, global_sizes = _sizes(config, side)
    windowed = stacked(Block, config.windowed, in_axes=0, layering=self.layering)(
      **windowed_sizes, dtype=self.dtype, train=self.train, name="windowed"
    )
    x, _ = windowed(to_windows(x, side, window), drop_path[:-1])
    x = from_windows(x, side, window)
    global_block = self.layering(Block)(
      **global_sizes, dtype=self.dtype, train=self.train, name="global"
    )
    return global_block(x, drop_path[-1])


def to_windows(x: Float[Array, "B HW C"], side: int, window: int) -> Float[Array, "B HW C"]:
  """Reorders tokens from row order to window by window, each window in row order."""
  return _swap_middle(x, (side // window, window, side // window, window))


def from_windows(x: Float[Array, "B HW C"], side: int, window: int) -> Float[Array, "B HW C"]:
  """The inverse of `to_windows`."""
  return _swap_middle(x, (side // window, side // window, window, window))


def _swap_middle(x: Array, split: tuple[int, int, int, int]) -> Array:
  return x.reshape(len(x), *split, x.shape[-1]).swapaxes(2, 3).reshape(x.shape)
