"""The work of `sam3-jax train` around the loop: checks, notes and the plot."""

import dataclasses
import io

import pytest
import training_model
from evaluation_data import target
from rich.console import Console
from training_runs import TOKENIZER, start

from sam3_jax.datasets import annotations
from sam3_jax.datasets.annotations import Pair
from sam3_jax.inputs.tokenizer import Tokenizer
from sam3_jax.training import run
from sam3_jax.training.config import TrainConfig
from sam3_jax.training.report import BUNDLE_METRICS

SETTINGS = {"checkpoint": "toy", "scenes": {"count": 3}, "data": {"batch_size": 1}}


@pytest.fixture
def started(monkeypatch):
  """Starts runs from the training model."""
  monkeypatch.setattr(run, "load_start", lambda *_: start())


def start_run(out, plot=None, console=None, **values):
  settings = TrainConfig.from_dict(SETTINGS | values)
  return run.run(settings, out, console or Console(quiet=True), plot=plot)


def test_invalid_plot_file_is_refused_before_training(tmp_path, monkeypatch):
  monkeypatch.setattr(run, "load_start", lambda *_: pytest.fail("training began"))
  with pytest.raises(ValueError, match=r"must be a file that ends in .*plot\.foo"):
    start_run(tmp_path / "run", tmp_path / "plot.foo")


def test_plot_has_the_bundle_metrics_and_the_best_metric(tmp_path, monkeypatch, started):
  monkeypatch.setattr(run, "train", lambda config, start, batches, out, **_: out / "final")
  calls = []
  monkeypatch.setattr(run.log, "plot", lambda *args: calls.append(args))
  image = tmp_path / "plot.png"
  assert start_run(tmp_path, image, best_metric="f1_50") == tmp_path / "final"
  assert calls == []  # no metrics yet
  (tmp_path / "metrics.jsonl").touch()
  start_run(tmp_path, image, best_metric="f1_50")
  figures = [*BUNDLE_METRICS, "f1_50"]
  assert calls == [(tmp_path / "metrics.jsonl", image, figures)]


@pytest.mark.parametrize("error", [ValueError("step 3 has loss nan"), KeyboardInterrupt()])
def test_plot_error_does_not_hide_the_training_error(tmp_path, monkeypatch, started, error):
  def train(config, start, batches, out, **_):
    (out / "metrics.jsonl").touch()
    raise error

  calls = []

  def plot(*args):
    calls.append(args)
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(run, "train", train)
  monkeypatch.setattr(run.log, "plot", plot)
  with pytest.raises(type(error)) as caught:
    start_run(tmp_path, tmp_path / "plot.png")
  assert caught.value is error
  assert len(calls) == 1


def test_image_directory_defaults_to_that_of_the_annotations(tmp_path, monkeypatch):
  seen = []

  def read(path, images, tokenizer, **_):
    seen.append((path, images))
    return [Pair(id=1, file_name="a.png", width=8, height=8, phrase="cat")]

  monkeypatch.setattr(annotations, "read_checked", read)
  tokenizer = Tokenizer(TOKENIZER, context=training_model.CONFIG.text.context)
  values = {"checkpoint": "toy", "annotations": "a/train.json", "evaluation_annotations": "b.json"}
  for given in ({}, {"images": "c", "evaluation_images": "d"}):
    settings = run.with_sizes(TrainConfig.from_dict(values | given), training_model.CONFIG)
    batches, left_out = run.open_data(settings, tokenizer)
    assert left_out == 0
    assert run.open_evaluation(settings, tokenizer) is not None
    assert str(batches.source.images) == given.get("images", "a")
  assert seen == [("a/train.json", "a"), ("b.json", "."), ("a/train.json", "c"), ("b.json", "d")]


@pytest.mark.parametrize("left_out", [0, 1])
def test_left_out_pairs_are_counted(tmp_path, monkeypatch, started, left_out):
  whole = Pair(id=1, file_name="a.png", width=8, height=8, phrase="cat")
  pairs = [whole] + [dataclasses.replace(whole, id=2, exhaustive=False)] * left_out
  monkeypatch.setattr(annotations, "read_checked", lambda *_, **__: pairs)
  monkeypatch.setattr(run, "train", lambda config, start, batches, out, **_: out / "final")
  output = io.StringIO()
  start_run(tmp_path, console=Console(file=output, width=20), scenes=None, annotations="a.json")
  note = "note: pairs left out of training, not exhaustive or with crowds: 1\n"
  assert output.getvalue() == note * left_out


def test_a_run_without_absent_phrases_says_so(tmp_path, monkeypatch, started):
  shown = Pair(1, "a.png", 8, 8, "cat", objects=(target(1, 1, 4, 4, size=(8, 8)),))
  monkeypatch.setattr(annotations, "read_checked", lambda *_, **__: [shown])
  monkeypatch.setattr(run, "train", lambda config, start, batches, out, **_: out / "final")
  for negatives, note in ((), f"note: {run.NEVER_ABSENT}\n"), (("a dog",), ""):
    output = io.StringIO()
    options = {"scenes": None, "annotations": "a.json", "data": {"negatives": negatives}}
    start_run(tmp_path, console=Console(file=output, width=20), **options)
    assert output.getvalue() == note
  for phrase, message in (
    ("  Cat", "data.negatives has '  Cat', but a.png shows it: remove it from the list"),
    (" ", "data.negatives: .*empty"),
  ):
    with pytest.raises(ValueError, match=message):
      start_run(tmp_path, scenes=None, annotations="a.json", data={"negatives": [phrase]})
