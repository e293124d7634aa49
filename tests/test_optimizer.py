"""The optimizer: steps of PyTorch's AdamW, learning rates and decays by part, schedules, Muon."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_model import CONFIG, parameters
from support import difference

from sam3_jax.config import RELEASED, TrunkConfig
from sam3_jax.training.optimizer import (
  OptimizerConfig,
  is_decayed,
  learning_rate_factor,
  make_optimizer,
  make_schedule,
  stacked_axes,
)
from sam3_jax.utils.param_tree import flatten

# Two groups of a windowed and a global block: ids 1, 2 and 3, 4 of 5.
TRUNK = TrunkConfig(width=64, heads=4, mlp_width=64, groups=2, windowed=1)
SHAPES = {
  "trunk/groups/windowed/attn/query/kernel": (2, 1, 2, 2),
  "trunk/groups/global/norm1/scale": (2, 3),
  "trunk/patch_embed/kernel": (1, 1, 2, 2),
  "trunk/position": (2, 2),
  "masks/norm0/scale": (3,),
  "masks/norm0/bias": (3,),
  "text/token_embedding/embedding": (2, 2),
  "decoder/query_embedding": (2, 2),
}
# torch 2.14.1: clip_grad_norm_(0.1) and AdamW(betas=(0.9, 0.999), eps=1e-8) for four steps, with a
# parameter group for each (stacked: for each layer), its rate 0.5 * factor * schedule and its
# weight decay, 0.1 or 0; factors 0.3125 * 0.9^(5 - id) in the trunk, 0.3125 of the positions,
# 0.0625 of the text, 1 of the others.
TORCH = {
  "trunk/groups/windowed/attn/query/kernel": [
    0.2518737,
    -0.1220746,
    0.6056403,
    -0.001261065,
    -0.3657593,
    0.1870319,
    1.10523,
    0.8817657,
  ],
  "trunk/groups/global/norm1/scale": [
    -0.8370432,
    -1.262905,
    -0.7808767,
    -0.123582,
    -2.513658,
    -0.4199173,
  ],
  "trunk/patch_embed/kernel": [-1.305923, -0.5824472, -0.440273, -0.322822],
  "trunk/position": [0.6362487, 0.7813511, -0.1643191, 1.343075],
  "masks/norm0/scale": [0.0885644, 0.6615551, 0.8133289],
  "masks/norm0/bias": [0.09596644, -1.28864, -0.9623478],
  "text/token_embedding/embedding": [-0.5011741, 0.2005497, -1.003546, -0.2509946],
  "decoder/query_embedding": [-0.6569517, 0.8507051, -0.01058713, -0.3377093],
}


def start_and_gradients():
  rng = np.random.default_rng(0)

  def draw(scale):
    return {
      path: (rng.standard_normal(shape) * scale).astype(np.float32)
      for path, shape in SHAPES.items()
    }

  return draw(1.0), [draw(scale) for scale in (1.0, 1e-3, 0.3, 0.1)]


def run(config, trunk, parameters, gradients):
  optimizer = make_optimizer(config, parameters, trunk, len(gradients))
  state = optimizer.init(parameters)
  for gradient in gradients:
    updates, state = optimizer.update(gradient, state, parameters)
    parameters = optax.apply_updates(parameters, updates)
  return parameters


@pytest.mark.slow
def test_first_steps_equal_torch():
  """Clipping, moments, weight decay, learning rate factors and the schedule."""
  config = OptimizerConfig(learning_rate=0.5, warmup_steps=2, timescale=4, cooldown_steps=2)
  start, gradients = start_and_gradients()
  moved = run(config, TRUNK, start, gradients)
  assert moved.keys() == TORCH.keys()
  for path, want in TORCH.items():
    off = difference(np.ravel(moved[path]), want)
    assert off <= 5e-5, f"{path}: {off:.1e}"  # measured 5.4e-6 (1 - 0.999 in float32)
    assert difference(start[path].ravel(), want) > 1e-3, f"{path} has hardly moved"


@pytest.mark.parametrize(
  ("schedule", "step", "rate"),
  [
    ("inverse_sqrt", 0, 0.0),
    ("inverse_sqrt", 5, 0.5),
    ("inverse_sqrt", 10, 1.0),
    ("inverse_sqrt", 11, 1 / math.sqrt(31 / 30)),
    ("inverse_sqrt", 70, 1 / math.sqrt(90 / 30)),
    ("inverse_sqrt", 95, 5 / 20 / math.sqrt(115 / 30)),
    ("inverse_sqrt", 100, 0.0),
    ("constant", 5, 0.5),
    ("constant", 50, 1.0),
    ("constant", 90, 0.5),
    ("cosine", 5, 0.5),
    ("cosine", 10, 1.0),
    ("cosine", 55, 0.55),
    ("cosine", 100, 0.1),
  ],
)
def test_schedules(schedule, step, rate):
  config = OptimizerConfig(
    learning_rate=1.0,
    schedule=schedule,
    warmup_steps=10,
    timescale=30,
    cooldown_steps=20,
    min_learning_rate_ratio=0.1,
  )
  # Measured 3e-8.
  assert float(make_schedule(config, 100)(step)) == pytest.approx(rate, abs=3e-7)


def test_schedules_without_warmup_and_cooldown():
  for schedule in ("inverse_sqrt", "cosine", "constant"):
    config = OptimizerConfig(learning_rate=0.5, schedule=schedule, warmup_steps=0, cooldown_steps=0)
    rates = [float(make_schedule(config, 1)(step)) for step in (0, 1)]
    assert rates[0] == 0.5
    assert np.isfinite(rates).all()


def factor(path, ndim=1, config=None):
  return learning_rate_factor(path, ndim, config or OptimizerConfig(), RELEASED.trunk)


def test_learning_rate_factors_of_the_released_model():
  """Meta's: vision 2.5e-4, text 5e-5, rest 8e-4; 0.9^(33 - id) on the trunk but its positions."""
  assert factor("trunk/patch_embed/kernel") == pytest.approx(2.5 / 8 * 0.9**33)
  assert factor("trunk/norm_pre/bias") == pytest.approx(2.5 / 8 * 0.9**33)
  assert factor("trunk/position") == pytest.approx(2.5 / 8)
  assert factor("neck/level0/up1/kernel") == pytest.approx(2.5 / 8)
  assert factor("text/project/bias") == pytest.approx(0.5 / 8)
  assert factor("decoder/query_embedding") == 1
  windowed, whole = (
    factor(f"trunk/groups/{kind}/mlp/fc1/kernel", ndim)
    for kind, ndim in (("windowed", 4), ("global", 3))
  )
  assert windowed.shape == (4, 7, 1, 1)
  assert whole.shape == (4, 1, 1)
  for block in range(32):
    group, index = divmod(block, 8)
    found = whole[group] if index == 7 else windowed[group, index]
    assert found.item() == pytest.approx(
      2.5 / 8 * 0.9 ** (33 - (block + 1))
    )  # block i has id i + 1


