"""Resuming a training run after an interruption; directories of other runs are refused."""

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

import pytest
import training_model
import training_runs
from training_runs import Stop, Stopping, assert_same, config, parameters, start, train

from sam3_jax.checkpoint import bundle
from sam3_jax.training import log, loop
from sam3_jax.training.run_data import RUN_DATA_FILE
from sam3_jax.utils.lease import draft_path
from sam3_jax.utils.signals import interruptible

quick = training_runs.quick


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
import training_runs as t
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
  assert bundle.load(final).info["figures"] == kept


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


@pytest.mark.parametrize("name", ["file", ".other.json.a.partial", "config.json.partial", "steps"])
def test_directory_with_other_files_is_refused(tmp_path, name):
  (tmp_path / name).touch()
  with pytest.raises(ValueError, match="is not empty and contains no training run"):
    train(tmp_path)


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
