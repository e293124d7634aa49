"""Configurations of training: files, values, defaults, and errors."""

import dataclasses
import json
import math
import re

import pytest
import training_model

from sam3_jax.config import LiteTextConfig, TextConfig
from sam3_jax.training.config import TrainConfig
from sam3_jax.training.config_file import differences, override, read, with_defaults

START = {"model": training_model.CONFIG.to_dict()}


def test_missing_fields_have_defaults(tmp_path):
  (tmp_path / "run.toml").write_text(
    'checkpoint = "sam3-tiny"\nsteps = 20\nlora = {rank = 4}\n'
    "[optimizer]\nlearning_rate = 1\n"
    "learning_rate_multipliers = {'trunk/.*' = 0.5, 'text/.*' = 0}\n"
    "[data]\nbatch_size = 2\n"
  )
  found = TrainConfig.from_dict(read(tmp_path / "run.toml"))
  assert found.steps == 20
  assert found.lora.rank == 4
  assert found.lora.kernels == TrainConfig(checkpoint="a").lora.kernels
  assert found.optimizer.learning_rate_multipliers == (("trunk/.*", 0.5), ("text/.*", 0.0))
  assert found.optimizer.learning_rate == 1.0
  assert isinstance(found.optimizer.learning_rate, float)
  (tmp_path / "run.json").write_text(json.dumps(found.to_dict()))
  assert TrainConfig.from_dict(read(tmp_path / "run.json")) == found


def test_model_and_scenes():
  values = START | {"scenes": {"count": 5, "size": [96, 64], "styles": ["noto"]}}
  found = TrainConfig.from_dict(values)
  assert found.model == training_model.CONFIG
  assert found.scenes is not None
  assert found.scenes.size == (96, 64)
  assert found.scenes.styles == ("noto",)
  assert TrainConfig.from_dict(found.to_dict()) == found
  # Missing fields of a model have their defaults.
  assert TrainConfig.from_dict({"model": {"queries": 10}}).model.queries == 10
  for text in (TextConfig(layers=2), LiteTextConfig(layers=4, mixers=True)):
    values = {"model": {"text": dataclasses.asdict(text)}}
    assert TrainConfig.from_dict(values).model.text == text


@pytest.mark.parametrize(
  ("values", "pattern"),
  [
    (START, ".*"),
    ({"checkpoint": "a"}, r"(?!trunk/|text/).*"),
    ({"checkpoint": "a", "trainable": "neck/.*"}, "neck/.*"),
  ],
)
def test_trainable_parameters_by_default(values, pattern):
  assert TrainConfig.from_dict(values).trainable_pattern == pattern


