"""Training on several devices: a step on four equals one on a single device; shardings."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import training_model
from support import QUICK, difference

from sam3_jax.model.layers import Layering
from sam3_jax.training import sharding, state, step
from sam3_jax.training.losses import LossConfig
from sam3_jax.training.optimizer import OptimizerConfig, make_optimizer, make_schedule, stacked_axes


def five_steps(devices, fsdp, again=False):
  settings = OptimizerConfig(
    schedule="constant",
    warmup_steps=0,
    cooldown_steps=0,
    learning_rate_multipliers=(),
    layer_decay=1.0,
  )
  mesh = sharding.make_mesh(jax.devices()[:devices], fsdp)
  optimizer = make_optimizer(settings, training_model.parameters(), training_model.CONFIG.trunk, 5)
  now = state.create(training_model.parameters(), optimizer, jax.random.key(1), ema=False)
  now = jax.device_put(now, sharding.state_shardings(mesh, now))
  gather = sharding.gatherer(mesh, jnp.float32)
  what = step.StepSettings(
    model=training_model.CONFIG,
    losses=LossConfig(),
    mask_prompts=1,
    layering=Layering(again, gather),
  )
  run = step.make_step(what, optimizer, make_schedule(settings, 5), mesh, now, {}, QUICK)
  run = run.lower(now, {}, sharding.put_batch(mesh, training_model.batch(0))).compile()
  losses, moments = [], []
  for number in range(5):
    now, metrics = run(now, {}, sharding.put_batch(mesh, training_model.batch(number)))
    losses.append(float(metrics["loss"]))
    moments.append(jax.device_get(optax.tree_utils.tree_get(now.optimizer, "mu")))
  return losses, now, run.as_text(), gradients(moments, settings.beta1)


def gradients(moments, beta1):
  """The gradient of each step, out of Adam's first moments after it."""
  before = [dict.fromkeys(moments[0], 0), *moments[:-1]]
  return [
    {path: (x - beta1 * old[path]) / (1 - beta1) for path, x in new.items()}
    for old, new in zip(before, moments, strict=True)
  ]


# A gradient so far below the step's largest is rounding noise, which Adam turns into a whole step:
# that of the queries and keys of geometry/layers/self_attn (with one box a prompt nothing depends
# on them), of the keys' biases (nor does a softmax on these), and of single elements.
NOISE = 3e-7


def rounding_noise(history, path):
  """Which elements of a parameter have a gradient of rounding noise in any step; none where it is
  exactly 0, as of a token that no phrase has."""
  small = np.zeros(history[0][path].shape, bool)
  for step_gradients in history:
    largest = max(np.abs(x).max() for x in step_gradients.values())
    size = np.abs(step_gradients[path])
    small |= (size > 0) & (size < NOISE * largest)
  return small


@pytest.fixture(scope="module")
def alone():
  return five_steps(1, 1)


@pytest.mark.slow
@pytest.mark.parametrize(("fsdp", "again"), [(1, False), (2, True)])
def test_four_devices_equal_one(alone, fsdp, again, monkeypatch):
  monkeypatch.setattr(sharding, "SMALL", 0)  # the toy's parameters all are
  losses, end, text, _ = five_steps(4, fsdp, again)
  wanted, other, _, history = alone
  assert difference(losses, wanted) <= 1e-5  # measured 3e-6 of losses up to 700
  cut = [path for path, x in end.trained.items() if not x.sharding.is_fully_replicated]
  assert bool(cut) == (fsdp > 1)
  excepted = {path: rounding_noise(history, path) for path in history[0]}
  for path, x in jax.device_get(end.trained).items():
    apart = np.abs(x - np.asarray(other.trained[path]))
    assert apart[~excepted[path]].max(initial=0) <= 1e-5, path  # measured 5.9e-6
  elsewhere = [x for path, x in excepted.items() if "geometry/layers/self_attn/" not in path]
  share = sum(x.sum() for x in elsewhere) / sum(x.size for x in elsewhere)
  assert share <= 2e-3  # measured 7.6e-4

  assert foreign_gathers(text) == []


def foreign_gathers(text):
  """Shapes that are gathered and no parameter's, but for the few that are known and small: in the
  losses the matchers' costs and the logits, which end in a row of queries, and for the gradient of
  the cut embedding table that of the tokens."""

  def key(shape):
    return sorted(n for n in shape if n > 1)  # layers are cut out of stacks, axes reordered

  known = [key(x.shape[stacked_axes(path) :]) for path, x in training_model.parameters().items()]
  queries, width = training_model.CONFIG.queries, training_model.CONFIG.text.width
  known += [key((2 * queries, 4)), key((4, 2, training_model.CONFIG.text.context, width))]
  results = re.findall(r"= (.*) all-gather(?:-start)?\(", text)
  shapes = [
    [int(n) for n in found.split(",")]
    for result in results
    for found in re.findall(r"f32\[([\d,]+)\]", result)
  ]
  return [shape for shape in shapes if key(shape) not in known and shape[-1] != queries]


def test_parameters_are_sharded_along_the_largest_divisible_axis():
  mesh = sharding.make_mesh(jax.devices()[:4], 4)

  def spec(path, *shape):
    return tuple(sharding.parameter_sharding(mesh, path, shape).spec)

  assert spec("trunk/groups/windowed/mlp/fc1/kernel", 4, 4, 128, 512) == (None, None, None, "fsdp")
  assert spec("trunk/groups/global/mlp/fc2/kernel", 4, 512, 128) == (None, "fsdp")
  assert spec("text/token_embedding/embedding", 49408, 64) == ("fsdp",)
  assert spec("text/blocks/norm1/scale", 24, 4096) == ()  # small
  assert spec("masks/mask_embed/fc1/kernel", 1023, 1021) == ()  # 4 divides neither
  assert spec("decoder/layers/mlp/fc1/kernel", 4, 1026, 1024) == (None, None, "fsdp")


@pytest.mark.parametrize("fsdp", [0, 3])
def test_invalid_meshes(fsdp):
  with pytest.raises(ValueError, match=f"fsdp must divide the number of devices, 4; got {fsdp}"):
    sharding.make_mesh(jax.devices()[:4], fsdp)


def test_microbatches_take_every_nth_image():
  def gradient(trained, frozen, batch, key):
    mean = jnp.mean(batch.ids.astype(jnp.float32))
    return (mean, {"objects": jnp.sum(batch.ids)}), {"w": trained["w"] * batch.ids[0]}

  batch = training_model.batch(1, images=6)  # ids 100 .. 105
  what = step.StepSettings(
    model=training_model.CONFIG, losses=LossConfig(), gradient_accumulation_steps=3
  )
  trained = {"w": jnp.ones(2)}
  total, terms, gradients = step._accumulated(gradient, trained, {}, batch, jax.random.key(0), what)
  assert float(total) == 102.5
  assert float(terms["objects"]) == 615 / 3
  np.testing.assert_allclose(gradients["w"], (100 + 101 + 102) / 3)
