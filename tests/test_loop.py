"""The training loop: output, interruptions and errors. A stand-in for the step compiles quickly."""

import contextlib
import dataclasses
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
import pytest
import training_model

from sam3_jax.checkpoint import bundle as checkpoint
from sam3_jax.training import log, loop, sharding, state, trainer
from sam3_jax.training.config import TrainConfig
from sam3_jax.training.run_data import RUN_DATA_FILE
from sam3_jax.training.start import Start
from sam3_jax.training.state import TrainState
from sam3_jax.utils.lease import draft_path
from sam3_jax.utils.param_tree import flatten
from sam3_jax.utils.signals import interruptible

PATTERN = r"decoder/norm/.*|scoring/query_project/.*"


TOKENIZER = Path(__file__).parent / "goldens" / "tokenizer.model"


def stand_in(settings, optimizer, schedule, mesh, state, frozen):
  """A cheap step that depends on everything that a real step depends on."""

  @jax.jit
  def run(state, frozen, batch):
    push = jnp.cos(batch.ids.sum() + jax.random.normal(jax.random.fold_in(state.key, state.step)))
    gradients = {path: jnp.sin(x) + push for path, x in state.trained.items()}
    updates, moments = optimizer.update(gradients, state.optimizer, state.trained)
    trained = {path: x + updates[path] for path, x in state.trained.items()}
    from sam3_jax.training.state import update_ema

    ema = update_ema(state.ema, trained, state.step, settings.ema_decay)
    metrics = {"loss": push + 2, "grad_norm": push * push, "learning_rate": schedule(state.step)}
    return TrainState(state.step + 1, trained, moments, ema, state.key), metrics

  return run


@pytest.fixture
def quick(monkeypatch):
  monkeypatch.setattr(trainer, "make_step", stand_in)
  monkeypatch.setattr(
    trainer, "make_mesh", lambda fsdp: sharding.make_mesh(jax.devices()[:1], fsdp)
  )


def config(**values):
  fields = {
    "model": training_model.CONFIG.to_dict(), "trainable": PATTERN,
    "steps": 7, "save_every": 2, "ema_decay": 0.5,
    "data": {"batch_size": 4, "present_prompts": 1, "prompts_per_image": 2},
    "optimizer": {"warmup_steps": 2, "cooldown_steps": 2, "learning_rate": 1e-2},
  }  # fmt: skip
  return TrainConfig.from_dict(fields | values)


def start():
  return Start(
    training_model.CONFIG,
    training_model.parameters(),
    TOKENIZER.read_bytes(),
    {"licence": "CC0-1.0"},
  )


def train(out, settings=None, source=None, **options):
  settings = settings or config()
  return loop.train(settings, start(), source or training_model.RandomBatches(), out, **options)


def parameters(bundle):
  return flatten(jax.device_get(checkpoint.load(bundle).params))


def assert_same(found, wanted):
  assert found.keys() == wanted.keys()
  for path in wanted:
    np.testing.assert_array_equal(found[path], wanted[path], err_msg=path)


@pytest.mark.slow
def test_run_writes_metrics_checkpoints_and_a_bundle(tmp_path, quick):
  out = tmp_path / "run"
  final = train(out)
  assert final == out / "final"
  lines = log.read_metrics(out / "metrics.jsonl")
  assert [line["step"] for line in lines] == list(range(1, 8))
  assert {"loss", "grad_norm", "learning_rate", "images_per_second", "seconds"} <= lines[0].keys()
  assert [line["learning_rate"] for line in lines][:2] == [0, 0.005]
  assert sorted(int(folder.name) for folder in (out / "steps").iterdir()) == [
    6,
    7,
  ]  # max_to_keep: 2
  bundle = checkpoint.load(final)
  assert bundle.info["name"] == "run"
  assert bundle.info["trained"] is True
  assert bundle.info["licence"] == "CC0-1.0"
  assert bundle.info["source"] == "7 steps of sam3-jax train from random parameters"
  after = parameters(final)
  moved = {
    path for path, x in training_model.parameters().items() if not np.array_equal(after[path], x)
  }
  assert moved == state.split(training_model.parameters(), PATTERN)[0].keys()
  assert train(out) == final  # nothing left to do


class Stop(Exception):
  pass


class Stopping(training_model.RandomBatches):
  """Raises `Stop` before a step."""

  def __init__(self, after):
    super().__init__()
    self.after = after

  def __next__(self):
    if self.number == self.after:
      raise Stop
    return super().__next__()


