"""`sam3-jax train`: configurations read and refused, faults in one line, files to a bundle."""

import dataclasses
import functools
import json
import math
import re

import jax
import numpy as np
import pytest
import toy
from PIL import Image
from support import QUICK
from test_loop import TOKENIZER, stand_in

from sam3_jax.checkpoint import bundle as checkpoint
from sam3_jax.cli.main import main
from sam3_jax.config import LiteTextConfig, TextConfig
from sam3_jax.inputs.tokenizer import Tokenizer
from sam3_jax.training import log, loop, sharding, step
from sam3_jax.training import run as command
from sam3_jax.training.config import TrainConfig, completed, differences, overlaid, read
from sam3_jax.utils.param_tree import flatten, nest

START = {"model": toy.CONFIG.to_dict()}


# Configurations.


def test_a_file_names_only_what_differs(tmp_path):
  (tmp_path / "run.toml").write_text(
    'checkpoint = "sam3-tiny"\nsteps = 20\nlora = {rank = 4}\n'
    "[optimizer]\nlearning_rate = 1\nmultipliers = {'trunk/.*' = 0.5, 'text/.*' = 0}\n"
    "[data]\nbatch = 2\n"
  )
  found = TrainConfig.from_dict(read(tmp_path / "run.toml"))
  assert found.steps == 20
  assert found.lora.rank == 4
  assert found.lora.kernels == TrainConfig(checkpoint="a").lora.kernels
  assert found.optimizer.multipliers == (("trunk/.*", 0.5), ("text/.*", 0.0))
  assert found.optimizer.learning_rate == 1.0
  assert isinstance(found.optimizer.learning_rate, float)
  (tmp_path / "run.json").write_text(json.dumps(found.to_dict()))
  assert TrainConfig.from_dict(read(tmp_path / "run.json")) == found


def test_models_and_scenes_are_read():
  values = START | {"scenes": {"count": 5, "size": [96, 64], "styles": ["noto"]}}
  found = TrainConfig.from_dict(values)
  assert found.model == toy.CONFIG
  assert found.scenes is not None
  assert found.scenes.size == (96, 64)
  assert found.scenes.styles == ("noto",)
  assert TrainConfig.from_dict(found.to_dict()) == found
  # A model may leave out what is as released.
  assert TrainConfig.from_dict({"model": {"queries": 10}}).model.queries == 10
  for text in (TextConfig(layers=2), LiteTextConfig(layers=4, mixers=True)):
    values = {"model": {"text": dataclasses.asdict(text)}}
    assert TrainConfig.from_dict(values).model.text == text


@pytest.mark.parametrize(
  ("values", "pattern"),
  [
    (START, ".*"),
    ({"checkpoint": "a"}, r"(?!trunk/|text/).*"),
    ({"checkpoint": "a", "train": "neck/.*"}, "neck/.*"),
  ],
)
def test_what_is_trained_by_default(values, pattern):
  assert TrainConfig.from_dict(values).trained == pattern


