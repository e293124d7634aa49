"""The neck: maps at 4, 2 and 1 times the trunk's resolution (ViTDet's simple feature pyramid, Li et
al. 2022, arXiv:2203.16527, without its norms).

Meta's checkpoint has a fourth level at half the resolution that nothing reads; it is not built.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sam3_jax.model.layers import conv, gelu


class Neck(nn.Module):
  """The trunk's map to a fine, a middle and a coarse map of `width` channels."""

  width: int
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "B H W C"]) -> tuple[Array, Array, Array]:
    """Maps [B, 4H, 4W, D], [B, 2H, 2W, D] and [B, H, W, D]."""
    fine, middle, coarse = (
      Level(doublings, self.width, self.dtype, name=f"level{i}")(x)
      for i, doublings in enumerate((2, 1, 0))
    )
    return fine, middle, coarse


class Level(nn.Module):
  """Doubles the resolution `doublings` times, then projects to `width` channels."""

  doublings: int
  width: int
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 D"]:
    for i in range(1, self.doublings + 1):
      x = gelu(x) if i > 1 else x
      x = Double(x.shape[-1] // 2, self.dtype, name=f"up{i}")(x)
    x = conv(self.width, 1, self.dtype, "project")(x)
    return conv(self.width, 3, self.dtype, "smooth")(x)


class Double(nn.Module):
  """Transposed 2 x 2 convolution of stride 2: each cell becomes 2 x 2 cells, by a dense layer."""

  width: int
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 C2"]:
    rows, height, width, channels = x.shape
    kernel = self.param("kernel", nn.initializers.lecun_normal(), (2, 2, channels, self.width))
    bias = self.param("bias", nn.initializers.zeros, (self.width,))
    y = jnp.einsum(
      "bhwc,ijcd->bhiwjd",
      x.astype(self.dtype),
      kernel.astype(self.dtype),
      preferred_element_type=jnp.float32,
    )
    return (y + bias).astype(self.dtype).reshape(rows, 2 * height, 2 * width, self.width)
