"""`sam3-jax train`: from files to a bundle, and errors in one line."""

import dataclasses
import functools
import json
import re

import jax
import numpy as np
import pytest
import training_files
import training_model
import training_runs
from command_runs import expect_error
from support import QUICK
from training_files import typed
from training_runs import TOKENIZER

from sam3_jax.checkpoint import bundle
from sam3_jax.cli.main import main
from sam3_jax.inputs.tokenizer import Tokenizer
from sam3_jax.training import log, run, sharding, step, trainer
from sam3_jax.training.config import TrainConfig
from sam3_jax.utils.param_tree import flatten

files = training_files.files
quick = training_runs.quick
START = {"model": training_model.CONFIG.to_dict()}


def assert_refused(files, capsys, more, message):
  assert message in expect_error(files, capsys, *typed(files, *more))


def test_training_from_files_to_a_bundle(files, quick, capsys):
  assert main(typed(files)) == 0
  assert capsys.readouterr().out == f"{files / 'out' / 'final'}: the trained checkpoint\n"
  loaded = bundle.load(files / "out" / "final")
  assert loaded.info["source"] == "3 steps of sam3-jax train from toy parameters"
  assert loaded.info["licence"] == "CC0-1.0"
  visual = flatten(jax.device_get(loaded.params["visual"]), "visual/")
  assert visual.keys() == training_model.visual_parameters().keys()
  for path, array in training_model.visual_parameters().items():
    np.testing.assert_array_equal(visual[path], array, err_msg=path)
  assert len(log.read_metrics(files / "out" / "metrics.jsonl")) == 3
  used = json.loads((files / "out" / "config.json").read_text())["config"]
  assert used["data"]["image_size"] == training_model.CONFIG.image_size
  assert used["data"]["mask_size"] == training_model.CONFIG.mask_size
  # The same command has nothing left to do; another run is refused.
  assert main(typed(files, "--quiet")) == 0
  assert capsys.readouterr().out == ""
  assert main(typed(files, "--steps", "5")) == 2
  assert "has a run that differs in steps; " in capsys.readouterr().err


def test_check_reads_all_data_and_writes_nothing(files, capsys):
  before = set(files.rglob("*"))
  content = json.loads((files / "data.json").read_text())
  content["annotations"].append(content["annotations"][0] | {"id": 9})
  (files / "data.json").write_text(json.dumps(content))
  options = [one for one in typed(files, "--check") if one not in ("--out", str(files / "out"))]
  assert main(options) == 0
  out, err = capsys.readouterr()
  assert out == "2 images to train on\n"
  assert err == "note: instances with the mask of another one, left out: 1 (annotation 9)\n"
  assert set(files.rglob("*")) == before


@pytest.mark.slow
def test_changed_annotations_are_not_resumed(files, quick, capsys):
  assert main(typed(files, "--quiet")) == 0
  content = json.loads((files / "data.json").read_text())
  content["annotations"].pop()
  (files / "data.json").write_text(json.dumps(content))
  assert main(typed(files, "--quiet")) == 2
  error = capsys.readouterr().err
  assert "started with other data: annotations: 1 file modified" in error
  assert error.count("\n") == 1


@pytest.mark.slow
def test_dense_pretraining_with_gradient_accumulation(files, monkeypatch):
  given = json.loads((files / "run.json").read_text())
  given |= {
    "objective": "dense",
    "gradient_accumulation_steps": 2,
    "steps": 2,
    "evaluate_every": 0,
  }
  (files / "run.json").write_text(json.dumps(given))
  monkeypatch.setattr(
    trainer, "make_mesh", lambda fsdp: sharding.make_mesh(jax.devices()[:1], fsdp)
  )
  quickly = functools.partial(step.make_step, compiler_options=QUICK)
  monkeypatch.setattr(trainer, "make_step", quickly)
  assert main(typed(files, "--train", "neck/.*")) == 0
  first, second = log.read_metrics(files / "out" / "metrics.jsonl")
  assert np.isfinite([first["loss"], second["loss"]]).all()
  assert second["loss"] != first["loss"]
  start, final = (bundle.load(files / name).params["neck"] for name in ("toy", "out/final"))
  moved = [bool((x != y).any()) for x, y in zip(*map(jax.tree.leaves, (start, final)), strict=True)]
  assert all(moved)


def test_evaluation_of_the_first_pairs(files, monkeypatch):
  from sam3_jax.evaluation import score

  calls = []
  monkeypatch.setattr(score, "evaluate", lambda *args: calls.append(args) or {"cgf1": 1.0})
  settings = TrainConfig(
    checkpoint="toy", evaluation_annotations=str(files / "data.json"),
    evaluation_images=str(files / "images"), evaluate_pairs=3,
  )  # fmt: skip
  evaluate = run._make_evaluate(settings, run.open_evaluation(settings, Tokenizer(TOKENIZER)))
  assert evaluate is not None
  assert evaluate("model") == {"cgf1": 1.0}
  ((model, pairs, images),) = calls
  assert (model, len(pairs), images) == ("model", 3, str(files / "images"))
  none = dataclasses.replace(settings, evaluation_annotations="")
  assert run.open_evaluation(none, Tokenizer(TOKENIZER)) is None