def test_low_rank_factors_are_trained_alone_by_default():
  pattern = TrainConfig.from_dict({"checkpoint": "a", "lora": {"rank": 1}}).trained
  assert not any(re.fullmatch(pattern, path) for path in toy.parameters())


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({}, "give either checkpoint (--checkpoint sam3-tiny), to start from its parameters, or model"),
    (START | {"checkpoint": "a"}, "give either checkpoint"),
    (START | {"image_size": 48}, "image_size and window belong into model"),
    (START | {"step": 3}, "step is no field of a training configuration; did you mean steps?"),
    (START | {"lossless": {}}, "lossless is no field of a training configuration; did you mean lo"),
    (START | {"sparkle": 3}, "sparkle is no field of a training configuration; TrainConfig has ch"),
    (
      START | {"optimizer": {"lr": 1.0}},
      "optimizer.lr is no field of a training configuration; Op",
    ),
    (START | {"optimizer": {"lerning_rate": 1.0}}, "configuration; did you mean learning_rate?"),
    (START | {"optimizer": 3}, "optimizer must be a table with the fields of OptimizerConfig"),
    (START | {"steps": "many"}, "steps must be of type int; got 'many'."),
    (START | {"steps": True}, "steps must be of type int; got True."),
    (START | {"steps": 0}, "steps must be 1 or more; got 0."),
    (START | {"average": 1.0}, "average must be in [0, 1); got 1.0."),
    (START | {"dtype": "half"}, "dtype must be one of auto, float32, bfloat16; got 'half'."),
    (START | {"objective": "x"}, "objective must be one of detection, dense, visual; got 'x'."),
    (START | {"objective": "dense", "masked": 1}, "masked and losses belong to the objective det"),
    (
      START | {"dense": {"objects": 4}},
      "dense has the weights of the objective dense, but the obj",
    ),
    (START | {"objective": "dense", "dense": {"inside": 0}}, "dense.inside must be in (0, 1]"),
    (START | {"objective": "dense", "losses": {"box_weight": 1}}, "masked and losses belong to"),
    (START | {"best": "ap"}, "best must be one of il_mcc, cgf1, "),
    (START | {"scenes": {"count": 0}}, "scenes.count must be 1 or more; got 0."),
    (START | {"scenes": {"absent": math.nan}}, "scenes.absent must be a finite number; got nan."),
    (START | {"scenes": {"absent": -1}}, "scenes.absent must be 0 or more; got -1.0."),
    (START | {"scenes": {"mixed": 2}}, "scenes.mixed must be in [0, 1]; got 2.0."),
    (START | {"scenes": {"styles": ["twemoji"]}}, "scenes.styles may name noto, noto-v1, fluent"),
    (START | {"scenes": {"size": [20, 640]}}, "scenes.size, height and width, must be 64 or more"),
    (START | {"train": "("}, "train: '(' is no regular expression"),
    (START | {"accumulate": 3}, "a batch of 8 images cannot be cut into 3 microbatches"),
    (START | {"lora": {"rank": -1}}, "lora.rank must be 1 or more"),
    (START | {"lora": {"scale": math.inf}}, "lora.scale must be a finite number; got inf."),
    (START | {"data": {"seed": -1}}, "data.seed must be a whole number from 0; got -1."),
    (START | {"losses": {"box_weight": -1}}, "losses.box_weight must be 0 or more; got -1.0."),
    (START | {"optimizer": {"multipliers": 3}}, "optimizer.multipliers must be a list; got 3."),
    (
      START | {"optimizer": {"multipliers": [["a", 1, 2]]}},
      "optimizer.multipliers[0] must have 2 values",
    ),
    ({"model": {"width": 3}}, "width 3 must be a multiple of the heads"),
    ({"model": {"trunk": {"stem": [{"stride": 2}]}}}, "model.trunk.stem[0]: "),
  ],
)
def test_bad_configurations_are_refused(values, message):
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
def test_files_that_are_no_configuration_are_refused(tmp_path, name, content, message):
  (tmp_path / name).write_text(content, encoding="latin-1")
  with pytest.raises(ValueError, match=message):
    read(tmp_path / name)


def test_a_missing_file_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"there is no configuration .*none\.toml"):
    read(tmp_path / "none.toml")


def test_options_stand_over_the_file(tmp_path):
  values = {"steps": 3, "data": {"batch": 2, "seed": 1}}
  typed = {"steps": None, "data.batch": 4, "images": tmp_path, "lora.rank": 0, "train": None}
  assert overlaid(values, typed) == {
    "steps": 3, "data": {"batch": 4, "seed": 1}, "images": str(tmp_path), "lora": {"rank": 0},
  }  # fmt: skip
  assert values == {"steps": 3, "data": {"batch": 2, "seed": 1}}


def test_configurations_of_earlier_versions_are_completed():
  """A field that came later has its default; styles left open are all of them, as they were."""
  values = START | {"objective": "dense", "dense": {"objects": 3}, "scenes": {"count": 5}}
  now = TrainConfig.from_dict(values).to_dict()
  then = {name: value for name, value in now.items() if name != "best"}
  then["scenes"] = now["scenes"] | {"styles": []}
  then["dense"] = {"objects": 3}
  assert completed(then) == now
  assert TrainConfig.from_dict(then).dense.objects == 3
  for other in ({"unknown": 1}, {}, None, 3):
    assert completed(other) == other


