"""The neck: maps at 4, 2 and 1 times the trunk's resolution (ViTDet's simple feature pyramid, Li et
al. 2022, arXiv:2203.16527, without its norms).

Meta's checkpoint has a fourth level at half the resolution that nothing reads; it is not built.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sam3_jax.model.layers import conv, gelu, interleaved


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
    cells = [[x]]
    for i in range(1, self.doublings + 1):
      x = interleaved(cells)
      x = gelu(x) if i > 1 else x
      cells = Double(x.shape[-1] // 2, self.dtype, name=f"up{i}")(x)
    # Before the cells are put together: that is how the TPU's compiler moves least.
    project = Pointwise(self.width, self.dtype, name="project")
    cells = [[project(cell) for cell in row] for row in cells]
    return conv(self.width, 3, self.dtype, "smooth")(interleaved(cells))


class Double(nn.Module):
  """Transposed 2 x 2 convolution of stride 2: each cell becomes 2 x 2 cells, by a dense layer."""

  width: int
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "B H W C"]) -> list[list[Float[Array, "B H W C2"]]]:
    """The cells at each of the 2 x 2 places, row by row."""
    shape = 2, 2, x.shape[-1], self.width
    kernel = self.param("kernel", nn.initializers.lecun_normal(), shape).astype(self.dtype)
    bias = self.param("bias", nn.initializers.zeros, (self.width,))
    x = x.astype(self.dtype)
    return [[_product(x, kernel[i, j], bias) for j in (0, 1)] for i in (0, 1)]


class Pointwise(nn.Module):
  """A 1 x 1 convolution as the product that it is."""

  width: int
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C2"]:
    shape = 1, 1, x.shape[-1], self.width
    kernel = self.param("kernel", nn.initializers.lecun_normal(), shape).astype(self.dtype)
    bias = self.param("bias", nn.initializers.zeros, (self.width,))
    return _product(x.astype(self.dtype), kernel[0, 0], bias)


def _product(x: Array, kernel: Float[Array, "C C2"], bias: Float[Array, " C2"]) -> Array:
  y = jnp.einsum("bhwc,cd->bhwd", x, kernel, preferred_element_type=jnp.float32)
  return (y + bias).astype(x.dtype)
