"""The parts of the released model, as programs to compile: together they are the whole model."""

import contextlib
import dataclasses
import functools
import unittest.mock
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sam3_jax.config import RELEASED
from sam3_jax.inputs.preprocess import normalize
from sam3_jax.model import layers, vit
from sam3_jax.model.decoder import Decoder
from sam3_jax.model.geometry import GeometryEncoder
from sam3_jax.model.masks import MaskHead
from sam3_jax.model.neck import Level
from sam3_jax.model.norms import LayerNorm
from sam3_jax.model.sam3 import parameter_shapes
from sam3_jax.model.scoring import Scoring
from sam3_jax.model.text import TextEncoder
from sam3_jax.types import Prompts, TextEmbedding

BF16 = jnp.bfloat16
TOKENS, SIDE, WIDTH = RELEASED.grid**2, RELEASED.grid, RELEASED.width
TRUNK = RELEASED.trunk
HEAD = TRUNK.width // TRUNK.heads


@dataclasses.dataclass(frozen=True)
class Part:
  """A part of the model.

  Attributes:
    step: "encode" (image), "text" (prompts) or "decode"; for `video_parts`, see there.
    name: description.
    times: how often it runs in the step.
    function, args: the program to compile.
    whole: whether to include attention, which otherwise is a part of its own.
    donated: positions of the arguments that the program may overwrite.
  """

  step: str
  name: str
  times: int
  function: Callable[..., Any]
  args: tuple[Any, ...]
  whole: bool = False
  donated: tuple[int, ...] = ()


def array(*shape: int, dtype: Any = BF16) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, dtype)


def module(part: nn.Module, *args: Any, method: Any = None) -> tuple[Callable[..., Any], tuple]:
  """A module's apply function and its arguments, bfloat16 parameters first."""
  params = jax.eval_shape(functools.partial(part.init, method=method), jax.random.key(0), *args)
  params = jax.tree.map(lambda x: array(*x.shape), params)
  return functools.partial(part.apply, method=method), (params, *args)


def parts(prompts: int) -> list[Part]:
  """All parts, for prompts without boxes on one image."""
  return [*_encode(), *_text(prompts), *_decode(prompts)]