@pytest.mark.slow
def test_random_start_with_vocabulary_and_seed(monkeypatch):
  from sam3_jax.model import sam3

  monkeypatch.setattr(sam3, "init", lambda config, key: {"a": jax.random.normal(key, (3,))})
  settings = TrainConfig.from_dict(START | {"tokenizer": str(TOKENIZER), "seed": 4})
  begun = run.load_start(settings)
  assert begun.model == training_model.CONFIG
  assert begun.tokenizer == TOKENIZER.read_bytes()
  np.testing.assert_array_equal(begun.parameters["a"], jax.random.normal(jax.random.key(4), (3,)))
  small = dataclasses.replace(training_model.CONFIG.text, vocabulary=600)
  settings = dataclasses.replace(
    settings, model=dataclasses.replace(training_model.CONFIG, text=small)
  )
  assert Tokenizer(run.load_start(settings).tokenizer).vocabulary == 600


@pytest.mark.slow
def test_checkpoint_at_another_image_size(files):
  settings = TrainConfig(checkpoint=str(files / "toy"), image_size=48, window=3)
  begun = run.load_start(settings)
  assert (begun.model.image_size, begun.model.trunk.window) == (48, 3)
  assert (
    dataclasses.replace(
      begun.model, image_size=training_model.CONFIG.image_size, trunk=training_model.CONFIG.trunk
    )
    == training_model.CONFIG
  )
  assert set(begun.parameters) == set(training_model.parameters())
  with pytest.raises(
    ValueError, match=r"the grid of 5 patches .* multiple of the window, 2 patches"
  ):
    run.load_start(dataclasses.replace(settings, image_size=40, window=0))


@pytest.mark.slow
@pytest.mark.parametrize(
  ("more", "message"),
  [
    (["--checkpoint", "nowhere"], "no checkpoint 'nowhere'"),
    (["--data", "nowhere.json"], "there is no annotation file nowhere.json"),
    (["--images", "nowhere"], "nowhere"),
    (["--train", "norm"], "trainable 'norm' matches no parameter"),
    (["--train", "("], "trainable: '(' is not a regular expression"),
    (["--learning-rate", "-1"], "optimizer.learning_rate must be 0 or more; got -1.0."),
    (["--steps", "0"], "--steps"),
    (["--plot", "plot.foo"], "--plot must be a file that ends in .png or .svg; got plot.foo."),
    (["--plot", "/proc/none/plot.png"], "cannot write to /proc/none ("),
    (["--plot", __file__ + "/a/b.png"], "choose another directory with --plot."),
  ],
)
def test_errors_are_one_line_with_status_2(files, quick, capsys, more, message):
  assert_refused(files, capsys, more, message)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("kind", "values", "message"),
  [
    ("images", {"file_name": "none.png"}, "none.png: there is no such image"),
    ("images", {"id": 1}, "image 1: this id occurs twice"),
    (
      "annotations",
      {"bbox": [35, 10, 20, 20]},
      "box 35, 10, 20, 20 (x, y, width, height) extends beyond",
    ),
    ("annotations", {"segmentation": {"size": [40, 51], "counts": [2040]}}, "size is [40, 51]"),
    ("annotations", {"bbox": [5, 10, 45, 30]}, "is not that of its mask, 5, 10, 20, 20"),
    ("annotations", {"id": 2}, "annotation 2: this id occurs twice"),
    ("categories", {"name": "square " * 31}, "has 31 tokens, and at most"),
  ],
)
def test_data_errors_are_one_line_with_status_2(files, quick, capsys, kind, values, message):
  """For training and for evaluation data; nothing is written."""
  content = json.loads((files / "data.json").read_text())
  content[kind][0] |= values
  (files / "bad.json").write_text(json.dumps(content))
  bad, images = str(files / "bad.json"), str(files / "images")
  evaluation = ["--evaluation-data", bad, "--evaluation-images", images]
  for options in (["--data", bad], evaluation):
    assert_refused(files, capsys, options, message)


@pytest.mark.parametrize(
  ("more", "unit"),
  [({"objective": "dense"}, 16), ({"losses": {"cell_weight": 1.0}}, 4), ({}, 1)],
)
def test_mask_size_is_a_multiple_of_the_grid(more, unit):
  settings = TrainConfig.from_dict(START | {"mask_size": 17} | more)
  if unit == 1:  # masks are resized to any size
    assert run.with_sizes(settings, training_model.CONFIG).data.mask_size == 17
    return
  with pytest.raises(ValueError, match=f"mask_size must be a multiple of {unit} for .*; got 17"):
    run.with_sizes(settings, training_model.CONFIG)


@pytest.mark.parametrize("field", ["image_size", "mask_size"])
def test_data_sizes_are_the_models(field):
  size = getattr(training_model.CONFIG, field)
  given = TrainConfig.from_dict(START | {"data": {field: 77}})
  message = f"data.{field} must be the run's {field}, {size}; got 77: set {field} at the top"
  with pytest.raises(ValueError, match=re.escape(message)):
    run.with_sizes(given, training_model.CONFIG)
  settled = run.with_sizes(
    TrainConfig.from_dict(START | {"data": {field: size}}), training_model.CONFIG
  )
  assert run.with_sizes(settled, training_model.CONFIG) == settled
  assert getattr(settled.data, field) == size


def test_data_or_scenes_are_required(files, capsys):
  command_line = typed(files)
  del command_line[2:4]  # --data
  assert main(command_line) == 2
  assert "give either annotations (--data FILE --images DIR) or scenes" in capsys.readouterr().err


def test_checkpoint_or_model_is_required(files, capsys):
  command_line = typed(files)
  del command_line[6:8]  # --checkpoint
  assert main(command_line) == 2
  error = capsys.readouterr().err
  assert "give either checkpoint (--checkpoint sam3-tiny)" in error
  assert error.count("\n") == 1


def test_out_is_required(capsys):
  assert main(["train", "--steps", "3"]) == 2
  assert "--out DIR is required" in capsys.readouterr().err
