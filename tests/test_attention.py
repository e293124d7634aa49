"""Attention against NumPy in float64: all at once, in chunks of heads, in chunks of queries."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax
from support import assert_close, normal

import sam3_jax.ops.attention
from sam3_jax.ops.attention import attention, attention_to_frames

ROWS, QUERIES, KEYS, HEADS, CHANNELS = 3, 6, 10, 4, 8


def tensors(queries=QUERIES, keys=KEYS, rows=ROWS):
  shapes = [(rows, n, HEADS, CHANNELS) for n in (queries, keys, keys)]
  return [normal(i, *shape) for i, shape in enumerate(shapes)]


def plain_attention(query, key, value, bias=None, valid=None, causal=False):
  logits = np.einsum("aihc,ajhc->ahij", np.float64(query), key) / math.sqrt(query.shape[-1])
  if bias is not None:
    y, x = (np.float64(part) for part in bias)
    logits = logits + (y[..., :, None] + x[..., None, :]).reshape(logits.shape)
  if valid is not None:
    logits = np.where(np.asarray(valid)[:, None, None], logits, -np.inf)
  if causal:
    logits = np.where(
      np.arange(logits.shape[3]) > np.arange(logits.shape[2])[:, None], -np.inf, logits
    )
  return np.einsum("ahij,ajhc->aihc", softmax(logits, axis=-1), np.float64(value))


def options(names, queries=QUERIES, keys=KEYS):
  valid = jnp.asarray(np.arange(keys) % 3 != 1) & (jnp.arange(keys) < 1 + jnp.arange(4, 7)[:, None])
  bias = [normal(seed, ROWS, HEADS, queries, cells) for seed, cells in ((9, 2), (10, keys // 2))]
  every = {"bias": tuple(bias), "valid": valid, "causal": True}
  return {name: every[name] for name in names}


# All logits at once; one head per chunk; chunks of the queries of each head.
LIMITS = (10**9, QUERIES * KEYS, 3 * KEYS)
CHOICES = ((), ("bias", "valid"), ("causal",), ("valid", "causal"))


def plan(monkeypatch, limit, ones=False):
  """Sets the plan for this machine; `ones` is used on TPUs."""
  chosen = sam3_jax.ops.attention.Plan(limit, limit, ones)
  monkeypatch.setattr(sam3_jax.ops.attention, "CPU", {"float32": chosen})
  monkeypatch.setattr(sam3_jax.ops.attention, "OTHERS", chosen)


@pytest.mark.slow
@pytest.mark.parametrize("ones", [False, True], ids=["sums", "ones"])
@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("names", CHOICES, ids="+".join)
def test_attention(monkeypatch, names, limit, ones):
  plan(monkeypatch, limit, ones)
  got = jax.jit(lambda *x: attention(*x, **options(names)))(*tensors())
  assert_close(got, plain_attention(*tensors(), **options(names)), rel=1e-6)  # measured 1.8e-7


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 7), (7, 1), (0, 3)])
def test_zero_or_one_token(queries, keys):
  x = tensors(queries, keys)
  assert_close(attention(*x), plain_attention(*x), rel=1e-6)  # measured 1.0e-7


def test_empty_batch():
  assert attention(*tensors(rows=0)).shape == (0, QUERIES, HEADS, CHANNELS)


@pytest.mark.slow
@pytest.mark.parametrize("ones", [False, True], ids=["sums", "ones"])
@pytest.mark.parametrize("limit", [QUERIES * KEYS, 3 * KEYS])
@pytest.mark.parametrize("names", [("bias", "valid"), ("causal",)], ids="+".join)
def test_gradients_in_chunks(monkeypatch, names, limit, ones):
  """The backward pass recomputes the logits of each chunk."""
  weights = normal(5, ROWS, QUERIES, HEADS, CHANNELS)
  static = {name: x for name, x in options(names).items() if name != "bias"}
  bias = {name: x for name, x in options(names).items() if name == "bias"}

  def gradients():  # a new function each time, so that jit does not reuse the other plan
    total = lambda x, bias: (weights * attention(*x, **static, **bias)).sum()  # noqa: E731
    return jax.jit(jax.grad(total, (0, 1)))(tensors(), bias)

  want = gradients()
  plan(monkeypatch, limit, ones)
  assert_close(gradients(), want, rel=8e-7)  # measured 8.1e-8


@pytest.mark.slow
def test_dropout(monkeypatch):
  """Each weight is independently dropped at the rate, or else divided by 1 - rate."""
  query, key, _ = tensors(QUERIES, CHANNELS)
  value = jnp.broadcast_to(jnp.eye(CHANNELS)[:, None], (ROWS, CHANNELS, HEADS, CHANNELS))
  weights = np.asarray(attention(query, key, value))  # with this value, the weights themselves

  def dropped(key_):
    return attention(query, key, value, dropout=0.25, dropout_key=key_)

  keys = jax.random.split(jax.random.key(0), 300)
  some = np.asarray(jax.jit(lambda keys: jax.lax.map(dropped, keys))(keys))
  kept = some > 0
  want = np.where(kept, weights / 0.75, 0)
  assert_close(some, want, rel=1e-6)  # measured 1.3e-7
  assert abs(kept.mean() - 0.75) < 0.003
  assert 0.5 < kept.mean(0).min() <= kept.mean(0).max() < 0.95
  assert_close(attention(query, key, value, dropout=0.25), weights, rel=0)  # no key, no dropout

  # Each head has its own key: the result does not depend on the chunks.
  plan(monkeypatch, QUERIES * CHANNELS, ones=True)
  assert_close(dropped(keys[0]), want[0], rel=1e-6)  # measured 1.3e-7


def test_bfloat16():
  x = [t.astype(jnp.bfloat16) for t in tensors()]
  got, want = attention(*x), plain_attention(*(np.asarray(t, np.float64) for t in x))
  assert got.dtype == jnp.bfloat16
  assert_close(got, want, rel=2e-2)  # measured 4.2e-3


@pytest.mark.parametrize("ones", [False, True], ids=["sums", "ones"])
@pytest.mark.parametrize("limit", [10**9, 6 * 5, 2 * 5], ids=["at once", "frames", "blocks"])
def test_attention_to_frames(monkeypatch, limit, ones):
  """All frames at once, one by one, and one by one in blocks of queries; some are not valid."""
  plan(monkeypatch, limit, ones)
  query, keys, values = normal(0, 6, 8), normal(1, 3, 5, 8), normal(2, 3, 5, 8)
  key, value = normal(3, 4, 8), normal(4, 4, 8)

  def run(query, frames_valid, first_valid):
    first, frames = (key, value, first_valid), (keys, values, frames_valid)
    return attention_to_frames(query, first, frames)

  def plain(query, frames_valid, first_valid):
    every = [jnp.concatenate([x.reshape(-1, 8), y]) for x, y in ((keys, key), (values, value))]
    valid = jnp.concatenate([jnp.repeat(frames_valid, 5), first_valid])
    logits = jnp.where(valid, query @ every[0].T / math.sqrt(8), -jnp.inf)
    return jax.nn.softmax(logits) @ every[1]

  none, some = jnp.zeros(4, bool), jnp.arange(4) % 2 == 0
  for valid in ((True, False, True), (False, True, False), (False, False, False)):
    for tokens in (some, none)[: 2 if any(valid) else 1]:
      args = query, jnp.array(valid), tokens
      assert_close(jax.jit(run)(*args), plain(*args), rel=1e-6)
      got, want = (jax.grad(lambda q, f=f, a=args: (f(q, *a[1:]) ** 2).sum())(query)
                   for f in (run, plain))  # fmt: skip
      assert_close(got, want, rel=1e-5)