def _encode() -> Iterator[Part]:
  trunk = vit.Trunk(TRUNK, RELEASED.patch, BF16)
  pixels = array(1, RELEASED.image_size, RELEASED.image_size, 3, dtype=jnp.uint8)

  def around(params: Any, pixels: Any) -> Any:
    with nn.intercept_methods(_leave_out_blocks):
      return trunk.apply(params, normalize(pixels))

  params = {"params": jax.tree.map(lambda x: array(*x.shape), parameter_shapes(RELEASED)["trunk"])}
  yield Part("encode", "patches, positions, windows and back", 1, around, (params, pixels))

  x, windows = array(1, TOKENS, TRUNK.width), (SIDE // TRUNK.window) ** 2
  groups, blocks = TRUNK.groups, TRUNK.blocks
  yield Part("encode", "norms", 2 * blocks, *module(LayerNorm(dtype=BF16), x))
  attend = layers.Attention(TRUNK.heads, BF16, rope=(TRUNK.window, 1.0))
  tokens = array(windows, TRUNK.window**2, TRUNK.width)
  run_attend, (params, *_) = module(attend, tokens, tokens, tokens)

  def around_attention(params: Any, x: Any) -> Any:
    return x + run_attend(params, x, x, x)

  name = "projections around attention, with rotary positions"
  yield Part("encode", name, blocks, around_attention, (params, tokens))
  qkv = [array(windows, TRUNK.window**2, TRUNK.heads, HEAD)] * 3
  yield Part("encode", "attention in windows", blocks - groups, _attention, (*qkv,), whole=True)
  qkv = [array(1, TOKENS, TRUNK.heads, HEAD)] * 3
  yield Part("encode", "global attention", groups, _attention, (*qkv,), whole=True)
  mlp = layers.Mlp((TRUNK.mlp_width, TRUNK.width), BF16, layers.unfused_gelu)
  run, (params, _) = module(mlp, x)
  yield Part("encode", "MLP", blocks, lambda params, x: x + run(params, x), (params, x))

  trunk_map = array(1, SIDE, SIDE, TRUNK.width)
  for i, doublings in enumerate((2, 1, 0)):
    level = Level(doublings, WIDTH, BF16)
    yield Part("encode", f"neck, level {i}", 1, *module(level, trunk_map))

  layer, coarse, position = _context_layer(), array(1, TOKENS, WIDTH), _position()
  attend = module(layer, coarse, position, method=layers.ContextLayer.attend)
  yield Part("encode", "first self-attention of fusion, without attention", 1, *attend)
  yield Part("encode", "its attention", 1, _attention, (_heads(1, TOKENS),) * 3, whole=True)
  head, maps = MaskHead(RELEASED, BF16), _levels(1)
  yield Part(
    "encode", "image's part of the masks", 1, *module(head, *maps, method=MaskHead.prepare)
  )


def _text(prompts: int) -> Iterator[Part]:
  text, tokens = TextEncoder(RELEASED.text, WIDTH, BF16), _tokens(prompts)
  yield Part("text", "text encoder", 1, *module(text, tokens), whole=True)


def _decode(prompts: int) -> Iterator[Part]:
  prompt, valid, position = *_prompt(prompts), _position()
  x = array(prompts, TOKENS, WIDTH)
  geometry = GeometryEncoder(RELEASED, BF16)
  coarse = array(prompts, SIDE, SIDE, WIDTH)
  yield Part(
    "decode",
    "geometry encoder without boxes",
    1,
    *module(geometry, coarse, _text_prompts(prompts)),
    whole=True,
  )

  layer, count = _context_layer(), RELEASED.fusion_layers

  def attend_to_prompt(self: Any, x: Any, position: Any, prompt: Any, valid: Any) -> Any:
    return self(x, position, None, prompt, prompt, valid, attended=jnp.asarray(True))[0]

  attend = module(layer, x, position, method=layers.ContextLayer.attend)
  yield Part("decode", "fusion: self-attention without attention", count - 1, *attend)
  own = (_heads(prompts, TOKENS),) * 3
  yield Part(
    "decode", "fusion: attention of cells to cells", count - 1, _attention, own, whole=True
  )
  _, (params, *_) = module(layer, x, position, None, prompt, prompt, valid)
  to_context = (
    functools.partial(layer.apply, method=attend_to_prompt),
    (params, x, position, prompt, valid),
  )
  yield Part("decode", "fusion: the prompt, and MLP, without attention", count, *to_context)
  to_prompt = _to_prompt(prompts)
  yield Part("decode", "fusion: attention to the prompt", count, *to_prompt, whole=True)

  memory, queries = array(prompts, SIDE, SIDE, WIDTH), 1 + RELEASED.queries
  decoder = Decoder(RELEASED, BF16)
  yield Part(
    "decode",
    "query decoder without attention",
    1,
    *module(decoder, memory, position, prompt, valid),
  )
  q, keys, count = _heads(prompts, queries), _heads(prompts, TOKENS), RELEASED.decoder_layers
  yield Part(
    "decode", "attention of queries to each other", count, _attention, (q, q, q), whole=True
  )
  bias = array(prompts, RELEASED.heads, queries, SIDE, dtype=jnp.float32)

  def biased(q: Any, k: Any, v: Any, y: Any, x: Any) -> Any:
    return layers.attention(q, k, v, bias=(y, x))

  yield Part(
    "decode", "attention of queries to the prompt", count, *_to_prompt(prompts, queries), whole=True
  )
  yield Part(
    "decode",
    "attention of queries to cells",
    count,
    biased,
    (q, keys, keys, bias, bias),
    whole=True,
  )

  states = array(prompts, RELEASED.queries, WIDTH, dtype=jnp.float32)
  scoring = Scoring(RELEASED, BF16)
  yield Part("decode", "scores", 1, *module(scoring, states, prompt, valid))
  head = MaskHead(RELEASED, BF16)
  one = _levels(1)

  def masks(params: Any, states: Any, memory: Any, levels: Any, prompt: Any, valid: Any) -> Any:
    levels = [jnp.broadcast_to(x, (prompts, *x.shape[1:])) for x in levels]
    return head.apply(params, states, memory, levels, prompt, valid)

  _, (params, *_) = module(head, states, memory, _levels(prompts), prompt, valid)
  yield Part(
    "decode", "masks without attention", 1, masks, (params, states, memory, one, prompt, valid)
  )
  yield Part("decode", "masks: attention to the prompt", 1, *to_prompt, whole=True)


def _attention(q: Any, k: Any, v: Any) -> Any:
  return layers.attention(q, k, v)


def _to_prompt(prompts: int, queries: int = TOKENS) -> tuple[Callable[..., Any], tuple]:
  def masked(q: Any, k: Any, v: Any, valid: Any) -> Any:
    return layers.attention(q, k, v, valid=valid)

  prompt, valid = _prompt(prompts)
  keys = _heads(prompts, prompt.shape[1])
  return masked, (_heads(prompts, queries), keys, keys, valid)


def _context_layer() -> layers.ContextLayer:
  return layers.ContextLayer(WIDTH, RELEASED.heads, RELEASED.mlp_width, BF16)


def _heads(rows: int, tokens: int) -> jax.ShapeDtypeStruct:
  return array(rows, tokens, RELEASED.heads, WIDTH // RELEASED.heads)


def _position() -> jax.ShapeDtypeStruct:
  return array(TOKENS, WIDTH, dtype=jnp.float32)


def _levels(rows: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
  return array(rows, 2 * SIDE, 2 * SIDE, WIDTH), array(rows, 4 * SIDE, 4 * SIDE, WIDTH)


def _tokens(prompts: int) -> jax.ShapeDtypeStruct:
  return array(prompts, RELEASED.text.context, dtype=jnp.int32)


def _prompt(prompts: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
  """The tokens of the phrase and the class token, and which are valid."""
  tokens = RELEASED.text.context + 1
  return array(prompts, tokens, WIDTH), array(prompts, tokens, dtype=bool)


def _text_prompts(prompts: int) -> Prompts:
  """Text prompts on one image."""
  index, boxes = array(prompts, dtype=jnp.int32), array(prompts, 0, 4, dtype=jnp.float32)
  labels, context = array(prompts, 0, dtype=bool), RELEASED.text.context
  text = TextEmbedding(array(prompts, context, WIDTH), array(prompts, context, dtype=bool))
  return Prompts(index, index, text, boxes, labels, labels)


def _leave_out_blocks(method: Any, args: Any, settings: Any, context: Any) -> Any:
  del settings
  if isinstance(context.module, layers.Block):
    return args[0], None
  return method(*args)


@contextlib.contextmanager
def without_attention() -> Iterator[None]:
  """Replaces attention by a sum of queries, keys and values, so that these are still computed."""

  def added(query: Any, key: Any, value: Any, **_: Any) -> Any:
    rest = key + value
    return query + (rest if rest.shape == query.shape else rest.sum(axis=1, keepdims=True))

  with unittest.mock.patch.object(layers, "attention", added):
    yield


@contextlib.contextmanager
def plain() -> Iterator[None]:
  """Replaces attention, GELU and the patch embedding by straightforward versions."""

  def attention(query, key, value, bias=None, valid=None, causal=False, **_: Any) -> Any:
    logits = jnp.einsum("aihc,ajhc->ahij", query, key, preferred_element_type=jnp.float32)
    logits = logits / query.shape[-1] ** 0.5
    if bias is not None:
      y, x = bias
      logits += (y[..., None] + x[..., None, :]).reshape(logits.shape)
    if valid is not None:
      logits = jnp.where(valid[:, None, None], logits, -jnp.inf)
    if causal:
      logits = jnp.where(jnp.tri(*logits.shape[-2:], dtype=bool), logits, -jnp.inf)
    weights = jax.nn.softmax(logits).astype(value.dtype)
    out = jnp.einsum("ahij,ajhc->aihc", weights, value, preferred_element_type=jnp.float32)
    return out.astype(value.dtype)

  def patches(self: Any, images: Any) -> Any:
    kernel = self.variables["params"]["kernel"]
    strides = (self.patch, self.patch)
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
      images.astype(self.dtype), kernel, strides, "VALID", dimension_numbers=numbers
    )

  def intercept(method: Any, args: Any, settings: Any, context: Any) -> Any:
    del settings
    module = context.module
    if isinstance(module, vit.Patches) and not module.is_initializing():
      return patches(module, *args)
    return method(*args)

  gelu = functools.partial(jax.nn.gelu, approximate=False)
  with (
    unittest.mock.patch.object(layers, "attention", attention),
    unittest.mock.patch.object(layers, "gelu", gelu),
    nn.intercept_methods(intercept),
  ):
    yield