@pytest.mark.slow
@pytest.mark.parametrize("after", [0, 1, 2, 5])
def test_interrupted_run_resumes_to_the_same_parameters(tmp_path, quick, after):
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
from sam3_jax.training import sharding, trainer
import jax, time
trainer.make_step = t.stand_in
trainer.make_mesh = lambda fsdp: sharding.make_mesh(jax.devices()[:1], fsdp)
class Slow(t.training_model.RandomBatches):
  def __next__(self):
    time.sleep(0.02)
    return super().__next__()
t.train(pathlib.Path({out!r}), t.config(steps=40), Slow())
"""


@pytest.mark.slow
def test_killed_process_resumes_to_the_same_parameters(tmp_path, quick):
  """kill -9 at three times; `benchmarks/resume.py` does the same with a real step."""
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
def test_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch, quick, bad, what):
  def broken(*args):
    run = stand_in(*args)

    def step(state, frozen, batch):
      number = int(state.step) + 1
      state, metrics = run(state, frozen, batch)
      return state, metrics | ({what: jnp.float32(math.nan)} if number == bad else {})

    return step

  monkeypatch.setattr(trainer, "make_step", broken)
  out = tmp_path / "run"
  with pytest.raises(ValueError, match=f"step {bad} has loss") as caught:
    train(out)
  message = str(caught.value)
  assert "\n" not in message
  assert f"images: {100 * bad} ({100 * bad}.png), " in message
  saved = sorted(int(folder.name) for folder in (out / "steps").iterdir())
  assert all(number < bad for number in saved)
  good = str(out / "steps" / str(saved[-1])) if saved else "none was saved"
  assert f"last good checkpoint: {good}. " in message
  assert len(log.read_metrics(out / "metrics.jsonl")) == bad - 1
  assert not (out / "final").exists()


@pytest.mark.slow
def test_best_evaluation_is_saved(tmp_path, quick):
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


@pytest.mark.slow
@pytest.mark.parametrize("written", [True, False])
def test_best_bundle_is_recovered_after_a_kill(tmp_path, quick, written):
  """Killed between the two renames of a replacement."""
  out = tmp_path / "run"
  figures = iter([30.0, 20.0])
  with pytest.raises(Stop):
    train(out, config(evaluate_every=2), Stopping(3), evaluate=lambda _: {"cgf1": next(figures)})
  wanted = parameters(out / "best")
  os.rename(out / "best", out / ".best.old")
  if written:
    (out / ".best.new").mkdir()
  train(out, config(evaluate_every=2), evaluate=lambda _: {"cgf1": 20.0})
  assert_same(parameters(out / "best"), wanted)
  names = {path.name for path in out.iterdir()}
  assert names == {"config.json", "metrics.jsonl", "steps", "best", "final"}


def test_swallowed_control_c_ends_the_run(tmp_path, quick, request):
  """XLA's callbacks swallow it. A shell's background jobs start with the signal ignored."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))

  class Swallowing(training_model.RandomBatches):
    def __next__(self):
      if self.number == 3:
        with contextlib.suppress(KeyboardInterrupt):
          signal.raise_signal(signal.SIGINT)
      return super().__next__()

  out = tmp_path / "run"
  with interruptible(), pytest.raises(KeyboardInterrupt):
    train(out, source=Swallowing())
  assert len(log.read_metrics(out / "metrics.jsonl")) == 3
  train(out)  # resumes: only that command was interrupted


@pytest.mark.slow
@pytest.mark.parametrize(("last", "kept"), [(20.0, {"cgf1": 20.0}), (math.nan, {})])
def test_run_killed_at_its_end_keeps_the_latest_metrics(tmp_path, quick, last, kept):
  out = tmp_path / "run"
  final = train(out, evaluate=lambda _: {"cgf1": last, "pairs": 3})
  shutil.rmtree(final)
  train(out, evaluate=lambda _: pytest.fail("evaluated again"))
  assert checkpoint.load(final).info["figures"] == kept


@pytest.mark.slow
def test_low_rank_factors_are_merged_into_the_kernels(tmp_path, quick):
  settings = config(
    trainable="", lora={"rank": 2, "scale": 0.5, "kernels": r"fusion/.*/query/kernel"}
  )
  out = tmp_path / "run"
  final = train(out, settings)
  after = parameters(final)
  assert after.keys() == training_model.parameters().keys()
  moved = {
    path for path, x in training_model.parameters().items() if not np.array_equal(after[path], x)
  }
  assert moved == {f"fusion/layers/{a}_attn/query/kernel" for a in ("self", "cross")}
  change = (
    after["fusion/layers/self_attn/query/kernel"]
    - training_model.parameters()["fusion/layers/self_attn/query/kernel"]
  )
  ranks = np.linalg.matrix_rank(change, rtol=1e-3)
  assert ((ranks >= 1) & (ranks <= 2)).all()


