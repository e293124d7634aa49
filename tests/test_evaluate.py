"""Evaluation of a model: its predictions and metrics, and `sam3-jax evaluate`."""

import functools
import json
from pathlib import Path

import evaluation_data
import golden_model
import numpy as np
import pytest
from command_runs import expect_error
from evaluation_data import (
  IMAGES,
  all_metrics,
  coco_results,
  pair,
  perfect,
  target,
  write_json,
)
from pycocotools import mask as coco

from sam3_jax import Sam3, Tokenizer
from sam3_jax.cli.main import main
from sam3_jax.datasets import annotations
from sam3_jax.evaluation import cgf1, detect, error_gallery, predictions, run, score
from sam3_jax.evaluation.average_precision import average_precision
from sam3_jax.inference import predictor
from sam3_jax.inputs.prompts import BOXES_ALONE

folder = evaluation_data.folder
pairs = evaluation_data.pairs
coco_folder = evaluation_data.coco_folder

# A warning of pycocotools with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(autouse=True)
def accelerator_batches(monkeypatch):
  """Uses the batch sizes of an accelerator."""
  monkeypatch.setattr(predictor, "prompts_at_once", lambda platform: (4, 1))


@pytest.fixture(scope="module")
def model(tokenizer_path):
  """The tiny model with its query logits divided by five, so that some scores exceed 0.2."""
  params = with_scaled_scores(golden_model.parameters(), 0.2)
  return Sam3(golden_model.CONFIG, params, Tokenizer(tokenizer_path), dtype="float32")


@pytest.fixture
def ready(folder, model, monkeypatch) -> Path:
  """The directory, with a model that is loaded and compiled once for all tests."""
  monkeypatch.setattr(run.Sam3, "from_checkpoint", lambda *_, **__: model)
  return folder


@pytest.fixture
def fails(folder, capsys):
  """Runs `evaluate` with arguments with which it must fail; see `expect_error`."""
  return functools.partial(expect_error, folder, capsys, "evaluate")


def with_scaled_scores(params, factor):
  dense = params["scoring"]["prompt_project"]
  dense = {name: values * np.float32(factor) for name, values in dense.items()}
  return params | {"scoring": params["scoring"] | {"prompt_project": dense}}


