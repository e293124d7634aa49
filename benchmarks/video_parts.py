"""The parts of a tracked frame at the released size, as programs to compile, and the program of the
whole frame.

The parts of step "frame" run once per frame, those of "objects" for all objects, and that of
"phrase" for all objects that a phrase found, instead of the memory encoder of "objects". The trunk
is a part of `model_parts`.
"""

import contextlib
import dataclasses
import unittest.mock
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from model_parts import BF16, Part, array, module

from sam3_jax.config import RELEASED, Config, VideoConfig
from sam3_jax.inference.video import bank as banks
from sam3_jax.inference.video.bank import Reads, pack_reads
from sam3_jax.inference.video.functions import VideoFunctions, as_map, hide_absent, hide_shrunk
from sam3_jax.inference.video.programs import VideoPrograms
from sam3_jax.model import layers
from sam3_jax.model.norms import LayerNorm
from sam3_jax.model.video import tracker
from sam3_jax.model.video.memory_attention import CrossAttention, MemoryLayer
from sam3_jax.model.visual import head
from sam3_jax.model.visual.head import VisualHead, no_prompts
from sam3_jax.ops import bilinear
from sam3_jax.types import VisualEmbedding

VIDEO = VideoConfig()
CONFIG = dataclasses.replace(RELEASED, video=VIDEO)
SIDE, CELLS, WIDTH, CHANNELS = CONFIG.grid, CONFIG.grid**2, CONFIG.width, VIDEO.memory_channels


def parts(objects: int) -> list[Part]:
  """All parts of a frame with N objects, each with one conditioning frame and many others."""
  return [*_frame_and_attention(objects), *_decode(objects), *_bank(objects)]


def track(
  config: Config, dtype: Any, objects: int, sharding: Any, conditioning: int = 1
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
  """The jitted function of a tracked frame, and the shapes of its arguments on a device."""

  def put(tree: Any, kind: Any = None) -> Any:
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, kind or x.dtype, sharding=sharding), tree
    )

  bank = banks.bank_shapes(config, objects, dtype)
  reads, rows = pack_reads([None] * objects, config, conditioning), array(objects, dtype=jnp.int32)
  arguments = put(bank), put(_embedding(config, dtype)), put(reads), put(rows)
  return VideoPrograms(config, dtype).track, (put(_parameters(config), dtype), *arguments)


def bank_type(objects: int) -> str:
  """The type of the bank's memories in a compiled program."""
  shape = banks.bank_shapes(CONFIG, objects, BF16).memory.shape
  return f"bf16[{','.join(map(str, shape))}]"


@contextlib.contextmanager
def quick_resize() -> Iterator[None]:
  """Resizes maps with one pass of the matrix units instead of six, which compile slowly."""
  with unittest.mock.patch.object(bilinear, "einsum", jnp.einsum):
    yield


def _frame_and_attention(objects: int) -> Iterator[Part]:
  features = array(1, SIDE, SIDE, CONFIG.trunk.width)
  neck = module(VisualHead(CONFIG, BF16), features, method=VisualHead.encode)
  yield Part("frame", "second neck", 1, *neck)
  x, count = array(1, CELLS, WIDTH), VIDEO.layers
  layer = MemoryLayer(WIDTH, SIDE, VIDEO.mlp_width, BF16)
  attend = module(layer, x, method=MemoryLayer.attend)
  name = "memory attention: first self-attention"
  yield Part("frame", name, 1, *attend, whole=True)
  name = "memory attention: self-attention"
  yield Part("objects", name, objects * (count - 1), *attend, whole=True)

  reads = pack_reads([None], CONFIG, 1)
  tokens = reads.pointer_row.shape[1] * WIDTH // CHANNELS
  keys = array(VIDEO.memories, CELLS, CHANNELS), array(tokens, CHANNELS)
  valid = array(VIDEO.memories, dtype=bool), array(tokens, dtype=bool)
  run, (params, *args) = module(CrossAttention(SIDE, BF16), x, keys, keys, valid)

  def cross(params: Any, x: Any, *args: Any) -> Any:
    return x + run(params, x, *args)

  name = "memory attention: cross-attention"
  yield Part("objects", name, objects * count, cross, (params, *args), whole=True)
  feed, (weights, _) = module(layers.Mlp((VIDEO.mlp_width, WIDTH), BF16), x)
  mlp = weights, x

  def add_mlp(params: Any, x: Any) -> Any:
    return x + feed(params, x)

  yield Part("objects", "memory attention: MLP", objects * count, add_mlp, mlp)
  norms = objects * (2 * count + 1)
  yield Part("objects", "memory attention: norms", norms, *module(LayerNorm(dtype=BF16), x))


def _decode(objects: int) -> Iterator[Part]:
  functions, params = VideoFunctions(CONFIG, BF16), _parameters(CONFIG, BF16)
  embedding = _embedding(CONFIG, BF16)
  image, absent = array(objects, SIDE, SIDE, WIDTH), array(objects, dtype=bool)

  def decode(params: Any, image: Any, embedding: Any, unread: Any) -> Any:
    prompts, ambiguous = no_prompts(objects), jnp.ones(objects, bool)
    return hide_absent(functions.decode(params, image, embedding, prompts, ambiguous, unread))

  args = params, image, embedding, absent
  yield Part("objects", "mask decoder and pointer", 1, decode, args, whole=True)
  masks = array(objects, CONFIG.mask_size, CONFIG.mask_size, dtype=jnp.float32)

  def memorize(params: Any, embedding: Any, masks: Any, present: Any) -> Any:
    return functions.memorize(params, embedding, masks, present, functions.soft_map)

  args = params, embedding, masks, absent
  yield Part("objects", "memory encoder", 1, memorize, args)

  def memorize_found(params: Any, embedding: Any, masks: Any, owner: Any, order: Any) -> Any:
    side, share = tracker.MASK_PROMPT_STRIDE * CONFIG.mask_size, VIDEO.rules.shrink_threshold
    logits = hide_shrunk(bilinear.resize(masks, (side, side)), owner, order, share)
    present = (logits > 0).any(axis=(1, 2))
    return functions.memorize(params, embedding, logits, present, as_map)

  numbers = array(objects, dtype=jnp.int32)
  args = params, embedding, masks, numbers, numbers
  yield Part("phrase", "memory encoder, with competing masks", 1, memorize_found, args)


def _bank(objects: int) -> Iterator[Part]:
  bank = banks.bank_shapes(CONFIG, objects, BF16)
  reads: Reads = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), pack_reads([None] * objects, CONFIG, 1)
  )
  yield Part("objects", "bank: gather", 1, banks.gather, (bank, reads))
  row = array(objects, dtype=jnp.int32), array(objects, CHANNELS, CELLS)
  pointers = array(objects, WIDTH, dtype=jnp.float32)
  args = bank, *row, pointers
  yield Part("objects", "bank: write", 1, banks.write, args, donated=(0,))


def _parameters(config: Config, dtype: Any = None) -> dict[str, Any]:
  trees = {"visual": head.parameter_shapes(config), "video": tracker.parameter_shapes(config)}
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype), trees)


def _embedding(config: Config, dtype: Any) -> VisualEmbedding:
  def level(times: int, divided: int) -> Any:
    side = times * config.grid
    return array(1, side, side, config.width // divided, dtype=dtype)

  return VisualEmbedding(level(4, 8), level(2, 4), level(1, 1))
