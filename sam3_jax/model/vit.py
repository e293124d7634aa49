"""The image trunk: a ViT with windowed and global attention (ViTDet, Li et al. 2022,
arXiv:2203.16527) and rotary positions over two axes.

Blocks come in groups of n windowed blocks and a global one. A group stays partitioned into windows
through its windowed blocks, and the groups are one scan: a fraction of the code to compile.
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
  """Encodes normalised images into one map of features."""

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
    # Tiled, not interpolated: the released weights were trained so.
    repeats = -(-side // config.pretrain_grid)
    position = jnp.tile(position, (repeats, repeats, 1))[:side, :side]
    x = LayerNorm(dtype=self.dtype, name="norm_pre")(x + position.astype(self.dtype))

    x = x.reshape(len(x), side * side, config.width)
    watched = any(map(self.is_mutable_collection, ("params", "intermediates")))
    if watched or self.train or self.layering != PLAIN:
      drop_path = jnp.linspace(0, config.drop_path, config.blocks, dtype=jnp.float32)
      drop_path = drop_path.reshape(config.groups, -1)
      groups = stacked(Group, config.groups, in_axes=0)
      settings = config, side, self.dtype, self.train, self.layering
      x, _ = groups(*settings, name="groups")(x, drop_path)
    else:
      x = _walk(self.variables["params"]["groups"], x, config, side, self.dtype)
    return x.reshape(-1, side, side, config.width)


def _walk(
  params: Any, x: Float[Array, "B HW C"], config: TrunkConfig, side: int, dtype: DTypeLike
) -> Float[Array, "B HW C"]:
  """The groups for inference. A scan of scans would cut a group's weights out of their stack before
  it walks over its blocks: on a TPU v6e 0.5 ms a group (emitted), for 176 MB copied."""
  windowed, whole = (Block(**sizes, dtype=dtype, parent=None) for sizes in _sizes(config, side))
  stack = jax.tree.map(lambda p: p.reshape(-1, *p.shape[2:]), params["windowed"])

  def block(x: Array, i: Array) -> tuple[Array, None]:
    own = jax.tree.map(lambda p: jax.lax.dynamic_index_in_dim(p, i, keepdims=False), stack)
    return windowed.apply({"params": own}, x)[0], None

  def group(x: Array, part: tuple[Array, Any]) -> tuple[Array, None]:
    first, own = part
    x = to_windows(x, side, config.window)
    x, _ = jax.lax.scan(block, x, first + jnp.arange(config.windowed, dtype=jnp.int32))
    return whole.apply({"params": own}, from_windows(x, side, config.window))[0], None

  firsts = config.windowed * jnp.arange(config.groups, dtype=jnp.int32)
  return jax.lax.scan(group, x, (firsts, params["global"]))[0]


def _sizes(config: TrunkConfig, side: int) -> tuple[dict[str, Any], dict[str, Any]]:
  """Of windowed blocks and of global ones."""
  window = config.window
  both = {"heads": config.heads, "mlp_width": config.mlp_width}
  windowed = {"windows": (side // window) ** 2, "rope": (window, 1.0)}
  # Global blocks see the positions of the pretraining: the whole grid spans one window.
  return both | windowed, both | {"rope": (side, window / side)}


class Patches(nn.Module):
  """A convolution whose stride is its size, as one product: 0.04 ms in place of 0.98 on a TPU v6e
  (compiler's plan), which would spread the pixels out first."""

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
  """Windowed blocks, then a global one, over tokens in row order."""

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
    of_windowed, of_whole = _sizes(config, side)
    windowed = stacked(Block, config.windowed, in_axes=0, layering=self.layering)(
      **of_windowed, dtype=self.dtype, train=self.train, name="windowed"
    )
    x, _ = windowed(to_windows(x, side, window), drop_path[:-1])
    x = from_windows(x, side, window)
    whole = self.layering(Block)(**of_whole, dtype=self.dtype, train=self.train, name="global")
    return whole(x, drop_path[-1])


def to_windows(x: Float[Array, "B HW C"], side: int, window: int) -> Float[Array, "B HW C"]:
  """Tokens in row order to tokens window by window, each window in row order."""
  return _swap_middle(x, (side // window, window, side // window, window))


def from_windows(x: Float[Array, "B HW C"], side: int, window: int) -> Float[Array, "B HW C"]:
  """The inverse of `to_windows`."""
  return _swap_middle(x, (side // window, side // window, window, window))


def _swap_middle(x: Array, split: tuple[int, int, int, int]) -> Array:
  return x.reshape(len(x), *split, x.shape[-1]).swapaxes(2, 3).reshape(x.shape)
