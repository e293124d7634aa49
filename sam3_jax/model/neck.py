"""The neck: maps at 4, 2 and 1 times the trunk's resolution (ViTDet's simple feature pyramid, Li et
al. 2022, arXiv:2203.16527, without its norms).

Consecutive linear layers are merged into one, see `Linear`. Meta's checkpoint has an unused fourth
level at half the resolution; it is not built.
"""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sam3_jax.model.layers import gelu, interleaved
from sam3_jax.ops.precision import convolve, einsum, matmul


class Linear(NamedTuple):
  """A linear layer on the channels of a cell: a kernel for each position of its window, and a
  bias."""

  kernel: Float[Array, "*window C C2"]
  bias: Float[Array, " C2"]

  def then(self, after: "Linear | None") -> "Linear":
    """Merges this layer and the next one, which is 1 x 1. None returns this layer."""
    if after is None:
      return self
    kernel, bias, project, shift = (x.astype(jnp.float32) for x in (*self, *after))
    project = project[0, 0]
    # Stays float32: rounded only once, when used.
    return Linear(matmul(kernel, project), matmul(bias, project) + shift)


class Parameters(nn.Module):
  """The parameters of a linear layer, for callers that merge it with others."""

  window: tuple[int, int]
  width: int

  @nn.compact
  def __call__(self, channels: int) -> Linear:
    shape = *self.window, channels, self.width
    kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, jnp.float32)
    return Linear(kernel, self.param("bias", nn.initializers.zeros, (self.width,), jnp.float32))


class Neck(nn.Module):
  """Turns the trunk's map into a fine, a middle and a coarse map of `width` channels."""

  width: int
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, "B H W C"], after: tuple[Linear | None, ...] = (None,) * 3
  ) -> tuple[Array, Array, Array]:
    """Maps [B, 4H, 4W, D], [B, 2H, 2W, D] and [B, H, W, D], each followed by its layer of `after`,
    if any."""
    fine, middle, coarse = (
      Level(2 - i, self.width, self.dtype, name=f"level{i}")(x, layer)
      for i, layer in enumerate(after)
    )
    return fine, middle, coarse


class Level(nn.Module):
  """Doubles the resolution `doublings` times, then projects to `width` channels."""

  doublings: int
  width: int
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, "B H W C"], after: Linear | None = None
  ) -> Float[Array, "B H2 W2 D"]:
    x = x.astype(self.dtype)
    channels = x.shape[-1] >> self.doublings
    project = Parameters((1, 1), self.width, name="project")(channels)
    smooth = Parameters((3, 3), self.width, name="smooth")(self.width).then(after)
    if not self.doublings:
      return convolved(product(x, project, (0, 0)), smooth)
    for i in range(1, self.doublings + 1):
      up = Parameters((2, 2), x.shape[-1] // 2, name=f"up{i}")(x.shape[-1])
      last = i == self.doublings
      x = doubled(x, up.then(project if last else None))
      x = x if last else gelu(x)
    return convolved(x, smooth)


def doubled(x: Float[Array, "B H W C"], layer: Linear) -> Float[Array, "B H2 W2 C2"]:
  """Transposed 2 x 2 convolution with stride 2."""
  return interleaved([[product(x, layer, (i, j)) for j in (0, 1)] for i in (0, 1)])


def product(
  x: Float[Array, "B H W C"], layer: Linear, position: tuple[int, int]
) -> Float[Array, "B H W C2"]:
  """Multiplies each cell with the kernel of one position."""
  kernel = layer.kernel[position].astype(x.dtype)
  y = einsum("bhwc,cd->bhwd", x, kernel, preferred_element_type=jnp.float32)
  return (y + layer.bias.astype(jnp.float32)).astype(x.dtype)


def convolved(x: Float[Array, "B H W C"], layer: Linear) -> Float[Array, "B H W C2"]:
  """3 x 3 convolution; pads with zeros to keep the map's size."""
  return convolve(x, layer.kernel.astype(x.dtype), "SAME") + layer.bias.astype(x.dtype)
