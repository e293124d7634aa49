"""The query decoder: each layer refines the boxes of the queries, and a presence token tells
whether the image contains the concept at all.

DETR's decoder (Carion et al. 2020, arXiv:2005.12872) with boxes as queries (DAB-DETR, Liu et al.
2022, arXiv:2201.12329) and box-relative attention bias (Lin et al. 2023, arXiv:2308.01904).
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

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


class DecodedLayers(NamedTuple):
  """The output of every layer.

  Attributes:
    states: normed query states.
    boxes: cxcywh as fractions, not clipped.
    presence_logit: whether the image contains the concept at all.
  """

  states: Float[Array, "L P Q2 D"]
  boxes: Float[Array, "L P Q2 4"]
  presence_logit: Float[Array, "L P"]


class _Heads(NamedTuple):
  """What all layers share: functions of arrays, see `Decoder._shared`."""

  norm: Callable[[Array], Array]
  presence_norm: Callable[[Array], Array]
  box_head: Callable[[Array], Array]
  presence_head: Callable[[Array], Array]
  query_position: Callable[[Array], Array]
  box_bias: Callable[[Array], tuple[Array, Array]]


class Decoder(nn.Module):
  """Turns queries into states, boxes and presence logits."""

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
  ) -> DecodedLayers:
    """With `duplicate`, a copy of all queries follows them, for one-to-many matching in training;
    the queries do not attend to the copies."""
    config, width, prompts = self.config, self.config.width, len(memory)
    normal = nn.initializers.normal(1.0)
    queries = self.param("query_embedding", normal, (config.queries, width), jnp.float32)
    anchors = self.param("reference_points", normal, (config.queries, 4), jnp.float32)
    anchors = anchors.astype(jnp.float32)  # a checkpoint may store bfloat16
    presence_token = self.param("presence_token", normal, (1, width), jnp.float32)
    heads = self._heads(queries[None], anchors, side=memory.shape[1])
    memory = memory.reshape(prompts, -1, width)
    keys = memory + position.astype(self.dtype)

    def step(layer, carry):
      x, anchor, reference = carry
      query_position = heads.query_position(_sine_boxes(anchor, width // 2)).astype(self.dtype)
      # The presence token has no position.
      query_position = jnp.pad(query_position, ((0, 0), (1, 0), (0, 0)))
      x = layer(x, query_position, prompt, valid, keys, memory, heads.box_bias(anchor))
      states = heads.norm(x[:, 1:])
      delta = heads.box_head(states)
      presence_logit = heads.presence_head(heads.presence_norm(x[:, 0]))[..., 0]
      # Look forward twice (Zhang et al. 2022, arXiv:2203.03605): the gradient flows through the
      # reference of the output, but not through the anchor of the next layer.
      refined = refine(anchor, delta)
      carry = x, jax.lax.stop_gradient(refined), refined
      return carry, DecodedLayers(states, refine(reference, delta), presence_logit)

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

  def _heads(self, states: Array, anchors: Array, side: int) -> _Heads:
    """The modules that all layers share, in float32, as boxes move by fractions of a pixel."""
    width, detached = self.config.width, {"dtype": jnp.float32, "parent": None}
    codes = _sine_boxes(anchors, width // 2)
    bias = BoxBias(width, self.config.heads, side, parent=None)
    return _Heads(
      norm=self._shared("norm", LayerNorm(**detached), states),
      presence_norm=self._shared("presence_norm", LayerNorm(**detached), states),
      box_head=self._shared("box_head", Mlp((width, width, 4), **detached), states),
      presence_head=self._shared("presence_head", Mlp((width, width, 1), **detached), states),
      query_position=self._shared("query_position", Mlp((width,) * 2, **detached), codes),
      box_bias=self._shared("box_bias", bias, anchors[None]),
    )

  def _shared(self, name: str, module: nn.Module, example: Array) -> Callable[..., Any]:
    """`module` as a pure function, its parameters under `name`.

    `nn.scan` either stacks or broadcasts a whole collection. The layers' parameters are stacked and
    these are shared, both in "params": so the scan's body closes over them.
    """
    parameters = self.param(name, lambda key: module.init(key, example)["params"])
    return functools.partial(module.apply, {"params": parameters})


class DecoderLayer(nn.Module):
  """Post-norm layer: queries attend to each other, to the prompt and to the image."""

  config: Config
  dtype: DTypeLike = jnp.float32
  train: bool = False

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "P Q2 D"],
    position: Float[Array, "P Q2 D"],
    prompt: Float[Array, "P S D"],
    valid: Bool[Array, "P S"],
    keys: Float[Array, "P HW D"],
    memory: Float[Array, "P HW D"],
    bias: tuple[Float[Array, "P heads Q2 H"], Float[Array, "P heads Q2 W"]],
  ) -> Float[Array, "P Q2 D"]:
    """`x` is the presence token, the queries, and in training possibly copies of them, which take
    no part in self-attention. `position` encodes the queries' boxes."""
    rate, own = self.config.dropout, self.config.queries + 1

    def attend(name):
      heads = self.config.heads
      return Attention(heads, self.dtype, dropout=rate, train=self.train, name=name)

    def add(x, branch, norm):
      branch = nn.Dropout(rate, deterministic=not self.train)(branch)
      return LayerNorm(dtype=self.dtype, name=norm)(x + branch)

    keyed = (x + position)[:, :own]
    branch = attend("self_attn")(keyed, keyed, x[:, :own])
    branch = jnp.pad(branch, ((0, 0), (0, x.shape[1] - own), (0, 0)))
    x = add(x, branch, "norm_self")
    x = add(x, attend("text_attn")(x + position, prompt, prompt, valid=valid), "norm_text")
    x = add(x, attend("image_attn")(x + position, keys, memory, bias=bias), "norm_image")
    widths = (self.config.mlp_width, x.shape[-1])
    mlp = Mlp(widths, self.dtype, dropout=rate, train=self.train, name="mlp")
    return add(x, mlp(x), "norm_mlp")


def _sine_boxes(boxes: Float[Array, "*rows 4"], channels: int) -> Array:
  """Sine encodings of cxcywh boxes, in the order y, x, width, height."""
  return jnp.concatenate([sine_code(boxes[..., i], channels) for i in (1, 0, 2, 3)], axis=-1)


class BoxBias(nn.Module):
  """Attention bias from the position of each cell relative to a query's box; float32."""

  width: int
  heads: int
  side: int

  @nn.compact
  def __call__(
    self, boxes: Float[Array, "P Q 4"]
  ) -> tuple[Float[Array, "P heads Q1 H"], Float[Array, "P heads Q1 W"]]:
    """The bias of each grid row and of each grid column, to be added up. `boxes` are cxcywh
    fractions. The presence token comes first, with zeros."""
    cells = jnp.arange(self.side, dtype=jnp.float32) / self.side  # a cell's edge, not its center
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
