"""The loop: devices, microbatches, what is written, interruptions, faults.

What is about the loop and not the model runs with a stand-in for the step, which compiles at once.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from support import QUICK, difference

from sam3_jax import checkpoint, terminal
from sam3_jax.evaluation import concept
from sam3_jax.model.layers import Layering
from sam3_jax.training import log, loop, lora, sharding, state, step
from sam3_jax.training.config import TrainConfig
from sam3_jax.training.losses import LossConfig
from sam3_jax.training.optimizer import (
  OptimizerConfig,
  make_optimizer,
  make_schedule,
  stacked_axes,
)
from sam3_jax.training.state import TrainState
from sam3_jax.training.storage import Storage
from sam3_jax.trees import flatten

PATTERN = r"decoder/norm/.*|scoring/query_project/.*"
TOKENIZER = Path(__file__).parent / "goldens" / "tokenizer.model"


def stand_in(settings, optimizer, schedule, mesh, state, frozen):
  """A step that depends on everything a real one does, and costs nothing."""

  @jax.jit
  def run(state, frozen, batch):
    push = jnp.cos(batch.ids.sum() + jax.random.normal(jax.random.fold_in(state.key, state.step)))
    gradients = {path: jnp.sin(x) + push for path, x in state.trained.items()}
    updates, moments = optimizer.update(gradients, state.optimizer, state.trained)
    trained = {path: x + updates[path] for path, x in state.trained.items()}
    from sam3_jax.training.state import move_average

    average = move_average(state.average, trained, state.step, settings.average)
    metrics = {"loss": push + 2, "grad_norm": push * push, "learning_rate": schedule(state.step)}
    return TrainState(state.step + 1, trained, moments, average, state.key), metrics

  return run


@pytest.fixture
def quick(monkeypatch):
  monkeypatch.setattr(loop, "make_step", stand_in)
  monkeypatch.setattr(loop, "make_mesh", lambda fsdp: sharding.make_mesh(jax.devices()[:1], fsdp))


def config(**values):
  fields = {
    "model": toy.CONFIG.to_dict(), "train": PATTERN, "steps": 7, "save_every": 2, "average": 0.5,
    "data": {"batch": 4, "present": 1, "prompts": 2},
    "optimizer": {"warmup": 2, "cooldown": 2, "learning_rate": 1e-2},
  }  # fmt: skip
  return TrainConfig.from_dict(fields | values)


def start():
  return loop.Start(toy.CONFIG, toy.parameters(), TOKENIZER.read_bytes(), {"licence": "CC0-1.0"})


def train(out, settings=None, source=None, **options):
  settings = settings or config()
  return loop.train(settings, start(), source or toy.Source(), out, **options)


def parameters(bundle):
  return flatten(jax.device_get(checkpoint.load(bundle).params))


def assert_same(found, wanted):
  assert found.keys() == wanted.keys()
  for path in wanted:
    np.testing.assert_array_equal(found[path], wanted[path], err_msg=path)


# Devices: the real step.


def five_steps(devices, fsdp, again=False):
  settings = OptimizerConfig(
    schedule="constant", warmup=0, cooldown=0, multipliers=(), layer_decay=1.0
  )
  mesh = sharding.make_mesh(jax.devices()[:devices], fsdp)
  optimizer = make_optimizer(settings, toy.parameters(), toy.CONFIG.trunk, 5)
  now = state.create(toy.parameters(), optimizer, jax.random.key(1), average=False)
  now = jax.device_put(now, sharding.state_shardings(mesh, now))
  gather = sharding.gatherer(mesh, jnp.float32)
  what = step.StepSettings(
    model=toy.CONFIG, losses=LossConfig(), masked=1, layering=Layering(again, gather)
  )
  run = step.make_step(what, optimizer, make_schedule(settings, 5), mesh, now, {}, QUICK)
  text = run.lower(now, {}, sharding.place_batch(mesh, toy.batch(0))).compile().as_text()
  losses, moments = [], []
  for number in range(5):
    now, metrics = run(now, {}, sharding.place_batch(mesh, toy.batch(number)))
    losses.append(float(metrics["loss"]))
    moments.append(jax.device_get(optax.tree_utils.tree_get(now.optimizer, "mu")))
  return losses, now, text, gradients(moments, settings.beta1)


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

  known = [key(x.shape[stacked_axes(path) :]) for path, x in toy.parameters().items()]
  queries, width = toy.CONFIG.queries, toy.CONFIG.text.width
  known += [key((2 * queries, 4)), key((4, 2, toy.CONFIG.text.context, width))]
  results = re.findall(r"= (.*) all-gather(?:-start)?\(", text)
  shapes = [
    [int(n) for n in found.split(",")]
    for result in results
    for found in re.findall(r"f32\[([\d,]+)\]", result)
  ]
  return [shape for shape in shapes if key(shape) not in known and shape[-1] != queries]


def test_parameters_are_cut_along_the_largest_axis_that_fits():
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
def test_meshes_that_do_not_fit_are_refused(fsdp):
  with pytest.raises(ValueError, match=f"fsdp must divide the number of devices, 4; got {fsdp}"):
    sharding.make_mesh(jax.devices()[:4], fsdp)


def test_microbatches_take_every_nth_picture_and_count_alike():
  def gradient(trained, frozen, batch, key):
    mean = jnp.mean(batch.ids.astype(jnp.float32))
    return (mean, {"objects": jnp.sum(batch.ids)}), {"w": trained["w"] * batch.ids[0]}

  batch = toy.batch(1, images=6)  # ids 100 .. 105
  what = step.StepSettings(model=toy.CONFIG, losses=LossConfig(), accumulate=3)
  trained = {"w": jnp.ones(2)}
  total, terms, gradients = step._accumulated(gradient, trained, {}, batch, jax.random.key(0), what)
  assert float(total) == 102.5
  assert float(terms["objects"]) == 615 / 3
  np.testing.assert_allclose(gradients["w"], (100 + 101 + 102) / 3)


def test_average_forgets_the_start_soon():
  average = {"w": jnp.zeros(1)}
  for number, value in enumerate((1.0, 2.0, 3.0)):
    average = state.move_average(average, {"w": jnp.full(1, value)}, jnp.int32(number), 0.15)
  # Kept: 1/10, then 0.15, as 2/11 and 3/12 are more.
  want = 0.15 * (0.15 * 0.9 * 1 + 0.85 * 2) + 0.85 * 3
  assert float(average["w"][0]) == pytest.approx(want, rel=1e-6)
  assert state.move_average({}, {"w": jnp.ones(1)}, jnp.int32(0), 0.9) == {}


def test_only_what_matches_is_trained():
  trained, frozen = state.split(toy.parameters(), PATTERN)
  assert sorted(trained) == [
    "decoder/norm/bias", "decoder/norm/scale",
    "scoring/query_project/bias", "scoring/query_project/kernel",
  ]  # fmt: skip
  assert trained.keys() | frozen.keys() == toy.parameters().keys()
  assert not trained.keys() & frozen.keys()
  with pytest.raises(ValueError, match=r"train 'norm' matches no parameter"):
    state.split(toy.parameters(), "norm")


# The loop, with the stand-in.


def test_a_run_leaves_metrics_checkpoints_and_a_bundle(tmp_path, quick):
  out = tmp_path / "run"
  final = train(out)
  assert final == out / "final"
  lines = log.read_metrics(out / "metrics.jsonl")
  assert [line["step"] for line in lines] == list(range(1, 8))
  assert {"loss", "grad_norm", "learning_rate", "images_per_second", "seconds"} <= lines[0].keys()
  assert [line["learning_rate"] for line in lines][:2] == [0, 0.005]
  assert sorted(int(folder.name) for folder in (out / "steps").iterdir()) == [6, 7]  # keep: 2
  bundle = checkpoint.load(final)
  assert bundle.info["name"] == "run"
  assert bundle.info["trained"] is True
  assert bundle.info["licence"] == "CC0-1.0"
  assert bundle.info["source"] == "7 steps of sam3-jax train from random parameters"
  after = parameters(final)
  moved = {path for path, x in toy.parameters().items() if not np.array_equal(after[path], x)}
  assert moved == state.split(toy.parameters(), PATTERN)[0].keys()
  assert train(out) == final  # and does nothing again


class Stop(Exception):
  pass


class Stopping(toy.Source):
  """Breaks off before a step."""

  def __init__(self, after):
    super().__init__()
    self.after = after

  def __next__(self):
    if self.number == self.after:
      raise Stop
    return super().__next__()


@pytest.mark.parametrize("after", [0, 1, 2, 5])
def test_an_interrupted_run_goes_on_to_the_same_parameters(tmp_path, quick, after):
  whole, broken = tmp_path / "run", tmp_path / "again" / "run"
  train(whole)
  with pytest.raises(Stop):
    train(broken, source=Stopping(after))
  assert not (broken / "final").exists()
  train(broken)
  assert_same(parameters(broken / "final"), parameters(whole / "final"))
  lines = [log.read_metrics(out / "metrics.jsonl") for out in (whole, broken)]
  assert [[x["step"], x["loss"]] for x in lines[0]] == [[x["step"], x["loss"]] for x in lines[1]]


KILLED = """
import sys, pathlib
sys.path[:0] = {paths!r}
import test_loop as t
from sam3_jax.training import loop, sharding
import jax, time
loop.make_step = t.stand_in
loop.make_mesh = lambda fsdp: sharding.make_mesh(jax.devices()[:1], fsdp)
class Slow(t.toy.Source):
  def __next__(self):
    time.sleep(0.02)
    return super().__next__()
