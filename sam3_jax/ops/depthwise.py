"""Depthwise convolution of maps.

XLA computes it slowly on CPUs, above all the gradient in a loop (1.7 s instead of 0.09 s for two
7 x 7 layers on three maps of 24 x 24 x 128), so there it is a sum of shifted maps.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import platform_dependent
from jaxtyping import Array, Float

from sam3_jax.ops.precision import precision_of


def depthwise_conv(
  maps: Float[Array, "N H W C"], kernel: Float[Array, "K K 1 C"], *_: Any, **__: Any
) -> Float[Array, "N H W C"]:
  """Convolves each channel with its own kernel of an odd size; pads with zeros to keep the maps'
  size. Takes the place of `conv_general_dilated` in `nn.Conv`, whose other arguments say the same.
  """
  return platform_dependent(maps, kernel, cpu=_shifted, default=_convolved)


def _convolved(maps: Array, kernel: Array) -> Array:
  layout = "NHWC", "HWIO", "NHWC"
  channels = maps.shape[-1]
  return jax.lax.conv_general_dilated(
    maps, kernel, (1, 1), "SAME", dimension_numbers=layout, feature_group_count=channels,
    precision=precision_of(maps.dtype),
  )  # fmt: skip


def _shifted(maps: Array, kernel: Array) -> Array:
  side = len(kernel)
  height, width = maps.shape[1:3]
  margin = side // 2
  padded = jnp.pad(maps, ((0, 0), (margin, margin), (margin, margin), (0, 0))).astype(jnp.float32)
  weights = kernel[:, :, 0].astype(jnp.float32)
  total = jnp.zeros(maps.shape, jnp.float32)
  for i in range(side):
    for j in range(side):
      total = total + padded[:, i : i + height, j : j + width] * weights[i, j]
  return total.astype(maps.dtype)