def test_differences_name_fields():
  old = {"a": 1, "b": {"c": 2, "d": 3}, "e": None}
  assert differences(old, old) == []
  assert differences(old, {"a": 1, "b": {"c": 3, "d": 3}, "f": 1}) == ["b.c", "f"]


# The command.


@pytest.fixture
def files(tmp_path):
  """A checkpoint of the toy model, and two images with a square each."""
  info = {"name": "toy", "licence": "CC0-1.0", "trained": False}
  folder = tmp_path / "toy"
  params = nest(toy.parameters() | toy.visual_parameters())
  checkpoint.save(folder, params, toy.CONFIG, TOKENIZER.read_bytes(), info=info)
  images = tmp_path / "images"
  images.mkdir()
  entries, found = [], []
  for number in range(2):
    pixels = np.full((40, 50, 3), 60 * number, np.uint8)
    pixels[10:30, 5:25] = 255
    Image.fromarray(pixels).save(images / f"{number}.png")
    entries.append({"id": number, "file_name": f"{number}.png", "width": 50, "height": 40})
    square = [5, 10, 25, 10, 25, 30, 5, 30]
    found.append(
      {
        "id": number + 1,
        "image_id": number,
        "category_id": 1,
        "segmentation": [square],
        "bbox": [5, 10, 20, 20],
        "area": 400,
        "iscrowd": 0,
      }
    )
  categories = [{"id": 1, "name": "square"}, {"id": 2, "name": "circle"}]
  content = {"images": entries, "annotations": found, "categories": categories}
  (tmp_path / "data.json").write_text(json.dumps(content))
  (tmp_path / "run.json").write_text(
    json.dumps(
      {
        "steps": 3,
        "save_every": 2,
        "train": "decoder/norm/.*",
        "evaluate_every": 2,
        "data": {"batch": 2, "prompts": 2, "present": 1, "objects": 2, "ahead": 0},
      }
    )
  )
  return tmp_path


@pytest.fixture
def quick(monkeypatch):
  monkeypatch.setattr(loop, "make_step", stand_in)
  monkeypatch.setattr(loop, "make_mesh", lambda fsdp: sharding.make_mesh(jax.devices()[:1], fsdp))


def typed(files, *more):
  return [
    "train", str(files / "run.json"), "--data", str(files / "data.json"),
    "--images", str(files / "images"), "--checkpoint", str(files / "toy"),
    "--out", str(files / "out"), *more,
  ]  # fmt: skip


def assert_refused(files, capsys, more, message):
  """One line, status 2, nothing written."""
  before = set(files.rglob("*"))
  assert main(typed(files, *more)) == 2
  error = capsys.readouterr().err
  assert message in error
  assert error.startswith("sam3-jax: error: ")
  assert error.count("\n") == 1
  assert set(files.rglob("*")) == before


def test_files_to_a_bundle(files, quick, capsys):
  assert main(typed(files)) == 0
  assert capsys.readouterr().out == f"{files / 'out' / 'final'}: the trained checkpoint\n"
  bundle = checkpoint.load(files / "out" / "final")
  assert bundle.info["source"] == "3 steps of sam3-jax train from toy parameters"
  assert bundle.info["licence"] == "CC0-1.0"
  visual = flatten(jax.device_get(bundle.params["visual"]), "visual/")
  assert visual.keys() == toy.visual_parameters().keys()
  for path, array in toy.visual_parameters().items():
    np.testing.assert_array_equal(visual[path], array, err_msg=path)
  assert len(log.read_metrics(files / "out" / "metrics.jsonl")) == 3
  used = json.loads((files / "out" / "config.json").read_text())["config"]
  assert used["data"]["image_size"] == toy.CONFIG.image_size
  assert used["data"]["mask_size"] == toy.CONFIG.mask_size
  # The same again has nothing to do; another run is refused.
  assert main(typed(files, "--quiet")) == 0
  assert capsys.readouterr().out == ""
  assert main(typed(files, "--steps", "5")) == 2
  assert "holds a run that differs in steps; " in capsys.readouterr().err


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


