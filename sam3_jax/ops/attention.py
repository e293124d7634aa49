"""Attention that never holds the logits of all heads and queries at once.

The logits of the released trunk's global blocks would take 1.7 GB in float32. So heads, and where
needed queries, are walked in steps of as many logits as the platform's `Plan` has room for: they
stay in a TPU's VMEM and near a CPU's caches, and the backward pass computes them again instead of
keeping them.
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
  """How attention is computed.

  Attributes:
    heads: logits that there are at most at a time, of whole heads.
    queries: the same of a head whose queries come in blocks.
    ones: whether a column of ones beside the values has the product add up the weights too.
  """

  heads: int
  queries: int
  ones: bool


# 16 MB of logits: 12 windows' heads of the released trunk, or 648 queries of a global block. One
# column more costs as much as the sums in float32; in bfloat16 products cost half, sums the same.
CPU = {"float32": Plan(2**22, 2**22, ones=False), "bfloat16": Plan(2**22, 2**22, ones=True)}
# 64 MB, 48 windows' heads, or 8 of the decoder's: 67 MB, for 16 of those, leave VMEM. And 32 MB,
# 1296 queries: a v6e takes longer for 2592. Its matrix units have nothing better to do than sums.
OTHERS = Plan(16_000_000, 2**23, ones=True)


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
    bias: added to the scaled logits; the keys are the cells of a grid of Y rows and X columns, and
      these are what a row and what a column adds: 1 / 36 of the whole at 72 x 72.
    valid: False on keys that no query may attend to; every row needs a True.
    causal: query i attends to keys 0 .. i only.
    dropout: rate at which attention weights are dropped; needs `dropout_key`.
    dropout_key: randomness of the dropout; None for none.
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
    functools.partial(_walk, plan=plan, causal=causal, dropout=dropout) for plan in plans
  )
  out = platform_dependent(operands, cpu=on_cpu, default=elsewhere)
  return out.reshape(rows, heads, queries, channels).swapaxes(1, 2)


def _heads_first(x: Float[Array, "A I Heads C"]) -> Float[Array, "AHeads I C"]:
  rows, tokens, heads, channels = x.shape
  return x.swapaxes(1, 2).reshape(rows * heads, tokens, channels)


def _walk(
  operands: dict[str, Any], *, plan: Plan, causal: bool, dropout: float
) -> Float[Array, "AHeads I C"]:
  """As many heads at a time as the plan has room for."""
  count, queries, channels = operands["query"].shape

  def some_heads(operands):
    head = functools.partial(_head, plan=plan, causal=causal, dropout=dropout)
    return jax.vmap(lambda one: head(**one))(operands)

  at_once = _divisor(count, plan.heads // max(1, queries * operands["key"].shape[1]))
  if at_once >= count:
    return some_heads(operands)
  steps = jax.tree.map(lambda x: x.reshape(-1, at_once, *x.shape[1:]), operands)
  return jax.lax.map(jax.checkpoint(some_heads), steps).reshape(count, queries, channels)


def _head(query, key, value, bias=None, valid=None, dropout_key=None, *, plan, causal, dropout):
  """One head: query [I, C], key and value [J, C], bias [I, Y] and [I, X], valid [J]."""
  if plan.ones and dropout_key is None:
    value = jnp.concatenate([value, jnp.ones_like(value[:, :1])], axis=1)
  block = _divisor(len(query), plan.queries // len(key))
  if block >= len(query) or causal or dropout_key is not None:
    return _block(query, bias, key, value, valid, dropout_key, causal, dropout)
  blocks = jax.tree.map(lambda x: x.reshape(-1, block, *x.shape[1:]), (query, bias))

  @jax.checkpoint
  def one(part):
    query, bias = part
    return _block(query, bias, key, value, valid, None, causal, dropout)

  return jax.lax.map(one, blocks).reshape(query.shape)


def _block(query, bias, key, value, valid, dropout_key, causal, dropout):
  """As `_head`; `value` may have a column of ones more, and never has with dropout."""
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
  # As in jax.nn.softmax, the shift cancels out and needs no gradient.
  weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis=1, keepdims=True)))
  summed = value.shape[1] > query.shape[1]
  total = 0 if summed else weights.sum(axis=1, keepdims=True)
  if dropout_key is not None:
    kept = jax.random.bernoulli(dropout_key, jnp.float32(1 - dropout), weights.shape)
    weights = jnp.where(kept, weights / (1 - dropout), 0)
  out = einsum("ij,jc->ic", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
  if summed:
    out, total = out[:, :-1], out[:, -1:]
  return (out / total).astype(value.dtype)  # the softmax's division, on C columns instead of J


def _divisor(number: int, limit: int) -> int:
  """The largest divisor of `number` that is at most `limit`, and at least 1."""
  return next(d for d in range(max(1, min(number, limit)), 0, -1) if number % d == 0)
