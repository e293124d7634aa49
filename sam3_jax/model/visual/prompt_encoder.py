"""The prompt encoder: points and boxes become tokens, and a mask becomes a map that is added to the
image.

After Segment Anything (Kirillov et al. 2023, arXiv:2304.02643, section 3 and appendix A). A box is
encoded as its two corners.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from sam3_jax.model.layers import conv, gelu
from sam3_jax.model.norms import LayerNorm
from sam3_jax.ops.precision import matmul

LABELS = 4  # a point off the object, a point on it, a box's first and last corner
MASK_WIDTHS = (4, 16)  # channels of the mask on its way down to the grid


class PromptEncoder(nn.Module):
  """Encodes prompts as tokens and as a map.

  Attributes:
    width: channels of tokens and map.
    image_size: pixels per side of the model's input; points are shifted by half a pixel.
    dtype: of the computation; positional encodings are float32.
  """

  width: int
  image_size: int
  dtype: DTypeLike = jnp.float32

  def setup(self):
    normal = nn.initializers.normal(1.0)
    # Random and never trained (Tancik et al. 2020, arXiv:2006.10739).
    self.frequencies = self.param("frequencies", normal, (2, self.width // 2), jnp.float32)
    self.label_embedding = self.param("label_embedding", normal, (LABELS, self.width), jnp.float32)
    self.not_a_point = self.param("not_a_point", normal, (1, self.width), jnp.float32)
    self.no_mask = self.param("no_mask", normal, (1, self.width), jnp.float32)
    self.mask = MaskEncoder(self.width, self.dtype)

  def points(
    self, xy: Float[Array, "P M 2"], labels: Int[Array, "P M"]
  ) -> tuple[Float[Array, "P M1 D"], Bool[Array, "P M1"]]:
    """A token for each point and one at the end, and which are valid. A prompt without points has
    no valid token."""
    code = self._code(xy + 0.5 / self.image_size)
    table, last = (x.astype(jnp.float32) for x in (self.label_embedding, self.not_a_point))
    tokens = code + table[jnp.maximum(labels, 0)]
    last = jnp.broadcast_to(last, (len(xy), 1, self.width))
    valid = labels >= 0
    valid = jnp.concatenate([valid, valid.any(axis=1, keepdims=True)], axis=1)
    return jnp.concatenate([tokens, last], axis=1).astype(self.dtype), valid

  def tracked_points(
    self, xy: Float[Array, "P M 2"], labels: Int[Array, "P M"]
  ) -> tuple[Float[Array, "P M1 D"], Bool[Array, "P M1"]]:
    """As `points`, with two tokens for a prompt without points, both of them "not a point". Meta's
    tracker decodes frames without a prompt so, and mask prompts. Needs at least one slot."""
    tokens, valid = self.points(xy, labels)
    without = ~valid.any(axis=1, keepdims=True)
    slot = jnp.arange(valid.shape[1], dtype=jnp.int32)
    added = without & ((slot == 0) | (slot == slot[-1]))
    return jnp.where(added[..., None], tokens[:, -1:], tokens), valid | added

  def masks(
    self, mask: Float[Array, "P Hm Wm"] | None, has_mask: Bool[Array, " P"] | None
  ) -> Float[Array, "P2 H2 W2 D"]:
    """The map to add to the coarse map: [P, H, W, D], or [1, 1, 1, D] if no prompt has a mask."""
    none = self.no_mask.astype(self.dtype)[:, None, None]
    if mask is None or has_mask is None:
      return none
    return jnp.where(has_mask[:, None, None, None], self.mask(mask), none)

  def grid(self, height: int, width: int) -> Float[Array, "H W D"]:
    """Positional encodings of the centers of a grid's cells."""
    rows, columns = (np.float32((np.arange(n) + 0.5) / n) for n in (height, width))
    return self._code(jnp.stack(jnp.meshgrid(columns, rows), axis=-1)).astype(self.dtype)

  def _code(self, xy: Float[Array, "*rows 2"]) -> Float[Array, "*rows D"]:
    frequencies = jax.lax.stop_gradient(self.frequencies).astype(jnp.float32)
    angles = matmul(2 * xy - 1, frequencies) * np.float32(2 * np.pi)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class MaskEncoder(nn.Module):
  """Encodes mask logits at 4 times the grid as a map on the grid."""

  width: int
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, mask: Float[Array, "P Hm Wm"]) -> Float[Array, "P H W D"]:
    x = mask[..., None].astype(self.dtype)
    for i, channels in enumerate(MASK_WIDTHS, start=1):
      x = conv(channels, 2, self.dtype, f"conv{i}", strides=2, padding="VALID")(x)
      x = gelu(LayerNorm(epsilon=1e-6, dtype=self.dtype, name=f"norm{i}")(x))
    return conv(self.width, 1, self.dtype, "project")(x)