def test_a_run_with_corrected_annotations_is_not_resumed(files, quick, capsys):
  assert main(typed(files, "--quiet")) == 0
  content = json.loads((files / "data.json").read_text())
  content["annotations"].pop()
  (files / "data.json").write_text(json.dumps(content))
  assert main(typed(files, "--quiet")) == 2
  error = capsys.readouterr().err
  assert "started with other data: annotations: 1 file modified" in error
  assert error.count("\n") == 1


def test_the_real_step_on_cells_in_microbatches(files, monkeypatch):
  run = json.loads((files / "run.json").read_text())
  run |= {"objective": "dense", "accumulate": 2, "steps": 2, "evaluate_every": 0}
  (files / "run.json").write_text(json.dumps(run))
  monkeypatch.setattr(loop, "make_mesh", lambda fsdp: sharding.make_mesh(jax.devices()[:1], fsdp))
  quickly = functools.partial(step.make_step, compiler_options=QUICK)
  monkeypatch.setattr(loop, "make_step", quickly)
  assert main(typed(files, "--train", "neck/.*")) == 0
  first, second = log.read_metrics(files / "out" / "metrics.jsonl")
  assert np.isfinite([first["loss"], second["loss"]]).all()
  assert second["loss"] != first["loss"]
  start, final = (checkpoint.load(files / name).params["neck"] for name in ("toy", "out/final"))
  moved = [bool((x != y).any()) for x, y in zip(*map(jax.tree.leaves, (start, final)), strict=True)]
  assert all(moved)


def test_the_evaluation_is_of_the_first_pairs(files, monkeypatch):
  from sam3_jax.evaluation import score

  calls = []
  monkeypatch.setattr(score, "evaluate", lambda *args: calls.append(args) or {"cgf1": 1.0})
  settings = TrainConfig(
    checkpoint="toy", evaluation_annotations=str(files / "data.json"),
    evaluation_images=str(files / "images"), evaluate_pairs=3,
  )  # fmt: skip
  evaluate = command._evaluate(settings, command.open_evaluation(settings, Tokenizer(TOKENIZER)))
  assert evaluate is not None
  assert evaluate("model") == {"cgf1": 1.0}
  ((model, pairs, images),) = calls
  assert (model, len(pairs), images) == ("model", 3, str(files / "images"))
  none = dataclasses.replace(settings, evaluation_annotations="")
  assert command.open_evaluation(none, Tokenizer(TOKENIZER)) is None


def test_a_random_start_takes_a_vocabulary_and_a_seed(monkeypatch):
  from sam3_jax.model import sam3

  monkeypatch.setattr(sam3, "init", lambda config, key: {"a": jax.random.normal(key, (3,))})
  settings = TrainConfig.from_dict(START | {"tokenizer": str(TOKENIZER), "seed": 4})
  begun = command.load_start(settings)
  assert begun.model == toy.CONFIG
  assert begun.tokenizer == TOKENIZER.read_bytes()
  np.testing.assert_array_equal(begun.parameters["a"], jax.random.normal(jax.random.key(4), (3,)))
  small = dataclasses.replace(toy.CONFIG.text, vocabulary=600)
  settings = dataclasses.replace(settings, model=dataclasses.replace(toy.CONFIG, text=small))
  assert Tokenizer(command.load_start(settings).tokenizer).vocabulary == 600


def test_a_checkpoint_goes_on_at_another_resolution(files):
  settings = TrainConfig(checkpoint=str(files / "toy"), image_size=48, window=3)
  begun = command.load_start(settings)
  assert (begun.model.image_size, begun.model.trunk.window) == (48, 3)
  assert (
    dataclasses.replace(begun.model, image_size=toy.CONFIG.image_size, trunk=toy.CONFIG.trunk)
    == toy.CONFIG
  )
  assert set(begun.parameters) == set(toy.parameters())
  with pytest.raises(
    ValueError, match=r"the grid of 5 patches .* multiple of the window, 2 patches"
  ):
    command.load_start(dataclasses.replace(settings, image_size=40, window=0))


