"""The query decoder: queries become boxes, layer by layer, and a presence token says whether the
image holds the concept at all.

DETR's decoder (Carion et al. 2020, arXiv:2005.12872) with queries that are boxes (DAB-DETR, Liu et
al. 2022, arXiv:2201.12329) and attention biased by box (Lin et al. 2023, arXiv:2308.01904).
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from sam3_jax.config import Config
from sam3_jax.model.layers import PLAIN, Attention, Layering, Mlp, stacked
from sam3_jax.model.norms import LayerNorm
from sam3_jax.model.positions import sine_code
from sam3_jax.ops.boxes import cxcywh_to_xyxy, refine


class Decoder(nn.Module):
  """Queries to states, boxes and presence after every layer."""

  config: Config
  dtype: DTypeLike = jnp.float32
  train: bool = False
  layering: Layering = PLAIN

  @nn.compact
  def __call__(
    self,
    memory: Float[Array, "P H W D"],
    position: Float[Array, "HW D"],
    prompt: Float[Array, "P S D"],
    valid: Bool[Array, "P S"],
    duplicate: bool = False,
  ) -> tuple[Float[Array, "L P Q2 D"], Float[Array, "L P Q2 4"], Float[Array, "L P"]]:
    """Normed query states, boxes (cxcywh fractions, not clipped) and presence logits.

    `duplicate` puts a copy of all queries after them, for one-to-many matching in training; the
    queries themselves do not see their copies.
    """
    config, width, prompts = self.config, self.config.width, len(memory)
    side, normal = memory.shape[1], nn.initializers.normal(1.0)
    queries = self.param("query_embedding", normal, (config.queries, width), jnp.float32)
    anchors = self.param("reference_points", normal, (config.queries, 4), jnp.float32)
    anchors = anchors.astype(jnp.float32)  # bfloat16 in a checkpoint restored so
    presence_token = self.param("presence_token", normal, (1, width), jnp.float32)

    # What all layers share is applied as a function, since a scan would stack its parameters; in
    # float32, as boxes move by fractions of a pixel.
    state, alone = queries[None], {"dtype": jnp.float32, "parent": None}
    norm = self._shared("norm", LayerNorm(**alone), state)
    presence_norm = self._shared("presence_norm", LayerNorm(**alone), state)
    box_head = self._shared("box_head", Mlp((width, width, 4), **alone), state)
    presence_head = self._shared("presence_head", Mlp((width, width, 1), **alone), state)
    query_position = self._shared(
      "query_position", Mlp((width,) * 2, **alone), _sine_boxes(anchors, width // 2)
    )
    bias = BoxBias(width, config.heads, side, parent=None)
    box_bias = self._shared("box_bias", bias, anchors[None])

    memory = memory.reshape(prompts, -1, width)
    keys = memory + position.astype(self.dtype)

    def step(layer, carry):
      x, anchor, reference = carry
      place = query_position(_sine_boxes(anchor, width // 2)).astype(self.dtype)
      place = jnp.pad(place, ((0, 0), (1, 0), (0, 0)))  # the presence token has no position
      x = layer(x, place, prompt, valid, keys, memory, box_bias(anchor))
      normed = norm(x[:, 1:])
      delta = box_head(normed)
      presence = presence_head(presence_norm(x[:, 0]))[..., 0]
      # Outputs look forward twice (Zhang et al. 2022, arXiv:2203.03605): their reference keeps its
      # gradient, the anchor of the next layer does not.
      refined = refine(anchor, delta)
      carry = x, jax.lax.stop_gradient(refined), refined
      return carry, (normed, refine(reference, delta), presence)

    if duplicate:
      queries, anchors = (jnp.concatenate([x, x]) for x in (queries, anchors))
    x = jnp.concatenate([presence_token, queries]).astype(self.dtype)
    x = jnp.broadcast_to(x, (prompts, *x.shape))
    boxes = jax.nn.sigmoid(anchors)
    boxes = jnp.broadcast_to(boxes, (prompts, *boxes.shape))
    layer = DecoderLayer(config, self.dtype, self.train, name="layers")
    _, outputs = stacked(step, config.decoder_layers, layering=self.layering)(
      layer, (x, boxes, boxes)
    )
    return outputs

  def _shared(self, name: str, module: nn.Module, example: Array) -> Callable[..., Any]:
    """`module` as a pure function, its parameters under `name`."""
    parameters = self.param(name, lambda key: module.init(key, example)["params"])
    return functools.partial(module.apply, {"params": parameters})


class DecoderLayer(nn.Module):
  """Post-norm layer: queries look at each other, at the prompt, and at the image."""

  config: Config
  dtype: DTypeLike = jnp.float32
  train: bool = False

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "P Q2 D"],
    place: Float[Array, "P Q2 D"],
    prompt: Float[Array, "P S D"],
    valid: Bool[Array, "P S"],
    keys: Float[Array, "P HW D"],
    memory: Float[Array, "P HW D"],
    bias: tuple[Float[Array, "P heads Q2 H"], Float[Array, "P heads Q2 W"]],
  ) -> Float[Array, "P Q2 D"]:
    """`x` holds the presence token, then the queries, then perhaps their copies, which have no part
    in self-attention."""
    rate, own = self.config.dropout, self.config.queries + 1

    def attend(name):
      heads = self.config.heads
      return Attention(heads, self.dtype, dropout=rate, train=self.train, name=name)

    def add(x, branch, norm):
      branch = nn.Dropout(rate, deterministic=not self.train)(branch)
      return LayerNorm(dtype=self.dtype, name=norm)(x + branch)

    placed = (x + place)[:, :own]
    branch = attend("self_attn")(placed, placed, x[:, :own])
    branch = jnp.pad(branch, ((0, 0), (0, x.shape[1] - own), (0, 0)))
    x = add(x, branch, "norm_self")
    x = add(x, attend("text_attn")(x + place, prompt, prompt, valid=valid), "norm_text")
    x = add(x, attend("image_attn")(x + place, keys, memory, bias=bias), "norm_image")
    widths = (self.config.mlp_width, x.shape[-1])
    mlp = Mlp(widths, self.dtype, dropout=rate, train=self.train, name="mlp")
    return add(x, mlp(x), "norm_mlp")


def _sine_boxes(boxes: Float[Array, "*rows 4"], channels: int) -> Array:
  """Codes of y, x, width and height of cxcywh boxes, in this order."""
  return jnp.concatenate([sine_code(boxes[..., i], channels) for i in (1, 0, 2, 3)], axis=-1)


class BoxBias(nn.Module):
  """Bias of the attention logits by where each cell lies relative to a query's box; float32."""

  width: int
  heads: int
  side: int

  @nn.compact
  def __call__(
    self, boxes: Float[Array, "P Q 4"]
  ) -> tuple[Float[Array, "P heads Q1 H"], Float[Array, "P heads Q1 W"]]:
    """What a cell's row and what its column adds; `boxes` are cxcywh fractions, a query of zeros
    for the presence token comes first."""
    cells = jnp.arange(self.side, dtype=jnp.float32) / self.side  # a cell's start, not its centre
    edges = cxcywh_to_xyxy(boxes)
    y, x = (
      self._axis(cells[:, None] - edges[..., None, axis::2], name)
      for axis, name in ((1, "y"), (0, "x"))
    )
    return y, x

  def _axis(
    self, delta: Float[Array, "P Q cells 2"], name: str
  ) -> Float[Array, "P heads Q1 cells"]:
    delta = jnp.sign(delta) * jnp.log2(jnp.abs(8 * delta) + 1) / math.log2(8)
    bias = jnp.moveaxis(Mlp((self.width, self.heads), name=name)(delta), -1, 1)
    return jnp.pad(bias, ((0, 0), (0, 0), (1, 0), (0, 0)))