@pytest.mark.slow
def test_only_low_rank_factors_are_trainable_by_default():
  pattern = TrainConfig.from_dict({"checkpoint": "a", "lora": {"rank": 1}}).trainable_pattern
  assert not any(re.fullmatch(pattern, path) for path in training_model.parameters())


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({}, "give either checkpoint (--checkpoint sam3-tiny), to start from its parameters, or model"),
    (START | {"checkpoint": "a"}, "give either checkpoint"),
    (START | {"image_size": 48}, "set image_size and window in model"),
    (START | {"step": 3}, "'step' is not a field of a training configuration; did you mean steps?"),
    (
      START | {"lossless": {}},
      "'lossless' is not a field of a training configuration; did you mean lo",
    ),
    (
      START | {"sparkle": 3},
      "'sparkle' is not a field of a training configuration; TrainConfig has ch",
    ),
    (
      START | {"optimizer": {"lr": 1.0}},
      "'optimizer.lr' is not a field of a training configuration; Op",
    ),
    (START | {"optimizer": {"lerning_rate": 1.0}}, "configuration; did you mean learning_rate?"),
    (START | {"optimizer": 3}, "optimizer must be an object with the fields of OptimizerConfig"),
    (START | {"steps": "many"}, "steps must be of type int; got 'many'."),
    (START | {"steps": True}, "steps must be of type int; got True."),
    (START | {"steps": 0}, "steps must be 1 or more; got 0."),
    (START | {"ema_decay": 1.0}, "ema_decay must be in [0, 1); got 1.0."),
    (START | {"dtype": "half"}, "dtype must be one of auto, float32, bfloat16; got 'half'."),
    (
      START | {"objective": "x"},
      "objective must be one of detection, dense, visual, video; got 'x'.",
    ),
    (
      START | {"objective": "dense", "mask_prompts": 1},
      "mask_prompts and losses are for the objective det",
    ),
    (
      START | {"dense": {"sampled_objects": 4}},
      "dense is for the objective dense, but the objective is",
    ),
    (
      START | {"objective": "dense", "dense": {"min_coverage": 0}},
      "dense.min_coverage must be in (0, 1]",
    ),
    (
      START | {"objective": "dense", "losses": {"box_weight": 1}},
      "mask_prompts and losses are for",
    ),
    (START | {"best_metric": "ap"}, "best_metric must be one of il_mcc, cgf1, "),
    (START | {"scenes": {"count": 0}}, "scenes.count must be 1 or more; got 0."),
    (
      START | {"scenes": {"absent_per_present": math.nan}},
      "scenes.absent_per_present must be a finite number; got nan.",
    ),
    (
      START | {"scenes": {"absent_per_present": -1}},
      "scenes.absent_per_present must be 0 or more; got -1.0.",
    ),
    (
      START | {"scenes": {"mixed_style_probability": 2}},
      "scenes.mixed_style_probability must be in [0, 1]; got 2.0.",
    ),
    (
      START | {"scenes": {"styles": ["twemoji"]}},
      "scenes.styles must be of the training styles noto, noto-v1, fluent",
    ),
    (START | {"scenes": {"size": [20, 640]}}, "scenes.size (height, width) must be at least 64"),
    (START | {"trainable": "("}, "trainable: '(' is not a regular expression"),
    (
      START | {"gradient_accumulation_steps": 3},
      "data.batch_size 8 cannot be divided into 3 microbatches; change data.batch_size or",
    ),
    (START | {"lora": {"rank": -1}}, "lora.rank must be 0 (no adaptation) or more"),
    (START | {"lora": {"scale": math.inf}}, "lora.scale must be a finite number; got inf."),
    (START | {"data": {"seed": -1}}, "data.seed must be a whole number from 0; got -1."),
    (START | {"losses": {"box_weight": -1}}, "losses.box_weight must be 0 or more; got -1.0."),
    (
      START | {"optimizer": {"learning_rate_multipliers": 3}},
      "optimizer.learning_rate_multipliers must be a list; got 3.",
    ),
    (
      START | {"optimizer": {"learning_rate_multipliers": [["a", 1, 2]]}},
      "optimizer.learning_rate_multipliers[0] must have 2 values",
    ),
    ({"model": {"width": 3}}, "width 3 must be a multiple of the heads"),
    ({"model": {"trunk": {"stem": [{"stride": 2}]}}}, "model.trunk.stem[0] lacks width, blocks."),
  ],
)
def test_invalid_configurations_are_refused(values, message):
  with pytest.raises(ValueError, match=re.escape(message)) as caught:
    TrainConfig.from_dict(values)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("a.toml", "steps = ", "is not readable toml"),
    ("a.json", "{", "is not readable json"),
    ("a.json", "[1]", "must hold one object with fields such as steps"),
    ("a.json", "\xff", "must hold|not readable"),
  ],
)
def test_invalid_files_are_refused(tmp_path, name, content, message):
  (tmp_path / name).write_text(content, encoding="latin-1")
  with pytest.raises(ValueError, match=message):
    read(tmp_path / name)


def test_missing_file(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"configuration .*none\.toml not found"):
    read(tmp_path / "none.toml")


def test_options_override_the_file(tmp_path):
  values = {"steps": 3, "data": {"batch_size": 2, "seed": 1}}
  typed = {
    "steps": None,
    "data.batch_size": 4,
    "images": tmp_path,
    "lora.rank": 0,
    "trainable": None,
  }
  assert override(values, typed) == {
    "steps": 3, "data": {"batch_size": 4, "seed": 1}, "images": str(tmp_path), "lora": {"rank": 0},
  }  # fmt: skip
  assert values == {"steps": 3, "data": {"batch_size": 2, "seed": 1}}


def test_configurations_of_earlier_releases_get_defaults():
  """A newer field has its default; empty styles are all styles, as before."""
  values = START | {"objective": "dense", "dense": {"sampled_objects": 3}, "scenes": {"count": 5}}
  now = TrainConfig.from_dict(values).to_dict()
  then = {name: value for name, value in now.items() if name != "best_metric"}
  then["scenes"] = now["scenes"] | {"styles": []}
  then["dense"] = {"sampled_objects": 3}
  assert with_defaults(then) == now
  assert TrainConfig.from_dict(then).dense.sampled_objects == 3
  for other in ({"unknown": 1}, {}, None, 3):
    assert with_defaults(other) == other


def test_differences():
  old = {"a": 1, "b": {"c": 2, "d": 3}, "e": None}
  assert differences(old, old) == []
  assert differences(old, {"a": 1, "b": {"c": 3, "d": 3}, "f": 1}) == ["b.c", "f"]
