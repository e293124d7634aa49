"""Memory attention: a frame's coarse map reads the memories and pointers of an object (SAM 2, Ravi
et al. 2024, arXiv:2408.00714, section 4).

Before the first layer's cross-attention nothing depends on the object, so that part runs once a
frame. The rest runs object by object, since the keys of one object take much memory: 36,000 tokens
for the released model.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from sam3_jax.config import VideoConfig
from sam3_jax.model.layers import Attention, Mlp, dense, stacked
from sam3_jax.model.norms import LayerNorm
from sam3_jax.model.positions import sine_map
from sam3_jax.model.rope import rope_table, rotate
from sam3_jax.ops.attention import attention_to_frames
from sam3_jax.types import Remembered

POSITION_SCALE = 0.1  # of the position codes that are added to the coarse map; fixed in Meta's code


class MemoryAttention(nn.Module):
  """Conditions a frame's coarse map on what each object has of earlier frames.

  Attributes:
    config: sizes of the tracker.
    width: channels of the coarse map.
    grid: cells per side of the coarse map.
    dtype: of the computation; norms' statistics and softmax are float32.
  """

  config: VideoConfig
  width: int
  grid: int
  dtype: DTypeLike = jnp.float32

  def setup(self):
    self.layers = MemoryLayer(self.width, self.grid, self.config.mlp_width, self.dtype)
    self.norm_final = LayerNorm(dtype=self.dtype)

  def __call__(
    self, coarse: Float[Array, "H W D"], remembered: Remembered
  ) -> Float[Array, "O H W D"]:
    """An object without a valid memory or token takes no time; its result has no meaning."""
    width = coarse.shape[-1]
    position = sine_map(*coarse.shape) * POSITION_SCALE
    x = coarse.astype(self.dtype) + position.astype(self.dtype)
    x = self._attend(x.reshape(1, -1, width))

    def read(module: "MemoryAttention", x: Array, one: Remembered) -> tuple[Array, Array]:
      if module.is_initializing():
        return x, module._read(x, one)
      known = one.valid.any() | one.token_valid.any()
      # A softmax needs a key, also where both branches are computed, as under `vmap`.
      first = jnp.arange(len(one.valid), dtype=jnp.int32) == 0
      one = dataclasses.replace(one, valid=one.valid | (~known & first))
      return x, nn.cond(
        known, MemoryAttention._read, lambda _, x, one: x[0], module, x, one, variables="params"
      )

    objects = nn.scan(
      read,
      variable_broadcast="params",
      variable_axes={"intermediates": 0},
      split_rngs={"params": False},
    )
    _, out = objects(self, x, remembered)
    return out.reshape(-1, *coarse.shape)

  def _attend(self, x: Float[Array, "1 HW D"]) -> Float[Array, "1 HW D"]:
    """The first layer's self-attention."""
    if self.is_initializing():  # `_read` creates the parameters of all layers
      return x
    first = functools.partial(jax.tree.map, lambda x: x[0])
    attend = nn.map_variables(MemoryLayer.attend, "params", trans_in_fn=first, variables=False)
    return attend(self.layers, x)

  def _read(self, x: Float[Array, "1 HW D"], one: Remembered) -> Float[Array, "HW D"]:
    """The other parts of all layers, for one object."""
    memory, tokens = one.memory.astype(self.dtype), one.token.astype(self.dtype)
    cells = sine_map(self.grid, self.grid, memory.shape[-1]).reshape(memory.shape[1:])
    keys = memory + (cells + one.code.astype(jnp.float32)[:, None]).astype(self.dtype)
    token_keys = tokens + one.token_code.astype(self.dtype)
    valid = one.valid, one.token_valid

    def step(layer: MemoryLayer, x: Array, first: Array) -> tuple[Array, None]:
      return layer(x, (keys, token_keys), (memory, tokens), valid, attended=first), None

    length = self.config.layers
    layers = stacked(step, length, in_axes=0)
    x, _ = layers(self.layers, x, jnp.arange(length, dtype=jnp.int32) == 0)
    return self.norm_final(x)[0]


class MemoryLayer(nn.Module):
  """Pre-norm layer with self-attention, cross-attention to memories, and a ReLU MLP.

  Both attentions have one head and rotary positions.
  """

  width: int
  grid: int
  mlp_width: int
  dtype: DTypeLike = jnp.float32

  def setup(self):
    self.norm1, self.norm2, self.norm3 = (LayerNorm(dtype=self.dtype) for _ in range(3))
    self.self_attn = Attention(1, self.dtype, rope=(self.grid, 1.0))
    self.cross_attn = CrossAttention(self.grid, self.dtype)
    self.mlp = Mlp((self.mlp_width, self.width), self.dtype)

  def __call__(
    self,
    x: Float[Array, "1 HW D"],
    keys: tuple[Float[Array, "F HW C"], Float[Array, "E C"]],
    values: tuple[Float[Array, "F HW C"], Float[Array, "E C"]],
    valid: tuple[Bool[Array, " F"], Bool[Array, " E"]],
    attended: Bool[Array, ""],
  ) -> Float[Array, "1 HW D"]:
    """Keys and values are those of the memories' cells and of the pointers' tokens; `valid` tells
    which memories and which tokens there are, and `attended` whether `x` is after self-attention
    already."""
    if self.is_initializing():
      x = self.attend(x)
    else:
      x = nn.cond(
        attended, lambda layer, x: x, lambda layer, x: layer.attend(x), self, x, variables="params"
      )
    x = x + self.cross_attn(self.norm2(x), keys, values, valid)
    return x + self.mlp(self.norm3(x))

  def attend(self, x: Float[Array, "1 HW D"]) -> Float[Array, "1 HW D"]:
    """The first part of the layer, self-attention."""
    y = self.norm1(x)
    return x + self.self_attn(y, y, y)


class CrossAttention(nn.Module):
  """Attention of one head to the cells of several frames, and to tokens.

  Rotary positions of the grid apply to the queries and to the cells of every frame, but not to the
  tokens. Frames of large maps that are not valid take no time.
  """

  grid: int
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self,
    query: Float[Array, "1 HW D"],
    keys: tuple[Float[Array, "F HW C"], Float[Array, "E C"]],
    values: tuple[Float[Array, "F HW C"], Float[Array, "E C"]],
    valid: tuple[Bool[Array, " F"], Bool[Array, " E"]],
  ) -> Float[Array, "1 HW D"]:
    width = query.shape[-1]
    key, value, project = (dense(width, self.dtype, name) for name in ("key", "value", "query"))
    table = rope_table(self.grid, 1.0, width)

    def rotated(x: Float[Array, "A HW D"]) -> Float[Array, "A HW D"]:
      return rotate(x[:, :, None], table)[:, :, 0]

    q, (cells, tokens), (contents, token_contents) = rotated(project(query))[0], keys, values
    frames_valid, tokens_valid = valid
    frames = rotated(key(cells)), value(contents), frames_valid
    first = key(tokens), value(token_contents), tokens_valid
    out = q if self.is_initializing() else attention_to_frames(q, first, frames)
    return dense(width, self.dtype, "out")(out[None])