@pytest.mark.parametrize(
  ("more", "message"),
  [
    (["--checkpoint", "nowhere"], "no checkpoint 'nowhere'"),
    (["--data", "nowhere.json"], "there is no annotation file nowhere.json"),
    (["--images", "nowhere"], "nowhere"),
    (["--train", "norm"], "train 'norm' matches no parameter"),
    (["--train", "("], "train: '(' is no regular expression"),
    (["--learning-rate", "-1"], "optimizer.learning_rate must be 0 or more; got -1.0."),
    (["--steps", "0"], "--steps"),
    (["--plot", "plot.foo"], "--plot plot.foo must be a file that ends in .png or .svg."),
    (["--plot", "/proc/none/plot.png"], "cannot write to /proc/none ("),
    (["--plot", __file__ + "/a/b.png"], "choose another directory with --plot."),
  ],
)
def test_faults_are_one_line_with_status_2(files, quick, capsys, more, message):
  assert_refused(files, capsys, more, message)


@pytest.mark.parametrize(
  ("kind", "values", "message"),
  [
    ("images", {"file_name": "none.png"}, "none.png: there is no such image"),
    ("images", {"id": 1}, "image 1: this id occurs twice"),
    ("annotations", {"bbox": [35, 10, 20, 20]}, "box 35, 10, 20, 20 (x, y, width, height) leaves"),
    ("annotations", {"segmentation": {"size": [40, 51], "counts": [2040]}}, "size is [40, 51]"),
    ("annotations", {"bbox": [5, 10, 45, 30]}, "is not that of its mask, 5, 10, 20, 20"),
    ("annotations", {"id": 2}, "annotation 2: this id occurs twice"),
    ("categories", {"name": "square " * 31}, "has 31 tokens, and at most"),
  ],
)
def test_faults_of_the_data_are_one_line_with_status_2(files, quick, capsys, kind, values, message):
  """Of the data to train on, and of the data to evaluate on; nothing is written."""
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
def test_target_masks_are_whole_multiples_of_the_cells(more, unit):
  settings = TrainConfig.from_dict(START | {"mask_size": 17} | more)
  if unit == 1:  # masks are resized to any size
    assert command.settled(settings, toy.CONFIG).data.mask_size == 17
    return
  with pytest.raises(ValueError, match=f"mask_size must be a multiple of {unit} for .*; got 17"):
    command.settled(settings, toy.CONFIG)


@pytest.mark.parametrize("field", ["image_size", "mask_size"])
def test_sizes_of_the_data_are_the_model_s(field):
  size = getattr(toy.CONFIG, field)
  given = TrainConfig.from_dict(START | {"data": {field: 77}})
  message = f"data.{field} is the model's, here {size}; got 77: set {field} at the top"
  with pytest.raises(ValueError, match=re.escape(message)):
    command.settled(given, toy.CONFIG)
  settled = command.settled(TrainConfig.from_dict(START | {"data": {field: size}}), toy.CONFIG)
  assert command.settled(settled, toy.CONFIG) == settled
  assert getattr(settled.data, field) == size


def test_data_or_scenes_are_needed(files, capsys):
  command_line = typed(files)
  del command_line[2:4]  # --data
  assert main(command_line) == 2
  assert "give either annotations (--data FILE --images DIR) or scenes" in capsys.readouterr().err


def test_a_start_is_needed(files, capsys):
  command_line = typed(files)
  del command_line[6:8]  # --checkpoint
  assert main(command_line) == 2
  error = capsys.readouterr().err
  assert "give either checkpoint (--checkpoint sam3-tiny)" in error
  assert error.count("\n") == 1


def test_out_is_needed(capsys):
  assert main(["train", "--steps", "3"]) == 2
  assert "--out DIR is needed" in capsys.readouterr().err