t.train(pathlib.Path({out!r}), t.config(steps=40), Slow())
"""


def test_killed_processes_lose_nothing(tmp_path, quick):
  """kill -9 at three moments; `benchmarks/resume.py` does the same with the model itself."""
  wanted, out = tmp_path / "a" / "run", tmp_path / "run"
  train(wanted, config(steps=40))
  root = Path(__file__).parents[1]
  paths = [str(root / "tests"), str(root / "benchmarks"), str(root)]
  code = KILLED.format(paths=paths, out=str(out))
  for lines in (1, 12, 25):
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    try:
      deadline = time.monotonic() + 120
      while time.monotonic() < deadline and process.poll() is None:
        file = out / "metrics.jsonl"
        if file.exists() and len(file.read_text().splitlines()) >= lines:
          break
        time.sleep(0.01)
    finally:
      os.kill(process.pid, signal.SIGKILL)
      process.wait()
    assert not (out / "final").exists()
  train(out, config(steps=40))
  assert_same(parameters(out / "final"), parameters(wanted / "final"))


@pytest.mark.parametrize("what", ["loss", "grad_norm"])
@pytest.mark.parametrize("bad", [1, 4, 7])
def test_a_loss_that_is_not_finite_stops_and_is_not_saved(tmp_path, monkeypatch, quick, bad, what):
  def broken(*args):
    run = stand_in(*args)

    def step(state, frozen, batch):
      number = int(state.step) + 1
      state, metrics = run(state, frozen, batch)
      return state, metrics | ({what: jnp.float32(math.nan)} if number == bad else {})

    return step

  monkeypatch.setattr(loop, "make_step", broken)
  out = tmp_path / "run"
  with pytest.raises(ValueError, match=f"step {bad} has loss") as caught:
    train(out)
  message = str(caught.value)
  assert "\n" not in message
  assert f"pictures: {100 * bad} ({100 * bad}.png), " in message
  saved = sorted(int(folder.name) for folder in (out / "steps").iterdir())
  assert all(number < bad for number in saved)
  good = str(out / "steps" / str(saved[-1])) if saved else "none was saved"
  assert f"last good checkpoint: {good}. " in message
  assert len(log.read_metrics(out / "metrics.jsonl")) == bad - 1
  assert not (out / "final").exists()


def test_the_best_evaluation_is_kept(tmp_path, quick):
  scores, seen = iter([10.0, 30.0, math.nan, 20]), []

  def evaluate(model):
    seen.append(flatten(jax.device_get(model.params))["decoder/norm/scale"])
    return {"cgf1": next(scores), "pairs": 3}

  out = tmp_path / "run"
  final = train(out, config(evaluate_every=2), evaluate=evaluate)
  assert checkpoint.load(out / "best").info["figures"] == {"cgf1": 30.0}
  assert checkpoint.load(final).info["figures"] == {"cgf1": 20.0}
  assert parameters(out / "best")["decoder/norm/scale"].tolist() == seen[1].tolist()
  assert parameters(final)["decoder/norm/scale"].tolist() == seen[3].tolist()
  lines = [x for x in log.read_metrics(out / "metrics.jsonl") if "evaluation/cgf1" in x]
  assert [x["step"] for x in lines] == [2, 4, 6, 7]
  leftovers = {path.name for path in out.iterdir()}
  assert leftovers == {"config.json", "metrics.jsonl", "steps", "best", "final"}


def test_control_c_that_others_catch_ends_the_run(tmp_path, quick, request):
  """As XLA's callbacks do. A shell's background jobs start with the signal ignored."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))

  class Swallowing(toy.Source):
    def __next__(self):
      if self.number == 3:
        with contextlib.suppress(KeyboardInterrupt):
          signal.raise_signal(signal.SIGINT)
      return super().__next__()

  out = tmp_path / "run"
  with terminal.interruptible(), pytest.raises(KeyboardInterrupt):
    train(out, source=Swallowing())
  assert len(log.read_metrics(out / "metrics.jsonl")) == 3
  train(out)  # goes on: it was of that command only


