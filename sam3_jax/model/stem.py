"""A convolutional stem that replaces the trunk's patch embedding; small models learn much faster
from scratch with it (Xiao et al. 2021, arXiv:2106.14881)."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sam3_jax.config import StemConfig
from sam3_jax.model.layers import conv, dense, gelu
from sam3_jax.model.norms import LayerNorm


class Stem(nn.Module):
  """Stages of residual convolutions, finest first, from normalized images to the trunk's tokens."""

  stages: tuple[StemConfig, ...]
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, images: Float[Array, "B Hi Wi 3"]) -> Float[Array, "B H W C"]:
    x = images
    for i, stage in enumerate(self.stages):
      x = dense(stage.width, self.dtype, f"merge{i}")(_merge(x, stage.stride))
      for j in range(stage.blocks):
        x = Residual(self.dtype, name=f"block{i}_{j}")(x)
    return x


class Residual(nn.Module):
  """Pre-norm residual block of two 3 x 3 convolutions with GELU between them."""

  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    y = LayerNorm(dtype=self.dtype, name="norm")(x)
    y = gelu(conv(x.shape[-1], 3, self.dtype, "conv1")(y))
    return x + conv(x.shape[-1], 3, self.dtype, "conv2")(y)


def _merge(x: Array, stride: int) -> Array:
  """Merges `stride` x `stride` cells into one with all their channels. A dense layer on the result
  is a strided convolution without overlap, with a fast gradient."""
  rows, height, width, channels = x.shape
  x = x.reshape(rows, height // stride, stride, width // stride, stride, channels)
  return x.swapaxes(2, 3).reshape(rows, height // stride, width // stride, -1)
