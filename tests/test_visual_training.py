"""Training of the head for visual prompts: what is asked, what is minimised, and what changes."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from support import QUICK
from test_train_command import files, quick, typed  # noqa: F401

from sam3_jax.checkpoint import bundle as checkpoint
from sam3_jax.cli.main import main
from sam3_jax.evaluation import clicks
from sam3_jax.model.visual import head
from sam3_jax.model.visual.head import VisualHead
from sam3_jax.training import log, loop, sharding, step, visual
from sam3_jax.training.batch import Targets
from sam3_jax.training.config import TrainConfig
from sam3_jax.training.losses import LossConfig
from sam3_jax.training.optimizer import make_optimizer, make_schedule, stacked_axes
from sam3_jax.training.state import create
from sam3_jax.training.visual import VisualConfig, visual_loss, visual_sums
from sam3_jax.training.visual_init import new_head, positions
from sam3_jax.types import VisualHeadOutput
from sam3_jax.utils.param_tree import flatten, nest

SIDE = toy.CONFIG.mask_size
HEAD = VisualHead(toy.CONFIG)
ask = jax.jit(visual.ask, static_argnums=(2, 3), compiler_options=QUICK)
mend = jax.jit(visual.mend, compiler_options=QUICK)
round_sums = jax.jit(visual._round_sums, static_argnums=2, compiler_options=QUICK)


def targets(rng, images=3, rows=2, objects=2, scale=1):
  """Rectangles, their boxes, and the first object of each row."""
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


# What is asked.


@pytest.mark.parametrize("scale", [1, 2])
def test_clicks_lie_on_objects_or_on_nothing(scale):
  given = targets(np.random.default_rng(0), scale=scale)
  config = VisualConfig(prompts=200, rounds=3, boxed=0.0, nothing=0.5)
  asked = jax.device_get(ask(jax.random.key(0), given, SIDE, config))
  assert asked.xy.shape == (600, 5, 2)
  assert (asked.labels == [-1, -1, 1, -1, -1]).all()
  assert asked.valid.all()
  assert asked.image.tolist() == np.repeat(np.arange(3), 200).tolist()
  shrunk = given.masks.reshape(3, 4, SIDE, scale, SIDE, scale).mean((3, 5)) / 255
  drawn = np.zeros((3, 2), int)  # of each image's two objects
  for image, (row, column), covered in zip(
    asked.image, cells(asked.xy[:, 2]), asked.covered, strict=True
  ):
    there = shrunk[image][[0, 2]]  # the valid ones
    if covered.any():
      assert covered[row, column] == 1
      (which,) = {i for i in (0, 1) if np.array_equal(there[i], covered)} or {0}
      drawn[image, which] += 1
    else:
      assert there.max(0)[row, column] == 0
  assert drawn.min() > 30  # of some 50
  nothing = (~asked.covered.any((1, 2))).mean()
  assert 0.4 < nothing < 0.6


def test_boxes_are_near_their_objects():
  given = targets(np.random.default_rng(1))
  config = VisualConfig(prompts=100, rounds=1, boxed=1.0, nothing=0.5, box_noise=0.1)
  asked = jax.device_get(ask(jax.random.key(0), given, SIDE, config))
  assert (asked.labels == [2, 3, -1]).all()
  moves = []
  for (first, last, _), inside in zip(asked.xy, asked.inside, strict=True):
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    box = np.array([[columns[0], rows[0]], [columns[-1] + 1, rows[-1] + 1]]) / SIDE
    assert (last >= first).all()
    moves.append((np.array([first, last]) - box) / (box[1] - box[0]))
  assert np.abs(moves).max() <= 0.5
  assert 0.03 < np.std(moves) < 0.12  # 0.1, and less where the limit in pixels is lower


def test_boxes_without_noise_are_exact_and_objects_of_no_whole_cell_are_clicked():
  given = targets(np.random.default_rng(2), images=1, rows=1)
  masks = given.masks // 4  # no cell is half covered
  asked = ask(
    jax.random.key(1), given.replace(masks=masks), SIDE, VisualConfig(boxed=1.0, box_noise=0.0)
  )
  x, y, w, h = given.boxes[0, 0, 0]
  np.testing.assert_allclose(
    asked.xy[0, :2], [[x - w / 2, y - h / 2], [x + w / 2, y + h / 2]], atol=1e-6
  )
  np.testing.assert_array_equal(asked.inside[0], masks[0, 0, 0] > 0)


def test_images_without_objects_and_without_room_for_a_click_on_nothing():
  given = targets(np.random.default_rng(3))
  none = given.replace(valid=np.zeros_like(given.valid))
  assert not ask(jax.random.key(0), none, SIDE, VisualConfig()).valid.any()
  full = given.replace(masks=np.full_like(given.masks, 255))
  asked = ask(jax.random.key(0), full, SIDE, VisualConfig(boxed=0.0, nothing=1.0))
  assert not asked.valid.any()


def test_clicks_that_mend_lie_where_the_mask_is_wrong():
  rng = np.random.default_rng(4)
  mask, inside = (rng.random((64, SIDE, SIDE)) < 0.3 for _ in range(2))
  mask[0] = inside[0]  # no fault
  mask[1] = inside[1] = False  # nor an object
  mask[2], inside[2] = True, False
  xy, labels = mend(jax.random.key(0), jnp.asarray(mask), jnp.asarray(inside))
  for i, (row, column) in enumerate(cells(xy)):
    assert labels[i] == inside[i, row, column]
    assert (mask[i, row, column] != inside[i, row, column]) == (i > 1)
  assert (labels[0], labels[1], labels[2]) == (1, 0, 0)
  assert {0, 1} == set(np.asarray(labels[3:]).tolist())


# What a head begins as.


def test_a_new_head_looks_where_positions_are_the_same():
  """Queries and keys of the same places fit best, in every head of attention together."""
  frequencies = np.asarray(jax.random.normal(jax.random.key(0), (2, 64)))
  kernel = positions(frequencies)
  assert kernel.shape == (128, 64)
  assert kernel.sum(0).tolist() == [1] * 64
  xy = np.stack(np.meshgrid(np.linspace(-1, 1, 24), np.linspace(-1, 1, 24)), -1).reshape(-1, 2)
  angles = 2 * np.pi * xy @ frequencies
  looked = np.concatenate([np.sin(angles), np.cos(angles)], axis=1) @ kernel
  fits = looked @ looked.T
  np.testing.assert_allclose(np.diag(fits), 32, rtol=1e-5)  # sin2 + cos2 of 32 frequencies
  assert (fits.argmax(1) == np.arange(len(xy))).all()
  # Each head has its share, from low frequencies to high ones.
  lengths = (frequencies**2).sum(0)
  used = [np.flatnonzero(kernel[:64, 8 * head : 8 * head + 8].any(1)) for head in range(8)]
  assert sorted(np.concatenate(used).tolist()) == sorted(np.argsort(lengths)[:32].tolist())


def test_a_new_head_leaves_the_concepts_as_they_are():
  parts = nest(toy.parameters())
  head = new_head(toy.CONFIG, parts, 0)
  np.testing.assert_array_equal(
    head["neck"]["level2"]["smooth"]["kernel"], parts["neck"]["level2"]["smooth"]["kernel"] / 4
  )
  for path, x in flatten(parts).items():
    np.testing.assert_array_equal(x, toy.parameters()[path])
  assert {p: x.shape for p, x in flatten(head, "visual/").items()} == {
    p: x.shape for p, x in toy.visual_parameters().items()
  }


# What is minimised.


def plain_losses(logits, iou, exists, covered, inside, config):
  """A prompt's terms, in float64 and loops."""
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
    "shown": overlap[int(np.argmax(iou))] * there,
  }


