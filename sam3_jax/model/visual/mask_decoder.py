"""The mask decoder: masks, their estimated IoU and an object score from prompt tokens and an image
(Segment Anything, Kirillov et al. 2023, arXiv:2304.02643, appendix A; the object score and the fine
maps are SAM 2's, Ravi et al. 2024, arXiv:2408.00714)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from sam3_jax.model.layers import Mlp, gelu
from sam3_jax.model.neck import Parameters, doubled
from sam3_jax.model.norms import LayerNorm
from sam3_jax.model.visual.two_way import TwoWayTransformer
from sam3_jax.ops.precision import einsum
from sam3_jax.types import VisualHeadOutput

MASKS = 4  # the single-mask output, then three multimask outputs for ambiguous prompts
IOU_WIDTH = 256


class MaskDecoder(nn.Module):
  """Decodes prompts into masks; the layers of the scores sum in float32."""

  width: int
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self,
    image: Float[Array, "P2 H W D"],
    position: Float[Array, "H W D"],
    levels: tuple[Float[Array, "P3 H2 W2 C2"], Float[Array, "P3 Hm Wm C"]],
    prompt: Float[Array, "P M1 D"],
    valid: Bool[Array, "P M1"],
  ) -> VisualHeadOutput:
    """`image` includes the prompt's mask; `levels` are the middle and the fine map. Each has a row
    for each prompt, or a single row for all of them."""
    width, prompts = self.width, len(prompt)
    normal = nn.initializers.normal(1.0)
    own = [
      self.param(name, normal, (count, width), jnp.float32)
      for name, count in (("object_token", 1), ("iou_token", 1), ("mask_tokens", MASKS))
    ]
    own = jnp.concatenate(own).astype(self.dtype)
    tokens = jnp.concatenate([jnp.broadcast_to(own, (prompts, *own.shape)), prompt], axis=1)
    valid = jnp.pad(valid, ((0, 0), (len(own), 0)), constant_values=True)
    states, cells = TwoWayTransformer(self.dtype, name="two_way")(
      tokens, valid, image.reshape(len(image), -1, width), position.reshape(-1, width)
    )

    middle, fine = levels
    x = cells.reshape(prompts, *image.shape[1:])
    x = doubled(x, Parameters((2, 2), width // 4, name="up1")(width)) + middle
    x = gelu(LayerNorm(epsilon=1e-6, dtype=self.dtype, name="up_norm")(x))
    x = gelu(doubled(x, Parameters((2, 2), width // 8, name="up2")(width // 4)) + fine)

    mask_states = states[:, 2 : 2 + MASKS]
    # One MLP for each mask, stacked.
    mask_mlp = nn.vmap(
      Mlp, in_axes=1, out_axes=1, variable_axes={"params": 0}, split_rngs={"params": True}
    )((width, width, width // 8), self.dtype, name="mask_mlp")
    logits = einsum(
      "pkc,phwc->pkhw", mask_mlp(mask_states), x, preferred_element_type=jnp.float32
    ).astype(self.dtype)
    iou = Mlp((IOU_WIDTH, IOU_WIDTH, MASKS), jnp.float32, name="iou_head")(states[:, 1])
    object_logit = Mlp((width, width, 1), jnp.float32, name="object_head")(states[:, 0])
    return VisualHeadOutput(logits, jax.nn.sigmoid(iou), object_logit[:, 0], mask_states)
