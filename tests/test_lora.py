"""Low-rank adaptation: initial factors, merging and gradients."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_model import parameters
from support import QUICK, assert_close, difference, normal, run

from sam3_jax.training.lora import LoraConfig, adapt, adapted_kernels, merge
from sam3_jax.training.optimizer import stacked_axes
from sam3_jax.utils.param_tree import flatten, nest

KEY = jax.random.key(0)


@functools.cache
def model():
  return flatten(parameters())


def factors_of(config):
  return jax.jit(lambda: adapt(model(), config, KEY), compiler_options=QUICK)()


def test_attention_and_mlp_kernels_are_adapted():
  found = adapted_kernels(model(), LoraConfig(rank=2))
  # Per block: 4 of attention, 2 of MLP; geometry and fusion have two attentions, the decoder three.
  blocks = {"trunk/groups/windowed/": 6, "trunk/groups/global/": 6, "text/blocks/": 6}
  blocks |= {"geometry/layers/": 10, "fusion/layers/": 10, "decoder/layers/": 14}
  blocks |= {"masks/prompt_attn/": 4, "scoring/prompt_mlp/": 2}
  assert {p: sum(f.startswith(p) for f in found) for p in blocks} == blocks
  assert len(found) == sum(blocks.values())


@pytest.mark.slow
def test_factors_have_the_kernels_leading_axes():
  config = LoraConfig(rank=3)
  factors = jax.device_get(factors_of(config))
  assert len(factors) == 2 * len(adapted_kernels(model(), config))
  for path in adapted_kernels(model(), config):
    *stack, inputs, outputs = model()[path].shape
    assert len(stack) == stacked_axes(path)
    name = path.removesuffix("kernel")
    a, b = factors[f"{name}lora_a"], factors[f"{name}lora_b"]
    assert a.shape == (*stack, inputs, 3)
    assert b.shape == (*stack, 3, outputs)
    assert a.dtype == b.dtype == jnp.float32
    assert not b.any()
    assert 0 < np.abs(a).max() <= 1 / np.sqrt(inputs)
  draws = [np.ravel(a)[:6].tobytes() for path, a in factors.items() if path.endswith("lora_a")]
  assert len(set(draws)) == len(draws)  # all different


@pytest.mark.slow
def test_initial_factors_change_nothing():
  """Bit for bit, through the model."""
  merged = jax.jit(functools.partial(merge, scale=2.0))(model() | factors_of(LoraConfig(rank=2)))
  assert merged.keys() == model().keys()
  for path, array in model().items():
    np.testing.assert_array_equal(merged[path], array)
  tokens = jnp.array([[49406, 320, 49407] + [0] * 29])
  plain, adapted = (run("encode_text", tokens, params=p) for p in (parameters(), nest(merged)))
  np.testing.assert_array_equal(adapted.features, plain.features)


@pytest.mark.parametrize("rank", [1, 4])
def test_merging_adds_the_product_of_each_layer(rank):
  path = "trunk/groups/windowed/attn/query/"
  kernel = np.asarray(model()[f"{path}kernel"])
  a, b = normal(1, *kernel.shape[:-1], rank), normal(2, *kernel.shape[:-2], rank, kernel.shape[-1])
  merged = merge(model() | {f"{path}lora_a": a, f"{path}lora_b": b}, scale=0.5)
  for g in range(kernel.shape[0]):
    for n in range(kernel.shape[1]):
      want = kernel[g, n] + 0.5 * np.asarray(a[g, n], np.float64) @ np.asarray(b[g, n], np.float64)
      got = merged[f"{path}kernel"][g, n]
      assert difference(got, want) <= 1e-6  # measured 1.3e-7
  others = [other for other in model() if other != f"{path}kernel"]
  assert all(merged[other] is model()[other] for other in others)


def test_gradients_of_the_factors():
  """d/dA = scale * G B', d/dB = scale * A' G, where G is the kernel's gradient."""
  path = "text/blocks/mlp/fc1/"
  kernel = model()[f"{path}kernel"]
  factors = {
    f"{path}lora_a": normal(1, *kernel.shape[:-1], 2),
    f"{path}lora_b": normal(2, kernel.shape[0], 2, kernel.shape[2]),
  }
  weight = normal(3, *kernel.shape)
  got = jax.grad(lambda f: jnp.sum(merge(model() | f, 0.25)[f"{path}kernel"] * weight))(factors)
  a, b, g = (np.asarray(x, np.float64) for x in (*factors.values(), weight))
  want = {
    f"{path}lora_a": 0.25 * g @ b.swapaxes(1, 2),
    f"{path}lora_b": 0.25 * a.swapaxes(1, 2) @ g,
  }
  assert_close(got, want, rel=2e-6)  # measured 2.1e-7


def test_kernels_keep_their_dtype():
  path = "masks/prompt_attn/out/"
  tree = {f"{path}kernel": jnp.zeros((2, 2), jnp.bfloat16)}
  tree |= {f"{path}lora_a": jnp.ones((2, 1)), f"{path}lora_b": jnp.ones((1, 2))}
  merged = merge(tree, 1.0)[f"{path}kernel"]
  assert merged.dtype == jnp.bfloat16
  assert (merged == 1).all()


def test_rank_0_has_no_factors():
  assert adapt(model(), LoraConfig(), KEY) == {}
  assert merge(model(), 1.0) == model()


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({"rank": -1}, "lora.rank must be 0 (no adaptation) or more; got -1."),
    ({"scale": float("nan")}, "lora.scale must be a finite number; got nan."),
    ({"scale": float("-inf")}, "lora.scale must be a finite number; got -inf."),
    ({"kernels": "["}, "lora.kernels: '[' is not a regular expression"),
  ],
)
def test_invalid_values_are_refused(values, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    LoraConfig(**values)


@pytest.mark.parametrize("pattern", ["nothing", "masks/conv0/kernel", "decoder/norm/scale"])
def test_patterns_without_a_dense_kernel_are_refused(pattern):
  with pytest.raises(ValueError, match=f"lora.kernels '{pattern}' matches no dense kernel"):
    adapt(model(), LoraConfig(rank=1, kernels=pattern), KEY)
