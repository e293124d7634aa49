"""Traces every program with 64-bit mode and strict dtype promotion: each product requests the
precision of its dtype, and no array has 64 bits."""

import jax
import numpy as np
import programs
import pytest
import training_model
from jax.lax import Precision

from sam3_jax.ops.precision import precision_of

EXACT = (Precision.HIGHEST, Precision.HIGHEST)
PRODUCTS = ("dot_general", "conv_general_dilated")


def imprecise(name, traced):
  """Yields the products that do not request the precision of their dtype."""
  products = [x for x in programs.equations(traced.jaxpr.jaxpr) if x.primitive.name in PRODUCTS]
  assert products, name
  for product in products:
    operands = [x.aval.dtype.name for x in product.invars]
    wanted = EXACT if operands == ["float32", "float32"] else None
    if product.params["precision"] != wanted:
      yield f"{name}: {product.source_info.name_stack} {operands} {product.params['precision']}"


def wide(name, traced):
  """Yields arrays with 64 bits, except scalars, which may be counters of JAX's loops."""
  for equation in programs.equations(traced.jaxpr.jaxpr):
    for x in equation.outvars:
      if x.aval.shape and getattr(x.aval.dtype, "itemsize", 4) == 8:
        yield f"{name}: {equation.primitive} {equation.source_info.name_stack} {x.aval}"


@pytest.mark.slow
@pytest.mark.parametrize(
  ("kind", "dtype"),
  [("toy", "float32"), ("toy", "bfloat16"), ("parts", "float32"), ("mesh", "bfloat16")],
)
def test_inference_programs(kind, dtype):
  wrong = []
  with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
    if kind == "mesh":
      traces = programs.sharded(training_model.CONFIG, dtype)
    else:
      traces = programs.inference(programs.CONFIGS[kind], dtype)
    for name, traced in traces:
      wrong += [*imprecise(name, traced), *wide(name, traced)]
  assert not wrong, "\n".join(wrong)


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "dtype"), [("visual", "bfloat16"), ("dense", "float32")])
def test_training_step(objective, dtype):
  """Includes the products of gradients. Detection is left out, as it takes long."""
  wrong = [*imprecise(objective, programs.training(objective, dtype))]
  assert not wrong, "\n".join(wrong)


def test_precision_of():
  assert precision_of("float32") == precision_of("float32", np.float32) == Precision.HIGHEST
  assert precision_of("float32", "bfloat16") is precision_of("bfloat16") is None