def test_first_matching_multiplier_is_used():
  learning_rate_multipliers = ((r"trunk/norm_pre/.*", 0.0), (r"trunk/.*", 0.5), (r"trunk/.*", 7.0))
  config = OptimizerConfig(learning_rate_multipliers=learning_rate_multipliers, layer_decay=1.0)
  assert factor("trunk/norm_pre/scale", config=config) == 0
  assert factor("trunk/position", config=config) == 0.5
  assert factor("text/position", config=config) == 1
  assert factor("a/trunk/position", config=config) == 1  # the whole path


def test_no_weight_decay_of_biases_and_layer_norms():
  left_out = {path for path in flatten(parameters()) if not is_decayed(path)}
  # Every norm of the model is a LayerNorm but the two of the mask head's convolutions.
  norms = {path for path in flatten(parameters()) if path.endswith("/scale")}
  group_norms = {"masks/norm0/scale", "masks/norm1/scale"}
  biases = {path for path in flatten(parameters()) if path.endswith("/bias")}
  assert left_out == biases | (norms - group_norms)
  assert is_decayed("decoder/box_bias/x/fc1/kernel")  # its name holds "bias", in Meta's it does not
  assert is_decayed("trunk/groups/global/attn/query/lora_a")


def test_stacked_axes():
  layers = {
    "trunk/groups/windowed/": (2, 1), "trunk/groups/global/": (2,), "text/blocks/": (2,),
    "geometry/layers/": (2,), "fusion/layers/": (2,), "decoder/layers/": (3,),
  }  # fmt: skip
  for path, array in flatten(parameters()).items():
    lead = next((axes for prefix, axes in layers.items() if path.startswith(prefix)), ())
    assert stacked_axes(path) == len(lead), path
    assert array.shape[: len(lead)] == lead, path


def orthogonal_factor(update):
  """The smallest and largest singular value, divided by 0.2 sqrt(longer side)."""
  values = np.linalg.svd(update, compute_uv=False) / (0.2 * math.sqrt(max(update.shape)))
  return values.min(), values.max()