def test_other_run_in_the_same_directory_is_refused(tmp_path, quick):
  out = tmp_path / "run"
  with pytest.raises(Stop):
    train(out, source=Stopping(1))
  before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
  with pytest.raises(ValueError, match=r"has a run that differs in data\.batch_size, steps; "):
    train(
      out, config(steps=8, data={"batch_size": 8, "present_prompts": 1, "prompts_per_image": 2})
    )
  other = dataclasses.replace(start(), tokenizer=b"other")
  with pytest.raises(ValueError, match="has a run that differs in the starting checkpoint; "):
    loop.train(config(), other, training_model.RandomBatches(), out)
  assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
  (out / "config.json").write_text("{")
  with pytest.raises(ValueError, match=r"config\.json is damaged"):
    train(out)


def test_run_without_newer_fields_is_resumed(tmp_path, quick):
  """Fields that its file lacks have their defaults; an invalid file is damaged."""
  out = tmp_path / "run"
  with pytest.raises(Stop):
    train(out, source=Stopping(3))
  file = out / "config.json"
  values = json.loads(file.read_text())
  for content in ([1], {"start": values["start"]}):
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
      train(out)
  del values["config"]["dense"]
  file.write_text(json.dumps(values))
  with pytest.raises(ValueError, match=r"has a run that differs in steps; "):
    train(out, config(steps=8))
  train(out)
  assert len(log.read_metrics(out / "metrics.jsonl")) == 7


def test_run_of_format_version_1_is_refused_with_the_new_names(tmp_path, quick):
  out = tmp_path / "run"
  with pytest.raises(Stop):
    train(out, source=Stopping(1))
  file = out / "config.json"
  values = json.loads(file.read_text())
  assert values.pop("format_version") == 2
  values["config"]["average"] = values["config"].pop("ema_decay")
  values["config"]["data"]["batch"] = values["config"]["data"].pop("batch_size")
  file.write_text(json.dumps(values))
  names = r"average to ema_decay, data\.batch to data\.batch_size\."
  with pytest.raises(ValueError, match=f"format version 1, .* resumes version 2; .* {names}"):
    train(out)
  file.write_text(json.dumps(values | {"format_version": 3}))
  with pytest.raises(ValueError, match="has a run of format version 3, "):
    train(out)


def test_run_killed_before_its_configuration_was_written_restarts(tmp_path, quick):
  """It left identities of data, and drafts, which are removed if their process is dead."""
  out = tmp_path / "run"
  out.mkdir()
  (out / RUN_DATA_FILE).write_text("{}")
  # The name of a draft: this machine, a process that has ended, its start time, a random number.
  tag = re.sub(r"-\d+-\d+-", "-99999999-1-", draft_path(out / "x").name.removeprefix(".x."))
  drafts = [out / f".{name}.{tag}" for name in ("config.json", RUN_DATA_FILE)]
  for draft in drafts:
    draft.touch()
  living = draft_path(out / "config.json")
  living.touch()
  train(out)
  names = {path.name for path in out.iterdir()}
  assert names == {"config.json", "metrics.jsonl", "steps", "final", living.name}


@pytest.mark.parametrize("name", [".other.json.a.partial", "config.json.partial", "steps"])
def test_directory_with_other_files_is_refused(tmp_path, name):
  (tmp_path / name).touch()
  with pytest.raises(ValueError, match="is not empty and contains no training run"):
    train(tmp_path)


def test_directory_of_something_else_is_refused(tmp_path):
  (tmp_path / "file").touch()
  with pytest.raises(ValueError, match="is not empty and contains no training run"):
    train(tmp_path)


@pytest.mark.parametrize("values", [{"trainable": "norm"}, {"fsdp": 3}])
def test_run_that_cannot_begin_writes_nothing(tmp_path, quick, values):
  with pytest.raises(ValueError):
    train(tmp_path / "run", config(**values))
  assert not (tmp_path / "run").exists()


def test_checksums_of_starts_differ():
  changed = dict(training_model.parameters())
  changed["decoder/norm/scale"] = changed["decoder/norm/scale"] + 1
  marks = {
    start().checksum(),
    dataclasses.replace(start(), parameters=changed).checksum(),
    dataclasses.replace(start(), tokenizer=b"other").checksum(),
  }
  assert len(marks) == 3
  assert start().checksum() in marks


def test_batch_size_must_be_a_multiple_of_the_devices(tmp_path, monkeypatch):
  monkeypatch.setattr(
    trainer, "make_mesh", lambda fsdp: sharding.make_mesh(jax.devices()[:8], fsdp)
  )
  with pytest.raises(ValueError, match=r"data\.batch_size 4 must be a multiple of 8"):
    train(tmp_path / "run")