@pytest.mark.parametrize(("last", "told"), [(20.0, {"cgf1": 20.0}), (math.nan, {})])
def test_a_run_killed_before_its_end_keeps_the_last_figures(tmp_path, quick, last, told):
  out = tmp_path / "run"
  final = train(out, evaluate=lambda _: {"cgf1": last, "pairs": 3})
  shutil.rmtree(final)
  train(out, evaluate=lambda _: pytest.fail("evaluated again"))
  assert checkpoint.load(final).info["figures"] == told


def test_low_rank_factors_end_in_the_kernels(tmp_path, quick):
  settings = config(train="", lora={"rank": 2, "scale": 0.5, "kernels": r"fusion/.*/query/kernel"})
  out = tmp_path / "run"
  final = train(out, settings)
  after = parameters(final)
  assert after.keys() == toy.parameters().keys()
  moved = {path for path, x in toy.parameters().items() if not np.array_equal(after[path], x)}
  assert moved == {f"fusion/layers/{a}_attn/query/kernel" for a in ("self", "cross")}
  change = (
    after["fusion/layers/self_attn/query/kernel"]
    - toy.parameters()["fusion/layers/self_attn/query/kernel"]
  )
  ranks = np.linalg.matrix_rank(change, rtol=1e-3)
  assert ((ranks >= 1) & (ranks <= 2)).all()


