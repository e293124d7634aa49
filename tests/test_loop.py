"""The training loop: what it writes, and errors that stop it."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training_model
import training_runs
from training_runs import PATTERN, config, parameters, stand_in, train

from sam3_jax.checkpoint import bundle
from sam3_jax.training import log, sharding, state, trainer
from sam3_jax.utils.param_tree import flatten

quick = training_runs.quick


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
  loaded = bundle.load(final)
  assert loaded.info["name"] == "run"
  assert loaded.info["trained"] is True
  assert loaded.info["licence"] == "CC0-1.0"
  assert loaded.info["source"] == "7 steps of sam3-jax train from random parameters"
  after = parameters(final)
  moved = {
    path for path, x in training_model.parameters().items() if not np.array_equal(after[path], x)
  }
  assert moved == state.split(training_model.parameters(), PATTERN)[0].keys()
  assert train(out) == final  # nothing left to do


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
  assert bundle.load(out / "best").info["figures"] == {"cgf1": 30.0}
  assert bundle.load(final).info["figures"] == {"cgf1": 20.0}
  assert parameters(out / "best")["decoder/norm/scale"].tolist() == seen[1].tolist()
  assert parameters(final)["decoder/norm/scale"].tolist() == seen[3].tolist()
  lines = [x for x in log.read_metrics(out / "metrics.jsonl") if "evaluation/cgf1" in x]
  assert [x["step"] for x in lines] == [2, 4, 6, 7]
  leftovers = {path.name for path in out.iterdir()}
  assert leftovers == {"config.json", "metrics.jsonl", "steps", "best", "final"}


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


@pytest.mark.parametrize("values", [{"trainable": "norm"}, {"fsdp": 3}])
def test_run_that_cannot_begin_writes_nothing(tmp_path, quick, values):
  with pytest.raises(ValueError):
    train(tmp_path / "run", config(**values))
  assert not (tmp_path / "run").exists()


def test_batch_size_must_be_a_multiple_of_the_devices(tmp_path, monkeypatch):
  monkeypatch.setattr(
    trainer, "make_mesh", lambda fsdp: sharding.make_mesh(jax.devices()[:8], fsdp)
  )
  with pytest.raises(ValueError, match=r"data\.batch_size 4 must be a multiple of 8"):
    train(tmp_path / "run")
