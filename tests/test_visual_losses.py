"""Losses of the head for visual prompts equal loops, and their gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training_model
from support import QUICK
from visual_targets import SIDE, sample, targets

from sam3_jax.model.visual.head import VisualHead
from sam3_jax.training import sharding, step, visual
from sam3_jax.training.config import TrainConfig
from sam3_jax.training.losses import LossConfig
from sam3_jax.training.optimizer import make_optimizer, make_schedule
from sam3_jax.training.state import create
from sam3_jax.training.visual import VisualConfig, visual_loss, visual_sums
from sam3_jax.types import VisualHeadOutput
from sam3_jax.utils.param_tree import nest

HEAD = VisualHead(training_model.CONFIG)
round_sums = jax.jit(visual._round_sums, static_argnums=2, compiler_options=QUICK)


def plain_losses(logits, iou, exists, covered, inside, config):
  """The losses of a prompt, in float64 and loops."""
  logits, covered = logits.astype(np.float64), covered.astype(np.float64)
  cross, dice, overlap = [], [], []
  for one in logits:
    p = 1 / (1 + np.exp(-one))
    bce = -(covered * np.log(p) + (1 - covered) * np.log(1 - p))
    cross.append(bce.mean())
    dice.append(1 - (2 * (p * covered).sum() + 1) / ((p + covered).sum() + 1))
    shown = one > 0
    overlap.append((shown & inside).sum() / max(1, (shown | inside).sum()))
  cost = [config.mask_weight * c + config.dice_weight * d for c, d in zip(cross, dice, strict=True)]
  best = 1 + int(np.argmin(cost[1:]))
  there = inside.any()
  p = 1 / (1 + np.exp(-np.float64(exists)))
  return {
    "mask": (cross[0] + cross[best]) * there,
    "dice": (dice[0] + dice[best]) * there,
    "iou": np.mean((np.array(overlap) - iou) ** 2),
    "object": -np.log(p if there else 1 - p),
    "best_iou": overlap[int(np.argmax(iou))] * there,
  }


def random_round(rng, count=5):
  given = targets(rng, 1, 1, count)
  given = given.replace(valid=np.ones_like(given.valid))
  sampled = sample(
    jax.random.key(0),
    given,
    SIDE,
    VisualConfig(prompts_per_image=count, box_probability=0.0, background_click_probability=0.3),
  )
  found = VisualHeadOutput(
    mask_logits=jnp.asarray(rng.normal(0, 3, (count, 4, SIDE, SIDE)), jnp.float32),
    iou=jnp.asarray(rng.random((count, 4)), jnp.float32),
    object_logit=jnp.asarray(rng.normal(0, 2, count), jnp.float32),
    tokens=jnp.zeros((count, 4, 32)),
  )
  return found, sampled


def test_terms_equal_loops():
  rng, config = np.random.default_rng(5), VisualConfig()
  found, sampled = random_round(rng)
  sampled = sampled.replace(valid=jnp.array([True, True, False, True, True]))
  assert sampled.inside.any((1, 2)).sum() not in (0, 5)
  got = round_sums(found, sampled, config)
  rows = (
    found.mask_logits, found.iou, found.object_logit, sampled.covered, sampled.inside, sampled.valid
  )  # fmt: skip
  want = dict.fromkeys(got, 0.0)
  for *row, valid in zip(*map(np.asarray, rows), strict=True):
    for name, value in plain_losses(*row, config).items():
      want[name] += value * valid
  for name, value in want.items():
    np.testing.assert_allclose(got[name], value, rtol=2e-6, err_msg=name)  # measured 3e-7


def test_only_the_single_mask_and_the_best_multimask_output_are_trained():
  found, sampled = random_round(np.random.default_rng(6))

  def total(logits):
    sums = visual._round_sums(found.replace(mask_logits=logits), sampled, VisualConfig())
    return sums["mask"] + sums["dice"] + sums["iou"] + sums["object"]

  gradient = jax.jit(jax.grad(total), compiler_options=QUICK)(found.mask_logits)
  moved = np.abs(gradient).max((2, 3)) > 0
  there = np.asarray(sampled.inside.any((1, 2)))
  assert moved[:, 0].tolist() == there.tolist()
  assert moved[:, 1:].sum(1).tolist() == there.astype(int).tolist()


@functools.cache
def gradients(config=None, again=False):
  config = config or VisualConfig(prompts_per_image=3, background_click_probability=0.9)
  features = jax.random.normal(jax.random.key(1), (3, SIDE // 4, SIDE // 4, 32))

  def loss(parameters, given, key):
    sums = visual_sums(nest(parameters)["visual"], HEAD, features, given, key, config, again)
    return visual_loss(sums, config)

  return jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK)


@pytest.mark.slow
def test_total_is_the_weighted_sum_and_all_parameters_have_gradients():
  given = targets(np.random.default_rng(7))
  (total, terms), gradient = gradients()(
    training_model.visual_parameters(), given, jax.random.key(0)
  )
  weights = {"mask": 5.0, "dice": 2.0, "iou": 1.0, "object": 1.0}
  assert set(terms) == {*weights, "first_iou", "last_iou", "prompts", "objects"}
  np.testing.assert_allclose(total, sum(weights[n] * terms[n] for n in weights), rtol=1e-6)
  assert terms["prompts"] == 9
  assert 0 < terms["objects"] < 9
  still = {path for path, x in gradient.items() if not np.any(x)}
  keys = {
    path for path in gradient if path.endswith("/key/bias")
  }  # a softmax does not depend on them
  assert still - keys == {"visual/prompt/frequencies"}


@pytest.mark.slow
def test_remat_changes_rounding_only():
  given, key = targets(np.random.default_rng(7)), jax.random.key(0)
  (total, _), one = gradients()(training_model.visual_parameters(), given, key)
  (again, _), other = gradients(again=True)(training_model.visual_parameters(), given, key)
  np.testing.assert_allclose(total, again, rtol=1e-6)
  largest = max(np.abs(x).max() for x in one.values())
  for path, x in one.items():
    np.testing.assert_allclose(other[path], x, atol=1e-5 * largest, err_msg=path)


@pytest.mark.slow
def test_padding_and_images_without_objects_have_no_loss():
  given, key = targets(np.random.default_rng(8)), jax.random.key(2)
  (total, _), _ = gradients()(training_model.visual_parameters(), given, key)
  rows = given.valid[..., None]
  other = given.replace(
    boxes=np.where(rows, given.boxes, 0.3).astype(np.float32),
    masks=np.where(rows[..., None], given.masks, 77).astype(np.uint8),
  )
  assert gradients()(training_model.visual_parameters(), other, key)[0][0] == total
  none = given.replace(valid=np.zeros_like(given.valid))
  (total, terms), gradient = gradients()(training_model.visual_parameters(), none, key)
  assert total == 0
  assert terms["prompts"] == 0
  assert not any(np.any(x) for x in gradient.values())


@pytest.mark.slow
def test_four_devices_equal_one():
  batch = training_model.batch(1, images=4)
  everything = training_model.parameters() | training_model.visual_parameters()
  what = step.StepSettings(
    model=training_model.CONFIG,
    losses=LossConfig(),
    objective="visual",
    visual=VisualConfig(prompts_per_image=2),
  )
  config = TrainConfig(checkpoint="x").optimizer
  trained = {p: x for p, x in everything.items() if p.startswith("visual/decoder/iou_head")}
  frozen = {p: x for p, x in everything.items() if p not in trained}
  optimizer = make_optimizer(config, trained, training_model.CONFIG.trunk, 10)
  mesh = sharding.make_mesh(jax.devices()[:4])
  state = create(trained, optimizer, jax.random.key(0), ema=False)
  make = functools.partial(step.make_step, what, optimizer, make_schedule(config, 10), mesh)
  run = make(state, frozen, compiler_options=QUICK)
  _, metrics = run(
    sharding.put_state(mesh, state),
    sharding.put_state(mesh, frozen),
    sharding.put_batch(mesh, batch),
  )
  key = jax.random.fold_in(jax.random.key(0), 0)
  arrays = jax.tree.map(jnp.asarray, nest(everything))
  apart = functools.partial(step.sum_visual_losses, settings=what, shards=4)
  sums = jax.jit(apart, compiler_options=QUICK)(arrays, batch, key)
  total, _ = visual_loss(sums, what.visual)
  np.testing.assert_allclose(metrics["loss"], total, rtol=1e-5)
  assert metrics["prompts"] == 8