@pytest.mark.slow
def test_muon_orthogonalizes_each_hidden_matrix():
  """Newton-Schulz's five steps leave singular values between 0.5 and 1.5, layer by layer; what is
  no hidden kernel is moved by Adam."""
  rng = np.random.default_rng(0)
  shapes = {
    "trunk/groups/windowed/mlp/fc1/kernel": (2, 1, 16, 40),
    "neck/level0/up1/kernel": (2, 2, 12, 6),
    "masks/conv0/kernel": (3, 3, 5, 7),
    "decoder/box_head/fc3/kernel": (16, 4),
    "decoder/norm/scale": (8,),
  }
  start = {path: np.zeros(shape, np.float32) for path, shape in shapes.items()}
  gradient = {path: rng.standard_normal(s).astype(np.float32) for path, s in shapes.items()}
  plain = {
    "learning_rate": 1.0, "learning_rate_multipliers": (), "layer_decay": 1.0, "weight_decay": 0.0,
    "max_grad_norm": 0.0, "schedule": "constant", "warmup_steps": 0, "cooldown_steps": 0,
  }  # fmt: skip
  moved, adam = (
    run(OptimizerConfig(name=name, **plain), TRUNK, start, [gradient]) for name in ("muon", "adamw")
  )
  ours = {path: np.asarray(array) for path, array in moved.items()}
  up = ours["neck/level0/up1/kernel"].transpose(2, 0, 1, 3).reshape(12, 24)
  matrices = [
    *ours["trunk/groups/windowed/mlp/fc1/kernel"].reshape(2, 16, 40),
    up,
    ours["masks/conv0/kernel"].reshape(45, 7),
  ]
  for matrix in matrices:
    low, high = orthogonal_factor(matrix)
    assert 0.5 < low <= high < 1.5
  for path in ("decoder/box_head/fc3/kernel", "decoder/norm/scale"):
    np.testing.assert_array_equal(ours[path], adam[path])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_updates_of_every_parameter(name):
  """The whole parameter tree is accepted; checked with shapes."""
  shapes = {
    path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in flatten(parameters()).items()
  }
  optimizer = make_optimizer(OptimizerConfig(name=name), shapes, CONFIG.trunk, 10)

  def step(parameters):
    gradients = jax.tree.map(jnp.ones_like, parameters)
    return optimizer.update(gradients, optimizer.init(parameters), parameters)[0]

  updates = jax.eval_shape(step, shapes)
  assert {path: x.shape for path, x in updates.items()} == {p: x.shape for p, x in shapes.items()}


def test_without_gradient_clipping():
  plain = {
    "schedule": "constant",
    "warmup_steps": 0,
    "cooldown_steps": 0,
    "epsilon": 1.0,
  }  # size then matters
  start = {"decoder/query_embedding": np.zeros((1, 2), np.float32)}
  gradient = {"decoder/query_embedding": np.array([[3.0, 4.0]], np.float32)}
  clipped, whole = (
    run(OptimizerConfig(max_grad_norm=clip, **plain), TRUNK, start, [gradient])
    for clip in (0.1, 0.0)
  )
  rate = 8e-5
  for moved, scale in ((clipped, 0.1 / 5), (whole, 1.0)):
    g = gradient["decoder/query_embedding"] * scale
    want = -rate * g / (np.abs(g) + 1)
    assert (
      difference(moved["decoder/query_embedding"], want) <= 2e-5
    )  # measured 5.3e-6 (1 - 0.999 in float32)


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({"name": "sgd"}, "optimizer.name must be one of adamw, muon; got 'sgd'."),
    ({"schedule": "step"}, "optimizer.schedule must be one of inverse_sqrt, cosine, constant"),
    ({"learning_rate": -1.0}, "optimizer.learning_rate must be 0 or more; got -1.0."),
    ({"learning_rate": math.nan}, "optimizer.learning_rate must be a finite number; got nan."),
    ({"max_grad_norm": math.inf}, "optimizer.max_grad_norm must be a finite number; got inf."),
    ({"beta1": 1.0}, "optimizer.beta1 must be in [0, 1); got 1.0."),
    ({"beta2": -0.1}, "optimizer.beta2 must be in [0, 1); got -0.1."),
    ({"epsilon": 0.0}, "optimizer.epsilon must be more than 0; got 0.0."),
    ({"layer_decay": 0.0}, "optimizer.layer_decay must be in (0, 1]; got 0.0."),
    ({"layer_decay": 1.1}, "optimizer.layer_decay must be in (0, 1]; got 1.1."),
    (
      {"learning_rate_multipliers": (("a", -1.0),)},
      "optimizer.learning_rate_multipliers: the factor of 'a' must be finite",
    ),
    (
      {"learning_rate_multipliers": (("a", math.nan),)},
      "optimizer.learning_rate_multipliers: the factor of 'a' must be fi",
    ),
    ({"timescale": 0}, "optimizer.timescale must be 1 or more; got 0."),
    (
      {"learning_rate_multipliers": (("(", 1.0),)},
      "optimizer.learning_rate_multipliers: '(' is not a regular expression",
    ),
  ],
)
def test_invalid_values_are_refused(values, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    OptimizerConfig(**values)
