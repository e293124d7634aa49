"""Training the head for visual prompts: configurations, and the command."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training_files
import training_model
import training_runs
from support import QUICK
from training_files import typed

from sam3_jax.checkpoint import bundle
from sam3_jax.cli.main import main
from sam3_jax.evaluation import clicks
from sam3_jax.model.visual import head
from sam3_jax.training import log, sharding, step, trainer
from sam3_jax.training.config import TrainConfig
from sam3_jax.training.optimizer import stacked_axes
from sam3_jax.training.visual_init import new_head
from sam3_jax.utils.param_tree import flatten, nest

files = training_files.files
quick = training_runs.quick


@pytest.mark.slow
def test_visual_training_leaves_the_detector_unchanged(files, monkeypatch):
  """From a checkpoint without a head; all other parameters are equal, bit for bit."""
  params = {p: x.astype(jnp.bfloat16) for p, x in training_model.parameters().items()}
  info = {"name": "toy", "licence": "CC0-1.0", "trained": True, "figures": {"cgf1": 50.0}}
  tokenizer = (files / "toy" / "tokenizer.model").read_bytes()
  bundle.save(files / "bare", nest(params), training_model.CONFIG, tokenizer, info=info)
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
  loaded = bundle.load(files / "out" / "final")
  assert loaded.info["figures"] == {"cgf1": 50.0, **figured}
  got = flatten(jax.device_get(loaded.params))
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
def test_invalid_configurations_are_refused(files, quick, capsys, values, message):
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
