"""The mask head: a mask for each query, and one for the whole concept (MaskFormer's product of
queries with a fine map, Cheng et al. 2021, arXiv:2107.06278).

It reorders linear operations of the reference to do less work: see `MergeConv`, `QueryProject` and
`SemanticQuery`. Meta's checkpoint has a third pair of convolution and norm that its code never
runs; it is not built.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from sam3_jax.config import Config
from sam3_jax.model.layers import Attention, Mlp, float32_sums, interleaved
from sam3_jax.model.norms import GroupNorm, LayerNorm
from sam3_jax.ops.precision import convolve, einsum


class MaskHead(nn.Module):
  """Computes mask logits of the queries and of the concept, on the fine map's grid."""

  config: Config
  dtype: DTypeLike = jnp.float32

  def setup(self):
    width = self.config.width
    self.prompt_norm = LayerNorm(dtype=self.dtype)
    self.prompt_attn = Attention(self.config.heads, self.dtype)
    self.conv0, self.conv1 = MergeConv(width, self.dtype), MergeConv(width, self.dtype)
    self.norm0, self.norm1 = (GroupNorm(8, dtype=self.dtype) for _ in range(2))
    self.mask_embed = Mlp((width,) * 3, self.dtype)
    self.instance_project = QueryProject(width, self.dtype)
    self.semantic_project = SemanticQuery(width, self.dtype)

  def prepare(
    self, middle: Float[Array, "B Hn Wn D"], fine: Float[Array, "B Hf Wf D"]
  ) -> tuple[Float[Array, "B Hn Wn D"], Float[Array, "B Hf Wf D"]]:
    """The part of the two convolutions that does not depend on the prompt."""
    return self.conv0(middle), self.conv1(fine)

  def __call__(
    self,
    states: Float[Array, "P K D"],
    memory: Float[Array, "P H W D"],
    levels: tuple[Float[Array, "P Hn Wn D"], Float[Array, "P Hm Wm D"]],
    prompt: Float[Array, "P S D"],
    valid: Bool[Array, "P S"],
  ) -> tuple[Float[Array, "P K Hm Wm"], Float[Array, "P Hm Wm"]]:
    """`levels` are the middle and the fine map of each prompt's image, from `prepare`; `memory`
    replaces the coarse map."""
    tokens = memory.reshape(len(memory), -1, self.config.width)
    attended = self.prompt_attn(self.prompt_norm(tokens), prompt, prompt, valid=valid)
    x = (tokens + attended).reshape(memory.shape)
    x = nn.relu(self.norm0(levels[0] + self.conv0.doubled(x)))
    x = nn.relu(self.norm1(levels[1] + self.conv1.doubled(x)))

    # Cells on one axis: with two, XLA:CPU transposes the whole map, which doubles the time.
    cells = x.reshape(len(x), -1, x.shape[-1])

    def product(queries: Float[Array, "P N D"], offset: Float[Array, "P N"]) -> Array:
      y = einsum("pkd,pnd->pkn", queries, cells, preferred_element_type=jnp.float32)
      return (y + offset[..., None]).astype(self.dtype).reshape(*offset.shape, *x.shape[1:3])

    queries, offset = self.instance_project(self.mask_embed(states))
    mask_logits = product(queries, offset)
    query, offset = self.semantic_project(len(states))
    return mask_logits, product(query, offset)[:, 0]


class MergeConv(nn.Module):
  """A 3 x 3 convolution of the sum of a map and a coarser map upsampled by 2 (nearest neighbor).

  It is computed as the sum of two parts, so that the part of the first map is shared by many
  coarser maps.
  """

  width: int
  dtype: DTypeLike = jnp.float32

  def setup(self):
    shape = 3, 3, self.width, self.width
    self.kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, jnp.float32)
    self.bias = self.param("bias", nn.initializers.zeros, (self.width,), jnp.float32)

  def __call__(self, x: Float[Array, "B H W D"]) -> Float[Array, "B H W D"]:
    """The part of the map, with the bias."""
    return self._conv(x, self.kernel, "SAME") + self.bias.astype(self.dtype)

  def doubled(self, x: Float[Array, "P H W D"]) -> Float[Array, "P H2 W2 D"]:
    """The part of the coarser map. After upsampling, the 9 taps see only 2 x 2 different cells:
    this is a 2 x 2 convolution for each of the four positions in an upsampled cell, 4 / 9 of the
    work."""
    _, height, width, _ = x.shape
    kernel = self.kernel.astype(jnp.float32)  # rounded only once, after the sums
    kernel = jax.vmap(jax.vmap(_folded))(_folded(kernel))
    kernel = kernel.transpose(1, 3, 4, 0, 2, 5)
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    y = self._conv(x, kernel.reshape(2, 2, self.width, -1), "VALID")
    y = y.reshape(*y.shape[:3], 2, 2, self.width)
    cells = [[y[:, a : a + height, b : b + width, a, b] for b in (0, 1)] for a in (0, 1)]
    return interleaved(cells)

  def _conv(self, x: Array, kernel: Array, padding: str) -> Array:
    return convolve(x.astype(self.dtype), kernel.astype(self.dtype), padding)


class QueryProject(nn.Module):
  """Applies a 1 x 1 convolution of the map to the queries instead, as there are fewer of them:
  q . (W x + b) = (W' q) . x + q . b."""

  width: int
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self, queries: Float[Array, "P K D"]
  ) -> tuple[Float[Array, "P K D"], Float[Array, "P K"]]:
    """Returns the transformed queries, and the offset of their products, in float32."""
    shape = 1, 1, self.width, self.width
    kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, jnp.float32)
    bias = self.param("bias", nn.initializers.zeros, (self.width,), jnp.float32)
    kernel, bias = kernel[0, 0].T.astype(self.dtype), bias.astype(self.dtype)
    offset = einsum("pkd,d->pk", queries, bias, preferred_element_type=jnp.float32)
    return float32_sums(queries, kernel, None), offset


class SemanticQuery(nn.Module):
  """Expresses a 1 x 1 convolution of the map to a single channel as a query."""

  width: int
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, prompts: int) -> tuple[Float[Array, "P 1 D"], Float[Array, "P 1"]]:
    """As `QueryProject`; the same query for every prompt."""
    kernel = self.param(
      "kernel", nn.initializers.lecun_normal(), (1, 1, self.width, 1), jnp.float32
    )
    bias = self.param("bias", nn.initializers.zeros, (1,), jnp.float32)
    query = jnp.broadcast_to(kernel[0, 0, :, 0].astype(self.dtype), (prompts, 1, self.width))
    return query, jnp.broadcast_to(bias.astype(jnp.float32), (prompts, 1))


def _folded(taps: Float[Array, "3 ..."]) -> Float[Array, "2 2 ..."]:
  """Sums the taps along an axis that see the same cell of an upsampled map; indexed by [position in
  the upsampled cell, which of the two cells, ...]."""
  before, here, after = taps
  first, second = (before, here + after), (before + here, after)
  return jnp.stack([jnp.stack(first), jnp.stack(second)])
