"""The neck: maps at 4, 2 and 1 times the trunk's resolution (ViTDet's simple feature pyramid, Li et
al. 2022, arXiv:2203.16527, without its norms).

Layers with nothing but sums between them are computed as one, see `Linear`. Meta's checkpoint has a
fourth level at half the resolution that nothing reads; it is not built.
"""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sam3_jax.model.layers import gelu, interleaved
from sam3_jax.ops.precision import convolve, einsum, matmul


class Linear(NamedTuple):
  """What a linear layer does to the channels of a cell: a kernel of one or several places, and a
  bias."""

  kernel: Float[Array, "*places C C2"]
  bias: Float[Array, " C2"]

  def then(self, after: "Linear | None") -> "Linear":
    """Both layers as one; that after this one has the place (0, 0) only. With None, this one."""
    if after is None:
      return self
    kernel, bias, project, shift = (x.astype(jnp.float32) for x in (*self, *after))
    project = project[0, 0]
    # Rounded once, when used.
    return Linear(matmul(kernel, project), matmul(bias, project) + shift)


class Parameters(nn.Module):
  """Of a linear layer with so many places; for a caller that knows what is around it."""

  places: tuple[int, int]
  width: int

  @nn.compact
  def __call__(self, channels: int) -> Linear:
    shape = *self.places, channels, self.width
    kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, jnp.float32)
    return Linear(kernel, self.param("bias", nn.initializers.zeros, (self.width,), jnp.float32))


class Neck(nn.Module):
  """The trunk's map to a fine, a middle and a coarse map of `width` channels."""

  width: int
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, "B H W C"], after: tuple[Linear | None, ...] = (None,) * 3
  ) -> tuple[Array, Array, Array]:
    """Maps [B, 4H, 4W, D], [B, 2H, 2W, D] and [B, H, W, D]; or what the layers `after` each of them
    make of it."""
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
  """Transposed 2 x 2 convolution of stride 2: each cell as 2 x 2 cells, by the layer's places."""
  return interleaved([[product(x, layer, (i, j)) for j in (0, 1)] for i in (0, 1)])


def product(
  x: Float[Array, "B H W C"], layer: Linear, place: tuple[int, int]
) -> Float[Array, "B H W C2"]:
  """Each cell by one place of the layer's kernel."""
  kernel = layer.kernel[place].astype(x.dtype)
  y = einsum("bhwc,cd->bhwd", x, kernel, preferred_element_type=jnp.float32)
  return (y + layer.bias.astype(jnp.float32)).astype(x.dtype)


def convolved(x: Float[Array, "B H W C"], layer: Linear) -> Float[Array, "B H W C2"]:
  """Convolution by the layer's 3 x 3 places; zeros around the map, whose size stays."""
  return convolve(x, layer.kernel.astype(x.dtype), "SAME") + layer.bias.astype(x.dtype)
