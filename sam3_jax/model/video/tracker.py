"""The tracker's network: reads what an object has of earlier frames, and writes the memory of a
frame. The behavior follows Meta's released code.

A tracked frame goes through `read_memory`, then `VisualHead.detect_tracked`, `pointer` and
`encode_memory`. Which frames are read is decided by the caller.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from sam3_jax.config import Config, VideoConfig
from sam3_jax.model.layers import Mlp, conv, dense
from sam3_jax.model.positions import TEMPERATURE
from sam3_jax.model.video.memory_attention import MemoryAttention
from sam3_jax.model.video.memory_encoder import MemoryEncoder
from sam3_jax.types import Remembered

MASK_PROMPT_STRIDE = 4  # pixels of a mask prompt per cell of the decoder's masks


class VideoTracker(nn.Module):
  """Memory attention, memory encoder and object pointers. The first axis is the object.

  Attributes:
    config: sizes of the model, with `video`.
    dtype: of the computation; norms' statistics, softmax and codes are float32.
  """

  config: Config
  dtype: DTypeLike = jnp.float32

  def setup(self):
    width, video = self.config.width, video_config(self.config)
    normal = nn.initializers.normal(0.02)
    channels = video.memory_channels
    self.memory_codes = self.param("memory_codes", normal, (video.memories, channels), jnp.float32)
    self.no_object_pointer = self.param("no_object_pointer", normal, (width,), jnp.float32)
    self.no_object_memory = self.param("no_object_memory", normal, (channels,), jnp.float32)
    self.pointer_mlp = Mlp((width,) * 3, self.dtype)
    self.pointer_time = dense(channels, jnp.float32, None)
    stride = MASK_PROMPT_STRIDE
    self.mask_downsample = conv(1, stride, jnp.float32, None, strides=stride, padding="VALID")
    self.memory_encoder = MemoryEncoder(video, self.dtype)
    self.memory_attention = MemoryAttention(video, width, self.config.grid, self.dtype)

  def __call__(
    self,
    coarse: Float[Array, "H W D"],
    mask: Float[Array, "O S S"],
    tokens: Float[Array, "O D"],
  ) -> tuple[Float[Array, "O H W D"], Float[Array, "O S4 S4"]]:
    """Runs all methods; `init` so creates every parameter."""
    present = jnp.ones(len(mask), bool)
    memory = self.encode_memory(coarse, mask, ~present)[:, None]
    pointers = self.pointer(tokens, present)[:, None]
    first, once = jnp.zeros((len(mask), 1), jnp.int32), present[:, None]
    now = jnp.zeros((len(mask), 1), jnp.float32)
    read = self.read_memory(coarse, memory, first, once, pointers, now, once)
    return read, self.mask_prompt_logits(mask)

  def read_memory(
    self,
    coarse: Float[Array, "H W D"],
    memory: Float[Array, "O F HW C"],
    memory_index: Int[Array, "O F"],
    memory_valid: Bool[Array, "O F"],
    pointers: Float[Array, "O E D"],
    pointer_time: Float[Array, "O E"],
    pointer_valid: Bool[Array, "O E"],
  ) -> Float[Array, "O H W D"]:
    """Conditions the frame's coarse map on each object's memories and pointers.

    The order of memories and of pointers does not matter, nor does padding.

    Args:
      coarse: the frame's map from the second neck.
      memory: from `encode_memory`.
      memory_index: row of the table of codes in time: 0 for the latest previous frame, 1 for the
        one before it, ...; the last row (6) for conditioning frames.
      memory_valid: False on padding.
      pointers: from `pointer`.
      pointer_time: distance in frames, divided by min(frames of the video, 16) - 1.
      pointer_valid: False on padding.

    Returns:
      A map for each object. An object without any memory or pointer gets the coarse map itself.
    """
    objects, channels = len(memory), memory.shape[-1]
    codes = self.memory_codes.astype(jnp.float32)[memory_index]
    times = self.pointer_time(time_code(pointer_time, self.config.width))
    parts = pointers.shape[-1] // channels  # tokens of a pointer
    tokens = pointers.reshape(objects, -1, channels)
    known = memory_valid.any(axis=1) | pointer_valid.any(axis=1)
    remembered = Remembered(
      memory=memory,
      code=codes,
      valid=memory_valid,
      token=tokens,
      token_code=jnp.repeat(times, parts, axis=1),
      token_valid=jnp.repeat(pointer_valid, parts, axis=1),
    )
    conditioned = self.memory_attention(coarse, remembered)
    return jnp.where(known[:, None, None, None], conditioned, coarse.astype(self.dtype))

  def pointer(self, tokens: Float[Array, "O D"], present: Bool[Array, " O"]) -> Float[Array, "O D"]:
    """Object pointers, float32, from the mask tokens of the chosen masks. `present` is whether the
    object logit is positive; an absent object has a pointer that is the same for all."""
    pointer = self.pointer_mlp(tokens.astype(self.dtype)).astype(jnp.float32)
    return jnp.where(present[:, None], pointer, self.no_object_pointer.astype(jnp.float32))

  def encode_memory(
    self,
    coarse: Float[Array, "H W D"],
    mask: Float[Array, "O S S"],
    absent: Bool[Array, " O"],
  ) -> Float[Array, "O HW C"]:
    """Memories of a frame.

    Args:
      coarse: the frame's map from the second neck.
      mask: values in [-10, 10] at any resolution: the sigmoid of the logits times 20 minus 10, or
        -10 and 10. Resized to 16 times the grid (1152 for the released model).
      absent: whether the object is not visible on the frame.
    """
    memory = self.memory_encoder(coarse, mask.astype(jnp.float32))
    memory = memory.reshape(len(mask), -1, memory.shape[-1])
    return memory + jnp.where(absent[:, None, None], self.no_object_memory, 0).astype(self.dtype)

  def mask_prompt_logits(self, mask: Float[Array, "O S S"]) -> Float[Array, "O S4 S4"]:
    """The mask prompt of the decoder, float32, for a mask in [0, 1] at 16 times the grid. The
    result has the size of the decoder's masks."""
    return self.mask_downsample(mask.astype(jnp.float32)[..., None])[..., 0]


def time_code(time: Float[Array, "O E"], channels: int) -> Float[Array, "O E channels"]:
  """Sine code of times: the sines of all frequencies, then the cosines; float32."""
  half = channels // 2
  exponents = np.float32(np.arange(half) // 2 * 2 / half)
  angles = time[..., None] / np.power(np.float32(TEMPERATURE), exponents)
  return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def video_config(config: Config) -> VideoConfig:
  """The tracker's sizes; raises ValueError for a model without tracker."""
  if config.video is None:
    raise ValueError("this model has no tracker; its configuration needs `video`.")
  return config.video


def init(config: Config, key: Array) -> dict[str, Any]:
  """Returns random parameters, float32: the subtree `video` of a checkpoint.

  Raises:
    ValueError: `config.video` is None.
  """
  video_config(config)
  grid, size, width = config.grid, MASK_PROMPT_STRIDE * config.mask_size, config.width

  @jax.jit  # compiled, so that only the parameters are computed
  def make(key):
    coarse, mask, tokens = (
      jnp.zeros(shape, jnp.float32) for shape in ((grid, grid, width), (1, size, size), (1, width))
    )
    return VideoTracker(config).init(key, coarse, mask, tokens)["params"]

  return make(key)


def parameter_shapes(config: Config) -> dict[str, Any]:
  """The tree of `init` with shapes instead of arrays; allocates nothing. Raises as `init`."""
  return jax.eval_shape(functools.partial(init, config), jax.random.key(0))