def random_round(rng, count=5):
  given = targets(rng, 1, 1, count)
  given = given.replace(valid=np.ones_like(given.valid))
  asked = ask(jax.random.key(0), given, SIDE, VisualConfig(prompts=count, boxed=0.0, nothing=0.3))
  found = VisualHeadOutput(
    mask_logits=jnp.asarray(rng.normal(0, 3, (count, 4, SIDE, SIDE)), jnp.float32),
    iou=jnp.asarray(rng.random((count, 4)), jnp.float32),
    object_logit=jnp.asarray(rng.normal(0, 2, count), jnp.float32),
    tokens=jnp.zeros((count, 4, 32)),
  )
  return found, asked


def test_terms_equal_plain_loops():
  rng, config = np.random.default_rng(5), VisualConfig()
  found, asked = random_round(rng)
  asked = asked.replace(valid=jnp.array([True, True, False, True, True]))
  assert asked.inside.any((1, 2)).sum() not in (0, 5)
  got = round_sums(found, asked, config)
  rows = (
    found.mask_logits, found.iou, found.object_logit, asked.covered, asked.inside, asked.valid
  )  # fmt: skip
  want = dict.fromkeys(got, 0.0)
  for *row, valid in zip(*map(np.asarray, rows), strict=True):
    for name, value in plain_losses(*row, config).items():
      want[name] += value * valid
  for name, value in want.items():
    np.testing.assert_allclose(got[name], value, rtol=2e-6, err_msg=name)  # measured 3e-7