class TestDetectPairs:
  @pytest.mark.slow
  def test_equals_one_call_per_pair(self, model, pairs, folder):
    """In any batch; masks may differ where a logit is almost zero."""
    for prompt in ("text", "text+box"):
      found = list(detect.detect_pairs(model, pairs, folder, prompt=prompt, min_score=0))
      assert sorted(one.id for one, _ in found) == [one.id for one in pairs]
      for one, got in found[:: len(found) - 1] + found[5:8]:
        embedding = model.encode(folder / one.file_name)
        [want] = model.decode(embedding, detect.as_prompt(one, prompt)).instances(0)
        assert len(got) == len(want) == golden_model.CONFIG.queries
        scores = [guess.score for guess in got]
        np.testing.assert_allclose(scores, want.scores, atol=1e-5)  # measured 3e-7
        assert scores == sorted(scores, reverse=True)
        boxes = np.clip(want.boxes, 0, [one.width, one.height] * 2)
        boxes[:, 2:] -= boxes[:, :2]
        np.testing.assert_allclose([guess.box for guess in got], boxes, atol=0.011)
        for i, guess in enumerate(got):
          assert np.mean(coco.decode(guess.rle) != want.masks[i]) < 0.01

  @pytest.mark.slow
  def test_each_image_is_read_once_and_nothing_compiled_twice(
    self, model, pairs, folder, monkeypatch
  ):
    list(detect.detect_pairs(model, pairs, folder))
    read, compiled = [], model.compilations
    original = detect.read_image
    monkeypatch.setattr(detect, "read_image", lambda path: read.append(path) or original(path))
    steps = []
    list(detect.detect_pairs(model, pairs[::-1], folder, progress=lambda *step: steps.append(step)))
    assert sorted(read) == sorted(folder / name for name in IMAGES)
    assert model.compilations == compiled <= 3  # prompts of one image, of several, and few images
    assert steps == [("e.png", 0.0), ("a.png", 0.5)]

  @pytest.mark.slow
  @pytest.mark.parametrize("count", [0, 1])
  def test_few_pairs(self, model, pairs, folder, count):
    found = list(detect.detect_pairs(model, pairs[:count], folder, min_score=0))
    assert [one.id for one, _ in found] == [one.id for one in pairs[:count]]

  @pytest.mark.slow
  def test_minimum_score_and_maximum_number(self, model, pairs, folder, monkeypatch):
    [(_, every)] = detect.detect_pairs(model, pairs[:1], folder, min_score=0)
    middle = every[4].score
    assert middle > every[5].score
    [(_, some)] = detect.detect_pairs(model, pairs[:1], folder, min_score=float(np.float32(middle)))
    assert len(some) == 5  # a score equal to the minimum is kept
    monkeypatch.setattr(detect, "MAX_PREDICTIONS", 3)
    [(_, few)] = detect.detect_pairs(model, pairs[:1], folder, min_score=0)
    assert [one.score for one in few] == pytest.approx([one.score for one in every[:3]])

  def test_prompts(self):
    objects = target(0, 0, 4, 4), target(2, 3, 5, 6), target(0, 0, 20, 20, crowd=True)
    assert detect.as_prompt(pair(*objects), "text").boxes == ()
    prompt = detect.as_prompt(pair(*objects), "box")
    assert (prompt.text, prompt.phrase, prompt.boxes) == (None, BOXES_ALONE, ((2, 3, 7, 9),))
    prompt = detect.as_prompt(pair(*objects), "text+box")
    assert (prompt.text, prompt.boxes) == ("cat", ((2, 3, 7, 9),))
    assert detect.as_prompt(pair(), "text+box").boxes == ()
    assert detect.as_prompt(pair(), "box") is None
    assert detect.as_prompt(pair(objects[2]), "box") is None

  @pytest.mark.slow
  def test_box_prompts_leave_out_pairs_without_objects(self, model, pairs, folder):
    found = {one.id for one, _ in detect.detect_pairs(model, pairs, folder, prompt="box")}
    assert found == {one.id for one in pairs if one.objects}

  def test_missing_image(self, model, pairs, folder):
    (folder / "e.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no image .*e\.png"):
      list(detect.detect_pairs(model, pairs, folder))

  def test_small_text_cache(self, model, pairs, folder, monkeypatch):
    want = list(detect.detect_pairs(model, pairs, folder, min_score=0))
    monkeypatch.setattr("sam3_jax.inference.text_cache.CAPACITY", 6)
    got = list(detect.detect_pairs(model, pairs, folder, min_score=0))
    assert got == want


class TestEvaluate:
  def test_equals_its_parts(self, model, pairs, folder):
    found = {one.id: g for one, g in detect.detect_pairs(model, pairs, folder, min_score=0.05)}
    want = all_metrics(found, pairs, score=0.2)
    assert want["il_recall"] > 0
    assert score.evaluate(model, pairs, folder, score=0.2, precision=True) == want
    fast = score.evaluate(model, pairs, folder, score=0.2)
    assert fast == {name: want[name] for name in fast}
    assert set(want) - set(fast) == set(average_precision(pairs, found))

  def test_new_parameters_are_not_recompiled(self, pairs, folder, tokenizer_path, model):
    before, compiled = score.evaluate(model, pairs, folder, score=0.2), model.compilations
    params = model.params
    try:
      model.params = with_scaled_scores(params, 0.9)
      after = score.evaluate(model, pairs, folder, score=0.2)
    finally:
      model.params = params
    assert after != before
    assert model.compilations == compiled

  def test_boxes_only(self, model, pairs, folder):
    got = score.evaluate(model, pairs, folder, prompt="box", score=0)
    assert got["pairs"] == got["positive_pairs"] == sum(bool(one.objects) for one in pairs)
    assert got["il_mcc"] == got["cgf1"] == 0


