"""Shared layers against their formulas."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf
from support import assert_close, normal

from sam3_jax.model.layers import Attention, Mlp, gelu
from sam3_jax.model.neck import Linear, doubled
from sam3_jax.model.norms import LayerNorm


def test_gelu():
  x = np.linspace(-8, 8, 4001, dtype=np.float32)
  want = np.float64(x) * 0.5 * (1 + erf(np.float64(x) / math.sqrt(2)))
  assert_close(gelu(jnp.asarray(x)), want, rel=8e-7)  # measured 8.7e-8
  assert gelu(jnp.ones(2, jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dense_accumulates_in_float32(dtype):
  """In bfloat16, 256 + 1 is 256, so a bfloat16 sum would stop growing there."""
  x = jnp.ones((1, 1000), dtype)
  params = {"fc1": {"kernel": jnp.ones((1000, 2)), "bias": jnp.zeros(2)}}
  out = Mlp((2,), dtype).apply({"params": params}, x)
  assert out.dtype == dtype
  assert out.tolist() == [[1000, 1000]]


@pytest.mark.parametrize(("offset", "measured"), [(0.0, 1.0e-7), (1000.0, 4.5e-5)])
def test_layer_norm(offset, measured):
  """With a large offset, statistics computed in a single pass would lose all precision."""
  x = normal(0, 3, 16) + offset
  wide = np.float64(x)
  deviation = np.sqrt(wide.var(axis=-1, keepdims=True) + 1e-5)
  want = (wide - wide.mean(axis=-1, keepdims=True)) / deviation
  params = {"scale": jnp.ones(16), "bias": jnp.zeros(16)}
  assert_close(LayerNorm().apply({"params": params}, x), want, rel=10 * measured)


def test_mlp():
  x, kernels = normal(0, 5, 3), [normal(1, 3, 4), normal(2, 4, 6), normal(3, 6, 2)]
  biases = [normal(i, kernel.shape[1]) for i, kernel in enumerate(kernels)]
  layers = zip(kernels, biases, strict=True)
  params = {f"fc{i}": {"kernel": k, "bias": b} for i, (k, b) in enumerate(layers, start=1)}
  want = np.float64(x)
  for i, (kernel, bias) in enumerate(zip(kernels, biases, strict=True)):
    want = want @ np.float64(kernel) + np.float64(bias)
    want = np.maximum(want, 0) if i < 2 else want
  assert_close(Mlp((4, 6, 2)).apply({"params": params}, x), want, rel=1e-6)  # measured 1.1e-7


def test_transposed_convolution():
  """Each cell is multiplied by the four matrices of the kernel."""
  x, kernel, bias = normal(0, 2, 3, 4, 5), normal(1, 2, 2, 5, 6), normal(2, 6)
  want = np.zeros((2, 6, 8, 6))
  for y, x_, i, j in np.ndindex(3, 4, 2, 2):
    want[:, 2 * y + i, 2 * x_ + j] = np.float64(x[:, y, x_]) @ np.float64(kernel[i, j]) + bias
  assert_close(doubled(x, Linear(kernel, bias)), want, rel=6e-7)  # 6.7e-8


@pytest.mark.parametrize("rows", [(3, 3), (1, 3), (3, 1)], ids=str)
def test_attention_with_inner_width_and_broadcasting(rows):
  """Against the formula in float64, also with a single row of queries or keys."""
  width, heads, inner = 6, 2, 4
  query, keys, values = (
    normal(0, rows[0], 5, width),
    *(normal(i, rows[1], 7, width) for i in (1, 2)),
  )
  names = {"query": (width, inner), "key": (width, inner), "value": (width, inner)}
  params = {
    name: {"kernel": normal(9 + i, *shape), "bias": normal(19 + i, shape[1])}
    for i, (name, shape) in enumerate((names | {"out": (inner, width)}).items())
  }

  def project(x, name):
    return np.float64(x) @ np.float64(params[name]["kernel"]) + np.float64(params[name]["bias"])

  parts = [
    np.broadcast_to(project(x, name), (3, x.shape[1], inner)).reshape(3, -1, heads, inner // heads)
    for x, name in ((query, "query"), (keys, "key"), (values, "value"))
  ]
  logits = np.einsum("aihc,ajhc->ahij", *parts[:2]) / math.sqrt(inner // heads)
  weights = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
  mixed = np.einsum("ahij,ajhc->aihc", weights, parts[2]).reshape(3, 5, inner)
  got = Attention(heads, inner=inner).apply({"params": params}, query, keys, values)
  assert_close(got, project(mixed, "out"), rel=2e-6)  # measured 2.0e-7