def test_only_the_one_mask_and_the_best_reading_learn():
  found, asked = random_round(np.random.default_rng(6))

  def total(logits):
    sums = visual._round_sums(found.replace(mask_logits=logits), asked, VisualConfig())
    return sums["mask"] + sums["dice"] + sums["iou"] + sums["object"]

  gradient = jax.jit(jax.grad(total), compiler_options=QUICK)(found.mask_logits)
  moved = np.abs(gradient).max((2, 3)) > 0
  there = np.asarray(asked.inside.any((1, 2)))
  assert moved[:, 0].tolist() == there.tolist()
  assert moved[:, 1:].sum(1).tolist() == there.astype(int).tolist()


@functools.cache
def gradients(config=None, again=False):
  config = config or VisualConfig(prompts=3, nothing=0.9)
  features = jax.random.normal(jax.random.key(1), (3, SIDE // 4, SIDE // 4, 32))

  def loss(parameters, given, key):
    sums = visual_sums(nest(parameters)["visual"], HEAD, features, given, key, config, again)
    return visual_loss(sums, config)

  return jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK)


def test_the_total_is_the_weighted_sum_and_all_of_the_head_learns():
  given = targets(np.random.default_rng(7))
  (total, terms), gradient = gradients()(toy.visual_parameters(), given, jax.random.key(0))
  weights = {"mask": 5.0, "dice": 2.0, "iou": 1.0, "object": 1.0}
  assert set(terms) == {*weights, "first_iou", "last_iou", "prompts", "objects"}
  np.testing.assert_allclose(total, sum(weights[n] * terms[n] for n in weights), rtol=1e-6)
  assert terms["prompts"] == 9
  assert 0 < terms["objects"] < 9
  still = {path for path, x in gradient.items() if not np.any(x)}
  keys = {path for path in gradient if path.endswith("/key/bias")}  # softmax does not feel them
  assert still - keys == {"visual/prompt/frequencies"}


def test_activations_that_are_computed_again_change_nothing_but_rounding():
  given, key = targets(np.random.default_rng(7)), jax.random.key(0)
  (total, _), one = gradients()(toy.visual_parameters(), given, key)
  (again, _), other = gradients(again=True)(toy.visual_parameters(), given, key)
  np.testing.assert_allclose(total, again, rtol=1e-6)
  largest = max(np.abs(x).max() for x in one.values())
  for path, x in one.items():
    np.testing.assert_allclose(other[path], x, atol=1e-5 * largest, err_msg=path)


def test_padding_says_nothing_and_no_object_is_no_loss():
  given, key = targets(np.random.default_rng(8)), jax.random.key(2)
  (total, _), _ = gradients()(toy.visual_parameters(), given, key)
  rows = given.valid[..., None]
  other = given.replace(
    boxes=np.where(rows, given.boxes, 0.3).astype(np.float32),
    masks=np.where(rows[..., None], given.masks, 77).astype(np.uint8),
  )
  assert gradients()(toy.visual_parameters(), other, key)[0][0] == total
  none = given.replace(valid=np.zeros_like(given.valid))
  (total, terms), gradient = gradients()(toy.visual_parameters(), none, key)
  assert total == 0
  assert terms["prompts"] == 0
  assert not any(np.any(x) for x in gradient.values())


def test_four_devices_equal_one():
  batch = toy.batch(1, images=4)
  everything = toy.parameters() | toy.visual_parameters()
  what = step.StepSettings(
    model=toy.CONFIG, losses=LossConfig(), objective="visual", visual=VisualConfig(prompts=2)
  )
  config = TrainConfig(checkpoint="x").optimizer
  trained = {p: x for p, x in everything.items() if p.startswith("visual/decoder/iou_head")}
  frozen = {p: x for p, x in everything.items() if p not in trained}
  optimizer = make_optimizer(config, trained, toy.CONFIG.trunk, 10)
  mesh = sharding.make_mesh(jax.devices()[:4])
  state = create(trained, optimizer, jax.random.key(0), average=False)
  make = functools.partial(step.make_step, what, optimizer, make_schedule(config, 10), mesh)
  run = make(state, frozen, compiler_options=QUICK)
  _, metrics = run(
    sharding.place(mesh, state), sharding.place(mesh, frozen), sharding.place_batch(mesh, batch)
  )
  key = jax.random.fold_in(jax.random.key(0), 0)
  arrays = jax.tree.map(jnp.asarray, nest(everything))
  apart = functools.partial(step.ask_visually, settings=what, shards=4)
  sums = jax.jit(apart, compiler_options=QUICK)(arrays, batch, key)
  total, _ = visual_loss(sums, what.visual)
  np.testing.assert_allclose(metrics["loss"], total, rtol=1e-5)
  assert metrics["prompts"] == 8


# The command.


def test_a_head_is_trained_beside_concepts_that_stay(files, monkeypatch):  # noqa: F811
  """From a checkpoint without one; every other parameter is the same, bit for bit."""
  params = {p: x.astype(jnp.bfloat16) for p, x in toy.parameters().items()}
  info = {"name": "toy", "licence": "CC0-1.0", "trained": True, "figures": {"cgf1": 50.0}}
  tokenizer = (files / "toy" / "tokenizer.model").read_bytes()
  checkpoint.save(files / "bare", nest(params), toy.CONFIG, tokenizer, info=info)
  run = json.loads((files / "run.json").read_text())
  del run["train"]
  run |= {
    "objective": "visual", "visual": {"prompts": 2, "rounds": 2}, "steps": 2, "stored": "bfloat16",
    "optimizer": {"name": "muon", "learning_rate": 0.1, "warmup": 0, "cooldown": 0},
    "evaluation_annotations": str(files / "data.json"), "evaluation_images": str(files / "images"),
  }  # fmt: skip
  (files / "run.json").write_text(json.dumps(run))
  monkeypatch.setattr(loop, "make_mesh", lambda fsdp: sharding.make_mesh(jax.devices()[:1], fsdp))
  quickly = functools.partial(step.make_step, compiler_options=QUICK)
  monkeypatch.setattr(loop, "make_step", quickly)
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
  begun = new_head(toy.CONFIG, nest(toy.parameters()), 0)
  np.testing.assert_array_equal(
    begun["neck"]["level2"]["project"]["kernel"], toy.parameters()["neck/level2/project/kernel"]
  )
  for path, x in flatten(begun, "visual/").items():
    same = np.array_equal(got.pop(path), x.astype(jnp.bfloat16))
    assert same == (path == "visual/prompt/frequencies"), path
  assert not got


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({"train": "decoder/.*"}, "train matches decoder/"),
    ({"lora": {"rank": 2}}, "the objective visual trains a head beside a checkpoint's model"),
    ({"masked": 1}, "masked and losses belong to the objective detection; visual has weights of"),
    ({"best": "cgf1"}, "best must be one of click, click_best, three_clicks, box; got 'cgf1'."),
    ({"best": "pmf1"}, "best must be one of click, click_best, three_clicks, box; got 'pmf1'."),
    ({"visual": {"rounds": 0}}, "visual.rounds must be 1 or more; got 0."),
    ({"visual": {"nothing": 1.5}}, "visual.nothing must be in [0, 1]; got 1.5."),
    ({"mask_size": 10}, "mask_size must be a multiple of 16 for this model; got 10."),
  ],
)
def test_what_is_refused(files, quick, capsys, values, message):  # noqa: F811
  run = json.loads((files / "run.json").read_text())
  del run["train"]
  (files / "run.json").write_text(json.dumps(run | {"objective": "visual"} | values))
  assert main(typed(files)) == 2
  error = capsys.readouterr().err
  assert message in error
  assert error.count("\n") == 1


def test_weights_of_another_objective_are_refused():
  with pytest.raises(ValueError, match="visual has the weights of the objective visual, but"):
    TrainConfig.from_dict({"checkpoint": "x", "visual": {"rounds": 2}})


def test_stacked_masks_are_layers_to_the_optimizer():
  for path, x in toy.visual_parameters().items():
    assert stacked_axes(path) == ("/mask_mlp/" in path), path
    if "/mask_mlp/" in path:
      assert len(x) == 4
