"""The memory encoder: an object's mask and the frame's coarse map become the memory of a frame
(SAM 2, Ravi et al. 2024, arXiv:2408.00714, section 4 and appendix D)."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.lax import platform_dependent
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sam3_jax.config import VideoConfig
from sam3_jax.model.layers import Mlp, conv, gelu, stacked
from sam3_jax.model.norms import LayerNorm
from sam3_jax.ops.bilinear import resize
from sam3_jax.ops.blocks import channel_mean, halve, to_blocks
from sam3_jax.ops.depthwise import depthwise_conv
from sam3_jax.ops.precision import convolve

EPSILON = 1e-6  # of all norms in this file


class MemoryEncoder(nn.Module):
  """Encodes the memory of each object on a frame.

  Attributes:
    config: sizes of the tracker.
    dtype: of the computation; the mask is resized in float32.
  """

  config: VideoConfig
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self, coarse: Float[Array, "H W D"], mask: Float[Array, "O S S2"]
  ) -> Float[Array, "O H W C"]:
    """Encodes masks of values in [-10, 10], at any resolution, on the frame's coarse map."""
    height, width, channels = coarse.shape
    strides = 2 ** len(self.config.mask_widths)
    mask = resize(mask, (strides * height, strides * width), antialias=True)
    x = MaskDownsampler(self.config.mask_widths, channels, self.dtype, name="mask")(mask)
    image = conv(channels, 1, self.dtype, "image_project")(coarse[None].astype(self.dtype))
    blocks = stacked(FuserBlock, self.config.blocks)(self.dtype, name="blocks")
    x, _ = blocks(x + image)
    return conv(self.config.memory_channels, 1, self.dtype, "project")(x)


class MaskDownsampler(nn.Module):
  """Halves a mask's resolution once for each width, then projects it to the image's channels.

  On a TPU the cells of the result are blocks of cells of the mask (`ops.blocks`).
  """

  widths: tuple[int, ...]
  channels: int
  dtype: DTypeLike = jnp.float32

  def __call__(self, mask: Float[Array, "O S S2"]) -> Float[Array, "O H W D"]:
    if self.is_initializing():
      return self.cell_by_cell(mask)
    plain: Any = functools.partial(self.clone(parent=None).apply, method="cell_by_cell")
    blocks: Any = functools.partial(_in_blocks, dtype=self.dtype)
    params = {"params": self.variables["params"]}
    return platform_dependent(params, mask, tpu=blocks, default=plain)

  @nn.compact
  def cell_by_cell(self, mask: Float[Array, "O S S2"]) -> Float[Array, "O H W D"]:
    """Plain convolutions, for other devices; creates the parameters."""
    x = mask[..., None].astype(self.dtype)
    for i, width in enumerate(self.widths, start=1):
      x = conv(width, 3, self.dtype, f"conv{i}", strides=2, padding=((1, 1), (1, 1)))(x)
      x = gelu(LayerNorm(EPSILON, self.dtype, name=f"norm{i}")(x))
    return conv(self.channels, 1, self.dtype, "project")(x)


def _in_blocks(
  variables: Any, mask: Float[Array, "O S S2"], dtype: DTypeLike
) -> Float[Array, "O H W D"]:
  """As `MaskDownsampler.cell_by_cell`."""
  params, steps = variables["params"], len(variables["params"]) // 2
  sides = [2**i for i in range(steps, 0, -1)]
  x = to_blocks(mask[..., None].astype(dtype), sides[0])
  for i, side in enumerate(sides, start=1):
    weights, norm, cells = params[f"conv{i}"], params[f"norm{i}"], (side // 2) ** 2
    x = halve(x, weights["kernel"].astype(dtype), side)
    x = (x + jnp.tile(weights["bias"].astype(dtype), cells)).astype(jnp.float32)
    width = x.shape[-1] // cells
    centered = x - channel_mean(x, width)
    factor = jax.lax.rsqrt(channel_mean(jnp.square(centered), width) + EPSILON)
    scale, bias = (jnp.tile(norm[name].astype(jnp.float32), cells) for name in ("scale", "bias"))
    x = gelu((centered * (factor * scale) + bias).astype(dtype))
  project = {name: value.astype(dtype) for name, value in params["project"].items()}
  return convolve(x, project["kernel"], "SAME") + project["bias"]


class FuserBlock(nn.Module):
  """ConvNeXt block (Liu et al. 2022, arXiv:2201.03545): a depthwise convolution, then an MLP."""

  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "O H W D"]) -> tuple[Float[Array, "O H W D"], None]:
    """Returns None as the output that `nn.scan` stacks."""
    width = x.shape[-1]
    depthwise = {"feature_group_count": width, "conv_general_dilated": depthwise_conv}
    y = conv(width, 7, self.dtype, "depthwise", **depthwise)(x)
    y = LayerNorm(EPSILON, self.dtype, name="norm")(y)
    y = Mlp((4 * width, width), self.dtype, gelu, name="mlp")(y)
    scale = self.param("scale", nn.initializers.constant(1e-6), (width,), jnp.float32)
    return x + scale.astype(self.dtype) * y, None
