"""A training step has the same dtypes in JAX's other modes."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training_model

from sam3_jax.training import sharding, state
from sam3_jax.training.losses import LossConfig
from sam3_jax.training.optimizer import OptimizerConfig, make_optimizer, make_schedule
from sam3_jax.training.step import StepSettings, make_step


def traced(objective, optimizer, accumulate):
  """Shapes of the state before and after a step, and of its metrics."""
  values = training_model.parameters() | (
    training_model.visual_parameters() if objective == "visual" else {}
  )
  shapes = {path: jax.ShapeDtypeStruct(x.shape, np.float32) for path, x in values.items()}
  trained, frozen = state.split(shapes, "visual/.*" if objective == "visual" else ".*")
  config = OptimizerConfig(name=optimizer)
  moves = make_optimizer(config, trained, training_model.CONFIG.trunk, 10)
  before = jax.eval_shape(lambda x: state.create(x, moves, jax.random.key(0), ema=True), trained)
  step_settings = StepSettings(
    model=training_model.CONFIG,
    losses=LossConfig(),
    objective=objective,
    gradient_accumulation_steps=accumulate,
    ema_decay=0.9,
  )
  mesh, schedule = sharding.make_mesh(jax.devices()[:1]), make_schedule(config, 10)
  step = make_step(step_settings, moves, schedule, mesh, before, frozen)
  batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), training_model.batch(0))
  return before, *jax.eval_shape(step, before, frozen, batch)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("objective", "optimizer", "accumulate"),
  [("detection", "adamw", 1), ("dense", "muon", 2), ("visual", "adamw", 1)],
)
def test_step_in_64_bit_mode_with_strict_promotion(objective, optimizer, accumulate):
  training_model.parameters()  # made in the default mode
  training_model.visual_parameters()
  with contextlib.ExitStack() as modes:
    modes.enter_context(jax.enable_x64(True))
    modes.enter_context(jax.numpy_dtype_promotion("strict"))
    before, after, metrics = traced(objective, optimizer, accumulate)
  assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, before)
  floats = {x.dtype for x in metrics.values() if jnp.issubdtype(x.dtype, jnp.floating)}
  assert floats == {np.dtype(np.float32)}
