"""Layer norm and group norm with statistics, scale and bias in float32 for any dtype.

Computed in two passes, as in PyTorch. Results equal those of `flax.linen`, whose norms promote
dtypes implicitly and so fail under `jax_numpy_dtype_promotion=strict`.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float


class LayerNorm(nn.Module):
  """Norm over the channels (Ba et al. 2016, arXiv:1607.06450)."""

  epsilon: float = 1e-5
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "*rows C"]) -> Float[Array, "*rows C"]:
    scale, bias = _parameters(self, x.shape[-1])
    x = x.astype(jnp.float32)
    centered = x - mean(x, (-1,))
    factor = jax.lax.rsqrt(mean(jnp.square(centered), (-1,)) + self.epsilon)
    return (centered * (factor * scale) + bias).astype(self.dtype)


class GroupNorm(nn.Module):
  """Norm over all cells of each group of channels (Wu and He 2018, arXiv:1803.08494)."""

  groups: int
  epsilon: float = 1e-5
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    scale, bias = _parameters(self, x.shape[-1])
    x = x.astype(jnp.float32)
    size = x.shape[-1] // self.groups

    def by_channel(values: Float[Array, "B H W C"]) -> Float[Array, "B 1 1 C"]:
      """The mean of each channel's group."""
      grouped = mean(values.reshape(*values.shape[:-1], self.groups, size), (1, 2, 4))
      return jnp.repeat(grouped.reshape(len(values), 1, 1, self.groups), size, axis=-1)

    centered = x - by_channel(x)
    factor = jax.lax.rsqrt(by_channel(jnp.square(centered)) + self.epsilon)
    return (centered * (factor * scale) + bias).astype(self.dtype)


def mean(x: Array, axes: tuple[int, ...]) -> Array:
  """Mean over axes, kept with length 1."""
  return x.mean(axes, keepdims=True)


def _parameters(module: nn.Module, channels: int) -> tuple[Array, Array]:
  """Scale and bias, float32."""
  ones, zeros = nn.initializers.ones, nn.initializers.zeros
  scale = module.param("scale", ones, (channels,), jnp.float32)
  bias = module.param("bias", zeros, (channels,), jnp.float32)
  return scale.astype(jnp.float32), bias.astype(jnp.float32)