class TestErrorGallery:
  def test_sort_key(self):
    def row(truths, found, *matched):
      return cgf1.PairCounts(truths, found, np.array([*matched, *[0] * (10 - len(matched))]))

    rows = [row(3, 3), row(1, 0), row(2, 2, 1), row(2, 2, 1, 1), row(0, 0)]
    assert sorted(rows, key=error_gallery.sort_key) == rows


class TestCommand:
  def test_a_model(self, ready, model, pairs, capsys):
    typed = ["--data", "data.json", "--checkpoint", "sam3-tiny", "--threshold", "0.2"]
    assert main(["evaluate", *typed, "--worst", "2", "--out", "new/metrics.json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "14 pairs" in out
    assert all(line in out for line in ("cgF1", "IL_MCC", "new/metrics.json", "new/worst/index"))
    files = sorted(str(path.relative_to("new")) for path in Path("new").rglob("*.*"))
    drawn = [f"worst/{i:03d}-{kind}.jpg" for i in (1, 2) for kind in ("prediction", "truth")]
    assert files == ["metrics.json", "predictions.json", *drawn, "worst/index.html"]
    metrics = json.loads(Path("new/metrics.json").read_text())
    assert {"cgf1", "il_mcc", "pmf1", "cgf1_50", "cgf1_75", "pairs"} <= set(metrics)
    assert metrics["pairs"] == len(pairs)
    assert metrics == score.evaluate(model, pairs, ready, score=0.2, precision=True)
    page = Path("new/worst/index.html").read_text()
    assert page.count("<img") == 4
    assert all(name.removeprefix("worst/") in page for name in drawn)

  @pytest.mark.parametrize("prompt", ["text", "box", "text+box"])
  def test_predictions_score_as_the_model_did(self, ready, capsys, prompt):
    options = ["--data", "data.json", "--prompt", prompt, "--threshold", "0.2", "--quiet"]
    assert main(["evaluate", *options]) == 0
    again = [*options, "--predictions", "predictions.json", "--out", "again.json"]
    assert main(["evaluate", *again]) == 0
    assert json.loads(Path("again.json").read_text()) == json.loads(
      Path("metrics.json").read_text()
    )
    assert capsys.readouterr() == ("", "")
    assert not Path("worst").exists()

  def test_coco_results_without_a_pair_are_noted(self, coco_folder, capsys):
    rows = coco_results()
    assert len(rows) == 4
    other = rows[0] | {"category_id": 77}
    write_json("found.json", [other, *rows[::-1], other])
    assert main(["evaluate", "--data", "coco.json", "--predictions", "found.json"]) == 0
    metrics = json.loads(Path("metrics.json").read_text())
    assert (metrics["positive_pairs"], metrics["il_mcc"]) == (4, pytest.approx(1))
    assert metrics["cgf1"] > 99
    assert "note: 2 predictions are left out: no pair has" in capsys.readouterr().err

  def test_predictions_of_a_model_have_the_ids_of_the_coco_file(self, ready, coco_folder, capsys):
    options = ["--data", "coco.json", "--threshold", "0.2", "--quiet"]
    assert main(["evaluate", *options]) == 0
    rows = json.loads(Path("predictions.json").read_text())
    truth = annotations.read("coco.json")
    assert {(row["image_id"], row["category_id"]) for row in rows} <= {
      (one.image_id, one.category_ids[0]) for one in truth
    }
    again = ["--predictions", "predictions.json", "--out", "again.json"]
    assert main(["evaluate", *options, *again]) == 0
    assert Path("again.json").read_text() == Path("metrics.json").read_text()

  def test_several_truths_and_images_elsewhere(self, ready, pairs, capsys):
    (ready / "truths").mkdir()
    emptied = json.loads(Path("data.json").read_text()) | {"annotations": []}
    write_json("truths/other.json", emptied)
    write_json("found.json", predictions.to_coco(perfect(pairs), pairs))
    typed = ["--data", "truths/other.json", "--data", "data.json", "--predictions", "found.json"]
    assert main(["evaluate", *typed, "--images", ".", "--worst", "99"]) == 0
    metrics = json.loads(Path("metrics.json").read_text())
    assert (metrics["truths"], metrics["il_mcc"]) == (2, pytest.approx(1))
    assert metrics["cgf1"] > 99
    assert len(list(Path("worst").glob("*.jpg"))) == 2 * len(pairs)
    assert not Path("predictions.json").exists()
    assert "found.json, 14 pairs" in capsys.readouterr().out

  def test_untrained_is_noted(self, ready, model, monkeypatch, capsys):
    monkeypatch.setattr(model, "info", {"trained": False})
    assert main(["evaluate", "--data", "data.json", "--prompt", "box"]) == 0
    out, err = capsys.readouterr()
    assert err.startswith("note: sam3-tiny is untrained")
    assert "cgF1 say nothing; see pmF1" in err
    assert out

  def test_full_disk_leaves_no_files(self, ready, fails, monkeypatch):
    def overlay(*args):
      raise OSError(28, "No space left on device")

    monkeypatch.setattr(error_gallery, "overlay", overlay)
    Path("worst").mkdir()
    assert "No space left on device" in fails("--data", "data.json", "--worst", "1")

  @pytest.mark.parametrize(
    ("typed", "message"),
    [
      ([], "--data"),
      (["--data", "missing.json"], "there is no annotation file missing.json"),
      (["--data", "a.png"], "a.png is not valid JSON"),
      (["--data", "empty.json"], "nothing to score: of 0 pairs"),
      (["--data", "data.json", "--predictions", "none.json"], "no file of predictions none.json"),
      (
        ["--data", "data.json", "--predictions", "data.json"],
        "data.json does not hold predictions",
      ),
      (["--data", "data.json", "--predictions", "unknown.json"], "image_id 9999"),
      (["--data", "data.json", "--data", "empty.json"], "annotation file 2 lacks pair 0"),
      (["--data", "data.json", "--images", "sub"], "there is no such image"),
      (["--data", "data.json", "--checkpoint", "x", "--predictions", "y"], "exclude each other"),
      (["--data", "data.json", "--threshold", "2"], "--threshold must be between 0 and 1; got 2.0"),
      (["--data", "data.json", "--threshold", "nan"], "got nan"),
      (["--data", "data.json", "--prompt", "points"], "--prompt"),
      (["--data", "data.json", "--worst", "-1"], "--worst"),
      (["--data", "data.json", "--out", "sub"], "--out sub is a directory"),
      (["--data", "data.json", "--out", "a.png/metrics.json"], "cannot write to a.png"),
      (["--data", "data.json", "--out", "data.json"], "data.json is an input and would be"),
      (["--data", "data.json", "--device", "tpu"], "JAX finds only cpu"),
    ],
  )
  def test_faults(self, ready, fails, typed, message):
    write_json(
      "empty.json", {"images": [], "annotations": [], "categories": [{"id": 1, "name": "x"}]}
    )
    write_json("unknown.json", [{"image_id": 9999, "score": 1}])
    assert message in fails(*typed)

  def test_missing_checkpoint(self, folder, fails):
    assert "sam3-jax convert" in fails("--data", "data.json", "--checkpoint", "nowhere")

  def test_all_faults_of_the_data_in_one_report(self, ready, fails):
    """Those of annotations before the model is loaded; those of images and phrases afterwards."""
    values = json.loads(Path("data.json").read_text())
    (ready / "b.png").unlink()
    values["images"][0]["text_input"] = "word " * 40
    write_json("bad.json", values)
    line = fails("--data", "bad.json")
    assert "2 faults" in line
    assert "tokens" in line
    assert "b.png: there is no such image" in line
    values["annotations"][0]["segmentation"]["counts"] = "11"
    values["annotations"][1]["segmentation"]["size"] = [4, 4]
    write_json("bad.json", values)
    line = fails("--data", "bad.json")
    assert "2 faults" in line
    assert "runs cover" in line
    assert "size is [4, 4]" in line
