"""Memory-efficient attention: never materializes the logits of all heads and queries at once.

The logits of a global block of the released trunk would take 1.7 GB in float32. So heads, and if
necessary queries, are processed in chunks whose size is given by the platform's `Plan`. The logits
of a chunk stay in a TPU's VMEM or a CPU's caches, and the backward pass recomputes them.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import platform_dependent
from jaxtyping import Array, Bool, Float, Key

from sam3_jax.ops.precision import einsum


class Plan(NamedTuple):
  """How attention is split into chunks.

  Attributes:
    head_logits: maximum number of logits in a chunk of whole heads.
    query_logits: maximum number of logits in a chunk of one head's queries.
    ones: whether the sum of the weights is computed by the product with the values, to which a
      column of ones is appended.
  """

  head_logits: int
  query_logits: int
  ones: bool


# 16 MB of logits: 12 heads of windows of the released trunk, or 648 queries of a global block. In
# float32 the extra column costs as much as the sums; in bfloat16 it costs half, and the sums the
# same.
CPU = {
  "float32": Plan(2**22, 2**22, ones=False),
  "bfloat16": Plan(2**22, 2**22, ones=True),
}
# 64 MB: 48 heads of windows, or 8 heads of the decoder (16 of those, 67 MB, do not stay in VMEM).
# And 32 MB: 1296 queries; a TPU v6e is slower with 2592. The matrix units are idle, so sums are
# free.
OTHERS = Plan(16_000_000, 2**23, ones=True)
LOWEST = -1e30  # below every logit, but finite


def attention(
  query: Float[Array, "A I Heads C"],
  key: Float[Array, "A J Heads C"],
  value: Float[Array, "A J Heads C"],
  *,
  bias: tuple[Float[Array, "A Heads I Y"], Float[Array, "A Heads I X"]] | None = None,
  valid: Bool[Array, "A J"] | None = None,
  causal: bool = False,
  dropout: float = 0.0,
  dropout_key: Key[Array, ""] | None = None,
) -> Float[Array, "A I Heads C"]:
  """Softmax attention, scaled by 1 / sqrt(C); logits and softmax in float32.

  Args:
    query, key, value: tokens before heads, any leading axis A.
    bias: added to the scaled logits, for keys that are the cells of a grid of Y rows and X columns:
      the terms of each row and of each column, 1 / 36 of the size of the full bias at 72 x 72.
    valid: False on keys to which no query may attend; every row needs a True.
    causal: query i attends to keys 0 .. i only.
    dropout: rate at which attention weights are dropped; needs `dropout_key`.
    dropout_key: random key of the dropout; None for no dropout.
  """
  rows, queries, heads, channels = query.shape
  query, key, value = (_heads_first(x) for x in (query, key, value))
  operands: dict[str, Any] = {"query": query, "key": key, "value": value}
  if bias is not None:
    operands["bias"] = tuple(x.reshape(rows * heads, queries, -1) for x in bias)
  if valid is not None:
    operands["valid"] = jnp.repeat(valid, heads, axis=0)
  if dropout and dropout_key is not None:
    operands["dropout_key"] = jax.random.split(dropout_key, rows * heads)

  plans = CPU.get(value.dtype.name, CPU["float32"]), OTHERS
  on_cpu, elsewhere = (
    functools.partial(_map_heads, plan=plan, causal=causal, dropout=dropout) for plan in plans
  )
  out = platform_dependent(operands, cpu=on_cpu, default=elsewhere)
  return out.reshape(rows, heads, queries, channels).swapaxes(1, 2)


def attention_to_frames(
  query: Float[Array, "I C"],
  first: tuple[Float[Array, "E C"], Float[Array, "E C"], Bool[Array, " E"]],
  frames: tuple[Float[Array, "F J C"], Float[Array, "F J C"], Bool[Array, " F"]],
) -> Float[Array, "I C"]:
  """As `attention` with one head, to keys of several frames.

  If all logits are more than a chunk, each block of queries adds frames one by one to running sums
  with a running maximum (Milakov and Gimelshein 2018, arXiv:1805.02867), and frames that are not
  valid take no time.

  Args:
    query: of the only head.
    first: keys, values, and which of them are valid, that are no frame's.
    frames: keys and values of each frame, and which frames are valid. With `first`, at least one
      key must be valid.
  """
  plans = CPU.get(query.dtype.name, CPU["float32"]), OTHERS
  on_cpu, elsewhere = (functools.partial(_by_frame, plan=plan) for plan in plans)
  return platform_dependent(query, first, frames, cpu=on_cpu, default=elsewhere)


class _Sums(NamedTuple):
  """The softmax over the keys so far, for a block of queries: the largest logit, the sum of the
  weights, and the weighted sum of the values."""

  top: Float[Array, "B 1"]
  total: Float[Array, "B 1"]
  out: Float[Array, "B C"]


def _by_frame(query, first, frames, plan: Plan) -> Float[Array, "I C"]:
  """As `attention_to_frames`."""
  (count, channels), (keys, values, valid) = query.shape, frames
  logits = count * (keys.shape[0] * keys.shape[1] + len(first[0]))
  if logits <= plan.query_logits:
    return _all_frames(query, first, frames, plan)
  block = _divisor(count, plan.query_logits // keys.shape[1])
  # Scales the queries, not the logits: a pass over the logits less.
  blocks = (query / math.sqrt(channels)).astype(query.dtype).reshape(-1, block, channels)
  if plan.ones:
    values, first = _with_ones(values), (first[0], _with_ones(first[1]), first[2])

  def chunk(query: Array) -> Array:
    zeros = jnp.zeros((block, 1), jnp.float32)
    sums = _Sums(zeros + LOWEST, zeros, jnp.zeros((block, channels), jnp.float32))
    sums = _add_keys(query, sums, *first)

    def step(sums: _Sums, frame: tuple[Array, Array, Array]) -> tuple[_Sums, None]:
      key, value, used = frame
      value = jax.lax.optimization_barrier(value)  # a TPU is slower if its products slice
      add = jax.checkpoint(functools.partial(_add_keys, query))
      return jax.lax.cond(used, add, lambda sums, *_: sums, sums, key, value), None

    sums, _ = jax.lax.scan(step, sums, (keys, values, valid))
    return (sums.out / sums.total).astype(values.dtype)

  return jax.lax.map(chunk, blocks).reshape(query.shape)


def _all_frames(query, first, frames, plan: Plan) -> Float[Array, "I C"]:
  """As `attention_to_frames`, with all logits at once."""
  (keys, values, frames_valid), (first_key, first_value, first_valid) = frames, first
  key = jnp.concatenate([keys.reshape(-1, keys.shape[-1]), first_key])
  value = jnp.concatenate([values.reshape(-1, values.shape[-1]), first_value])
  valid = jnp.concatenate([jnp.repeat(frames_valid, keys.shape[1]), first_valid])
  return _head(query, key, value, valid=valid, plan=plan, causal=False, dropout=0.0)


def _add_keys(
  query: Float[Array, "B C"], sums: _Sums, key: Float[Array, "J C"], value: Float[Array, "J C2"],
  valid: Bool[Array, " J"] | None = None,
) -> _Sums:  # fmt: skip
  """Adds keys to the sums of a block of queries; `value` may end in a column of ones."""
  logits = einsum("ic,jc->ij", query, key, preferred_element_type=jnp.float32)
  if valid is not None:
    logits = jnp.where(valid, logits, -jnp.inf)
  # The shift cancels out and needs no gradient.
  highest = jnp.maximum(sums.top, jax.lax.stop_gradient(logits.max(axis=1, keepdims=True)))
  weights, kept = jnp.exp(logits - highest), jnp.exp(sums.top - highest)
  added = einsum(
    "ij,jc->ic", weights.astype(value.dtype), value, preferred_element_type=jnp.float32
  )
  if value.shape[1] > query.shape[1]:
    added, weight = added[:, :-1], added[:, -1:]
  else:
    weight = weights.sum(axis=1, keepdims=True)
  return _Sums(highest, sums.total * kept + weight, sums.out * kept + added)


def _with_ones(value: Float[Array, "*A J C"]) -> Float[Array, "*A J C2"]:
  return jnp.concatenate([value, jnp.ones_like(value[..., :1])], axis=-1)


def _heads_first(x: Float[Array, "A I Heads C"]) -> Float[Array, "AHeads I C"]:
  rows, tokens, heads, channels = x.shape
  return x.swapaxes(1, 2).reshape(rows * heads, tokens, channels)


def _map_heads(
  operands: dict[str, Any], *, plan: Plan, causal: bool, dropout: float
) -> Float[Array, "AHeads I C"]:
  """Processes the heads in chunks of at most `plan.head_logits` logits."""
  count, queries, channels = operands["query"].shape

  def some_heads(operands):
    head = functools.partial(_head, plan=plan, causal=causal, dropout=dropout)
    return jax.vmap(lambda operands: head(**operands))(operands)

  at_once = _divisor(count, plan.head_logits // max(1, queries * operands["key"].shape[1]))
  if at_once >= count:
    return some_heads(operands)
  steps = jax.tree.map(lambda x: x.reshape(-1, at_once, *x.shape[1:]), operands)
  return jax.lax.map(jax.checkpoint(some_heads), steps).reshape(count, queries, channels)


def _head(query, key, value, bias=None, valid=None, dropout_key=None, *, plan, causal, dropout):
  """One head: query [I, C], key and value [J, C], bias [I, Y] and [I, X], valid [J]."""
  if plan.ones and dropout_key is None:
    value = _with_ones(value)
  block = _divisor(len(query), plan.query_logits // len(key))
  if block >= len(query) or causal or dropout_key is not None:
    return _block(query, bias, key, value, valid, dropout_key, causal, dropout)
  blocks = jax.tree.map(lambda x: x.reshape(-1, block, *x.shape[1:]), (query, bias))

  @jax.checkpoint
  def chunk(operands):
    query, bias = operands
    return _block(query, bias, key, value, valid, None, causal, dropout)

  return jax.lax.map(chunk, blocks).reshape(query.shape)


def _block(query, bias, key, value, valid, dropout_key, causal, dropout):
  """As `_head`; `value` may end in a column of ones, but not with dropout."""
  logits = einsum("ic,jc->ij", query, key, preferred_element_type=jnp.float32)
  logits = logits / math.sqrt(query.shape[-1])
  if bias is not None:
    y, x = bias
    logits += (y[:, :, None] + x[:, None, :]).reshape(logits.shape)
  if valid is not None:
    logits = jnp.where(valid, logits, -jnp.inf)
  if causal:
    i, j = (jax.lax.broadcasted_iota(jnp.int32, logits.shape, axis) for axis in (0, 1))
    logits = jnp.where(i >= j, logits, -jnp.inf)
  # The shift cancels out and needs no gradient, as in jax.nn.softmax.
  weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis=1, keepdims=True)))
  summed = value.shape[1] > query.shape[1]
  total = 0 if summed else weights.sum(axis=1, keepdims=True)
  if dropout_key is not None:
    kept = jax.random.bernoulli(dropout_key, jnp.float32(1 - dropout), weights.shape)
    weights = jnp.where(kept, weights / (1 - dropout), 0)
  out = einsum("ij,jc->ic", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
  if summed:
    out, total = out[:, :-1], out[:, -1:]
  return (out / total).astype(value.dtype)  # divides C columns instead of J


def _divisor(number: int, limit: int) -> int:
  """The largest divisor of `number` that is at most `limit`; at least 1."""
  return next(d for d in range(max(1, min(number, limit)), 0, -1) if number % d == 0)