def test_another_run_in_the_same_folder_is_refused(tmp_path, quick):
  out = tmp_path / "run"
  with pytest.raises(Stop):
    train(out, source=Stopping(1))
  before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
  with pytest.raises(ValueError, match=r"holds a run that differs in data\.batch, steps; "):
    train(out, config(steps=8, data={"batch": 8, "present": 1, "prompts": 2}))
  other = dataclasses.replace(start(), tokenizer=b"other")
  with pytest.raises(ValueError, match="holds a run that differs in start; "):
    loop.train(config(), other, toy.Source(), out)
  assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
  (out / "config.json").write_text("{")
  with pytest.raises(ValueError, match=r"config\.json is damaged"):
    train(out)


def test_a_folder_of_something_else_is_refused(tmp_path):
  (tmp_path / "file").touch()
  with pytest.raises(ValueError, match="is not empty and holds no training run"):
    train(tmp_path)


@pytest.mark.parametrize("values", [{"train": "norm"}, {"fsdp": 3}])
def test_a_run_that_cannot_begin_leaves_nothing(tmp_path, quick, values):
  with pytest.raises(ValueError):
    train(tmp_path / "run", config(**values))
  assert not (tmp_path / "run").exists()


def test_marks_tell_starts_apart():
  changed = dict(toy.parameters())
  changed["decoder/norm/scale"] = changed["decoder/norm/scale"] + 1
  marks = {
    start().mark(),
    dataclasses.replace(start(), parameters=changed).mark(),
    dataclasses.replace(start(), tokenizer=b"other").mark(),
  }
  assert len(marks) == 3
  assert start().mark() in marks


def test_batches_that_devices_cannot_share_are_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(loop, "make_mesh", lambda fsdp: sharding.make_mesh(jax.devices()[:8], fsdp))
  with pytest.raises(ValueError, match="a batch of 4 pictures cannot be shared by 8 devices"):
    train(tmp_path / "run")


# Parts.


def small_state():
  trained = {
    "decoder/norm/scale": np.arange(3, dtype=np.float32),
    "trunk/position": np.ones((2, 2)),
  }
  optimizer = make_optimizer(OptimizerConfig(name="muon"), trained | kernel(), toy.CONFIG.trunk, 3)
  return state.create(trained | kernel(), optimizer, jax.random.key(3), average=True)


def kernel():
  return {"scoring/query_project/kernel": np.eye(4, dtype=np.float32)}


def test_storage_gives_back_every_bit(tmp_path):
  storage, now = Storage(tmp_path / "steps", keep=1), small_state()
  assert storage.latest is None
  storage.save(3, now, {"batches": {"number": 7}, "best": None})
  storage.save(5, now.replace(step=jnp.int32(5)), {"batches": {"number": 9}, "best": 1.5})
  storage.close()
  again = Storage(tmp_path / "steps", keep=1)
  assert again.latest == 5
  empty = jax.tree.map(jnp.zeros_like, dataclasses.replace(now, key=jnp.zeros(())))
  found, progress = again.restore(empty.replace(key=jax.random.key(0)))
  again.close()
  assert progress == {"batches": {"number": 9}, "best": 1.5}
  assert int(found.step) == 5
  assert jax.tree.structure(found) == jax.tree.structure(now)
  assert (jax.random.key_data(found.key) == jax.random.key_data(now.key)).all()
  for got, want in zip(
    jax.tree.leaves(dataclasses.replace(found, key=0, step=0)),
    jax.tree.leaves(dataclasses.replace(now, key=0, step=0)),
    strict=True,
  ):
    np.testing.assert_array_equal(got, want)


