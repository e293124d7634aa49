"""Training of the head for visual prompts: sampled prompts, losses, and the command."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training_model
from support import QUICK
from test_train_command import files, quick, typed  # noqa: F401

from sam3_jax.checkpoint import bundle as checkpoint
from sam3_jax.cli.main import main
from sam3_jax.evaluation import clicks
from sam3_jax.model.visual import head
from sam3_jax.model.visual.head import VisualHead
from sam3_jax.training import log, sharding, step, trainer, visual
from sam3_jax.training.batch import Targets
from sam3_jax.training.config import TrainConfig
from sam3_jax.training.losses import LossConfig
from sam3_jax.training.optimizer import make_optimizer, make_schedule, stacked_axes
from sam3_jax.training.state import create
from sam3_jax.training.visual import VisualConfig, visual_loss, visual_sums
from sam3_jax.training.visual_init import new_head, position_kernel
from sam3_jax.types import VisualHeadOutput
from sam3_jax.utils.param_tree import flatten, nest

SIDE = training_model.CONFIG.mask_size
HEAD = VisualHead(training_model.CONFIG)
sample = jax.jit(visual.sample_prompts, static_argnums=(2, 3), compiler_options=QUICK)
corrective_click = jax.jit(visual.corrective_click, compiler_options=QUICK)
round_sums = jax.jit(visual._round_sums, static_argnums=2, compiler_options=QUICK)


def targets(rng, images=3, rows=2, objects=2, scale=1):
  """Random rectangles and their boxes; only the first object of each prompt is valid."""
  boxes = np.zeros((images, rows, objects, 4), np.float32)
  masks = np.zeros((images, rows, objects, SIDE * scale, SIDE * scale), np.uint8)
  for index in np.ndindex(images, rows, objects):
    x0, y0 = rng.integers(0, SIDE - 6, 2)
    w, h = rng.integers(2, 6, 2)
    boxes[index] = np.array([x0 + w / 2, y0 + h / 2, w, h]) / SIDE
    masks[index][scale * y0 : scale * (y0 + h), scale * x0 : scale * (x0 + w)] = 255
  valid = np.zeros((images, rows, objects), bool)
  valid[..., 0] = True
  return Targets(boxes, masks, valid)


def cells(xy):
  return np.floor(np.asarray(xy) * SIDE).astype(int)[..., ::-1]  # row, column


# Sampled prompts.


@pytest.mark.parametrize("scale", [1, 2])
def test_clicks_are_on_objects_or_background(scale):
  given = targets(np.random.default_rng(0), scale=scale)
  config = VisualConfig(
    prompts_per_image=200, rounds=3, box_probability=0.0, background_click_probability=0.5
  )
  sampled = jax.device_get(sample(jax.random.key(0), given, SIDE, config))
  assert sampled.xy.shape == (600, 5, 2)
  assert (sampled.labels == [-1, -1, 1, -1, -1]).all()
  assert sampled.valid.all()
  assert sampled.image.tolist() == np.repeat(np.arange(3), 200).tolist()
  pooled = given.masks.reshape(3, 4, SIDE, scale, SIDE, scale).mean((3, 5)) / 255
  drawn = np.zeros((3, 2), int)  # of each image's two objects
  for image, (row, column), covered in zip(
    sampled.image, cells(sampled.xy[:, 2]), sampled.covered, strict=True
  ):
    there = pooled[image][[0, 2]]  # the valid ones
    if covered.any():
      assert covered[row, column] == 1
      (which,) = {i for i in (0, 1) if np.array_equal(there[i], covered)} or {0}
      drawn[image, which] += 1
    else:
      assert there.max(0)[row, column] == 0
  assert drawn.min() > 30  # of some 50
  nothing = (~sampled.covered.any((1, 2))).mean()
  assert 0.4 < nothing < 0.6


def test_boxes_are_near_their_objects():
  given = targets(np.random.default_rng(1))
  config = VisualConfig(
    prompts_per_image=100,
    rounds=1,
    box_probability=1.0,
    background_click_probability=0.5,
    box_noise=0.1,
  )
  sampled = jax.device_get(sample(jax.random.key(0), given, SIDE, config))
  assert (sampled.labels == [2, 3, -1]).all()
  moves = []
  for (first, last, _), inside in zip(sampled.xy, sampled.inside, strict=True):
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    box = np.array([[columns[0], rows[0]], [columns[-1] + 1, rows[-1] + 1]]) / SIDE
    assert (last >= first).all()
    moves.append((np.array([first, last]) - box) / (box[1] - box[0]))
  assert np.abs(moves).max() <= 0.5
  assert 0.03 < np.std(moves) < 0.12  # 0.1, and less where the limit in pixels is lower


def test_boxes_without_noise_and_objects_smaller_than_a_cell():
  given = targets(np.random.default_rng(2), images=1, rows=1)
  masks = given.masks // 4  # no cell is half covered
  sampled = sample(
    jax.random.key(1),
    given.replace(masks=masks),
    SIDE,
    VisualConfig(box_probability=1.0, box_noise=0.0),
  )
  x, y, w, h = given.boxes[0, 0, 0]
  np.testing.assert_allclose(
    sampled.xy[0, :2], [[x - w / 2, y - h / 2], [x + w / 2, y + h / 2]], atol=1e-6
  )
  np.testing.assert_array_equal(sampled.inside[0], masks[0, 0, 0] > 0)


def test_images_without_objects_or_without_background():
  given = targets(np.random.default_rng(3))
  none = given.replace(valid=np.zeros_like(given.valid))
  assert not sample(jax.random.key(0), none, SIDE, VisualConfig()).valid.any()
  full = given.replace(masks=np.full_like(given.masks, 255))
  sampled = sample(
    jax.random.key(0),
    full,
    SIDE,
    VisualConfig(box_probability=0.0, background_click_probability=1.0),
  )
  assert not sampled.valid.any()


def test_corrective_clicks_are_where_the_mask_is_wrong():
  rng = np.random.default_rng(4)
  mask, inside = (rng.random((64, SIDE, SIDE)) < 0.3 for _ in range(2))
  mask[0] = inside[0]  # no fault
  mask[1] = inside[1] = False  # nor an object
  mask[2], inside[2] = True, False
  xy, labels = corrective_click(jax.random.key(0), jnp.asarray(mask), jnp.asarray(inside))
  for i, (row, column) in enumerate(cells(xy)):
    assert labels[i] == inside[i, row, column]
    assert (mask[i, row, column] != inside[i, row, column]) == (i > 1)
  assert (labels[0], labels[1], labels[2]) == (1, 0, 0)
  assert {0, 1} == set(np.asarray(labels[3:]).tolist())


# Initial parameters.


def test_new_head_attends_to_equal_positions():
  """The dot product of queries and keys is largest at equal positions, over all attention heads."""
  frequencies = np.asarray(jax.random.normal(jax.random.key(0), (2, 64)))
  kernel = position_kernel(frequencies)
  assert kernel.shape == (128, 64)
  assert kernel.sum(0).tolist() == [1] * 64
  xy = np.stack(np.meshgrid(np.linspace(-1, 1, 24), np.linspace(-1, 1, 24)), -1).reshape(-1, 2)
  angles = 2 * np.pi * xy @ frequencies
  projected = np.concatenate([np.sin(angles), np.cos(angles)], axis=1) @ kernel
  fits = projected @ projected.T
  np.testing.assert_allclose(np.diag(fits), 32, rtol=1e-5)  # sin2 + cos2 of 32 frequencies
  assert (fits.argmax(1) == np.arange(len(xy))).all()
  # Each head has its share, from low frequencies to high ones.
  lengths = (frequencies**2).sum(0)
  used = [np.flatnonzero(kernel[:64, 8 * head : 8 * head + 8].any(1)) for head in range(8)]
  assert sorted(np.concatenate(used).tolist()) == sorted(np.argsort(lengths)[:32].tolist())


@pytest.mark.slow
def test_new_head_does_not_change_the_detector():
  parts = nest(training_model.parameters())
  head = new_head(training_model.CONFIG, parts, 0)
  np.testing.assert_array_equal(
    head["neck"]["level2"]["smooth"]["kernel"], parts["neck"]["level2"]["smooth"]["kernel"] / 4
  )
  for path, x in flatten(parts).items():
    np.testing.assert_array_equal(x, training_model.parameters()[path])
  assert {p: x.shape for p, x in flatten(head, "visual/").items()} == {
    p: x.shape for p, x in training_model.visual_parameters().items()
  }


# Losses.


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


# The command.


@pytest.mark.slow
def test_visual_training_leaves_the_detector_unchanged(files, monkeypatch):  # noqa: F811
  """From a checkpoint without a head; all other parameters are equal, bit for bit."""
  params = {p: x.astype(jnp.bfloat16) for p, x in training_model.parameters().items()}
  info = {"name": "toy", "licence": "CC0-1.0", "trained": True, "figures": {"cgf1": 50.0}}
  tokenizer = (files / "toy" / "tokenizer.model").read_bytes()
  checkpoint.save(files / "bare", nest(params), training_model.CONFIG, tokenizer, info=info)
  run = json.loads((files / "run.json").read_text())
  del run["trainable"]
  run |= {
    "objective": "visual", "visual": {"prompts_per_image": 2, "rounds": 2},
    "steps": 2, "save_dtype": "bfloat16",
    "optimizer": {"name": "muon", "learning_rate": 0.1, "warmup_steps": 0, "cooldown_steps": 0},
    "evaluation_annotations": str(files / "data.json"), "evaluation_images": str(files / "images"),
  }  # fmt: skip
  (files / "run.json").write_text(json.dumps(run))
  monkeypatch.setattr(
    trainer, "make_mesh", lambda fsdp: sharding.make_mesh(jax.devices()[:1], fsdp)
  )
  quickly = functools.partial(step.make_step, compiler_options=QUICK)
  monkeypatch.setattr(trainer, "make_step", quickly)
  drawn = jax.jit(head.init, static_argnums=0, compiler_options=QUICK)
  monkeypatch.setattr(head, "init", drawn)
  figured = {"click": 1.0, "click_best": 2.0, "three_clicks": 3.0, "box": 4.0}

  def evaluate(model, pairs, images):
    assert model.encode(np.zeros((20, 30, 3), np.uint8), visual=True).visual is not None
    return figured | {"objects": len(pairs)}

  monkeypatch.setattr(clicks, "evaluate", evaluate)
  assert main(typed(files, "--checkpoint", str(files / "bare"))) == 0
  first, *_, scored = log.read_metrics(files / "out" / "metrics.jsonl")
  assert np.isfinite(first["loss"])
  assert scored["evaluation/objects"] == 4
  bundle = checkpoint.load(files / "out" / "final")
  assert bundle.info["figures"] == {"cgf1": 50.0, **figured}
  got = flatten(jax.device_get(bundle.params))
  for path, x in params.items():
    np.testing.assert_array_equal(got.pop(path), x, err_msg=path)
  begun = new_head(training_model.CONFIG, nest(training_model.parameters()), 0)
  np.testing.assert_array_equal(
    begun["neck"]["level2"]["project"]["kernel"],
    training_model.parameters()["neck/level2/project/kernel"],
  )
  for path, x in flatten(begun, "visual/").items():
    same = np.array_equal(got.pop(path), x.astype(jnp.bfloat16))
    assert same == (path == "visual/prompt/frequencies"), path
  assert not got


@pytest.mark.slow
@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({"trainable": "decoder/.*"}, "trainable matches decoder/"),
    ({"lora": {"rank": 2}}, "the objective visual trains a head on top of a checkpoint's model"),
    ({"mask_prompts": 1}, "mask_prompts and losses are for the objective detection; the objective"),
    (
      {"best_metric": "cgf1"},
      "best_metric must be one of click, click_best, three_clicks, box; got 'cgf1'.",
    ),
    (
      {"best_metric": "pmf1"},
      "best_metric must be one of click, click_best, three_clicks, box; got 'pmf1'.",
    ),
    ({"visual": {"rounds": 0}}, "visual.rounds must be 1 or more; got 0."),
    (
      {"visual": {"background_click_probability": 1.5}},
      "visual.background_click_probability must be in [0, 1]; got 1.5.",
    ),
    ({"mask_size": 10}, "mask_size must be a multiple of 16 for this model; got 10."),
  ],
)
def test_invalid_configurations_are_refused(files, quick, capsys, values, message):  # noqa: F811
  run = json.loads((files / "run.json").read_text())
  del run["trainable"]
  (files / "run.json").write_text(json.dumps(run | {"objective": "visual"} | values))
  assert main(typed(files)) == 2
  error = capsys.readouterr().err
  assert message in error
  assert error.count("\n") == 1


def test_settings_of_another_objective_are_refused():
  with pytest.raises(ValueError, match="visual is for the objective visual, but"):
    TrainConfig.from_dict({"checkpoint": "x", "visual": {"rounds": 2}})


def test_mask_mlps_are_stacked_layers():
  for path, x in training_model.visual_parameters().items():
    assert stacked_axes(path) == ("/mask_mlp/" in path), path
    if "/mask_mlp/" in path:
      assert len(x) == 4