def test_damaged_checkpoints_are_one_line(tmp_path):
  storage, now = Storage(tmp_path / "steps", keep=1), small_state()
  storage.save(1, now, {})
  storage.wait()
  for file in (tmp_path / "steps" / "1" / "state").rglob("*"):
    if file.is_file():
      file.write_bytes(b"")
  with pytest.raises(ValueError, match=r"steps/1 cannot be resumed from") as caught:
    storage.restore(now)
  assert "\n" not in str(caught.value)
  storage.close()


def test_metrics_of_steps_to_do_again_are_dropped(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 1, "loss": 2}\n{"step": 2, "loss": 1}\n{"step": 3, "loss": 1}\n{"st')
  file = log.MetricsLog(path, done=2)
  file.add({"step": 3, "loss": 0.123456789})
  file.close()
  assert [json.loads(line) for line in path.read_text().splitlines()] == [
    {"step": 1, "loss": 2}, {"step": 2, "loss": 1}, {"step": 3, "loss": 0.123457},
  ]  # fmt: skip


def test_plots_without_matplotlib_say_what_to_install(monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, "matplotlib", None)
  with pytest.raises(ImportError, match=r"pip install 'sam3-jax\[plots\]'"):
    log.check_picture(tmp_path / "plot.png")


@pytest.mark.parametrize("name", ["plot", "plot.foo", "plot.png.gz", "folder.png", "file/a/b.png"])
def test_pictures_that_cannot_be_drawn_are_refused(tmp_path, name):
  (tmp_path / "folder.png").mkdir()
  (tmp_path / "file").touch()
  message = "cannot write to" if "/" in name else r"must be a file that ends in \.png or \.svg\."
  with pytest.raises(ValueError, match=message) as caught:
    log.check_picture(tmp_path / name)
  assert str(tmp_path / name) in str(caught.value)
  assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"]


def test_pictures_may_go_to_folders_that_are_to_be_made(tmp_path):
  picture = tmp_path / "a" / "b" / "plot.svg"
  log.check_picture(picture)
  assert not picture.parent.exists()
  (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": NaN}\n')
  log.plot(tmp_path / "metrics.jsonl", picture, [])
  assert b"<svg" in picture.read_bytes()
  assert [path.name for path in picture.parent.iterdir()] == ["plot.svg"]


def test_plot_draws_what_matters_of_an_evaluation(monkeypatch, tmp_path):
  from matplotlib.figure import Figure

  drawn, save = [], Figure.savefig
  monkeypatch.setattr(
    Figure, "savefig", lambda self, *a, **k: drawn.append(self) or save(self, *a, **k)
  )
  figures = concept.Tally().figures()
  assert len(figures) > 20
  lines = [{"step": i, "loss": 1 / i, "grad_norm": i, "learning_rate": 1.0} for i in range(1, 5)]
  lines.append({"step": 4} | {f"evaluation/{name}": x for name, x in figures.items()})
  (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  wanted = [*loop.FIGURES, "f1_50", "cgf1", "unknown"]
  log.plot(tmp_path / "metrics.jsonl", tmp_path / "plot.png", wanted)
  assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
  names = ["loss", "grad_norm", "learning_rate", "cgf1", "il_mcc", "pmf1", "f1_50"]
  assert [axes.get_ylabel() for axes in drawn[0].axes] == names


def test_merging_before_a_step_keeps_frozen_arrays():
  trained, frozen = state.split(toy.parameters(), PATTERN)
  factors = lora.adapt(
    toy.parameters(), lora.LoraConfig(rank=1, kernels="masks/prompt_attn/.*"), jax.random.key(0)
  )
  tree = flatten(state.model_parameters(trained | factors, frozen, 1.0))
  assert_same(tree, toy.parameters())
  gathered = []
  gather = functools.partial(lambda seen, x: seen.extend(x) or x, gathered)
  state.model_parameters(trained, frozen, 1.0, gather)
  assert "masks/norm0/scale" in gathered
  assert "trunk/groups/global/norm1/scale" not in gathered  # gathered when its layer runs
