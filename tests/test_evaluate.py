"""Evaluation around cgF1: the model's predictions, average precision, files, the command."""

import dataclasses
import io
import json
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image
from pycocotools import mask as coco
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from sam3_jax.evaluation.coco import average_precision
from test_concept import figures

from sam3_jax import Sam3, Tokenizer
from sam3_jax.cli import main
from sam3_jax.datasets import annotations
from sam3_jax.datasets.annotations import Object, Pair
from sam3_jax.evaluation import concept, error_gallery, predict, predictions, run, score
from sam3_jax.evaluation.predictions import Prediction
from sam3_jax.inference import predictor
from sam3_jax.inputs.prompts import BOXES_ALONE
from sam3_jax.outputs.rle import runs as rle_runs

GOLDEN = Path(__file__).parent / "goldens" / "cgf1" / "one"
SCENES = Path(__file__).parent / "scenes"
# Of each image its size and phrases: full batches of prompts, leftovers, and a single pair.
IMAGES = {
  "a.png": ((40, 60), ["cat", "dog", "ear", "bus", "tail"]),
  "b.png": ((33, 20), ["cat"]),
  "sub/c.png": ((64, 48), ["dog", "nose"]),
  "d.png": ((20, 30), ["cat", "dog", "ear", "bus"]),
  "e.png": ((24, 24), ["paw", "cat"]),
}

# pycocotools' own, with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(autouse=True)
def batches(monkeypatch):
  """Those of an accelerator."""
  monkeypatch.setattr(predictor, "prompts_at_once", lambda: (4, 1))


@pytest.fixture(scope="module")
def model(tokenizer_path):
  """The tiny model, its queries' logits divided by five: so that there are scores over 0.2."""
  params = less_certain(tiny.parameters(), 0.2)
  return Sam3(tiny.CONFIG, params, Tokenizer(tokenizer_path), dtype="float32")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
  """Where the command runs: images and their annotations, in SA-Co's layout."""
  monkeypatch.chdir(tmp_path)
  rng = np.random.default_rng(0)
  (tmp_path / "sub").mkdir()
  entries, objects = [], []
  for name, ((height, width), phrases) in IMAGES.items():
    Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(tmp_path / name)
    for i, phrase in enumerate(phrases):
      number = 10 * len(entries)
      entries.append(
        {"id": number, "file_name": name, "width": width, "height": height, "text_input": phrase}
      )
      for j in range(i % 3):  # every third phrase is a negative
        box = [j, 2 * j, 8 + i, 6 + j]
        mask = rectangle((height, width), *box)
        objects.append(
          {"id": len(objects), "image_id": number, "bbox": box, "segmentation": mask, "iscrowd": 0}
        )
  write_json("data.json", {"images": entries, "annotations": objects})
  return tmp_path


@pytest.fixture
def pairs(folder) -> list[Pair]:
  return annotations.read("data.json")


@pytest.fixture
def coco_folder(folder) -> Path:
  """The same images with annotations in COCO's layout, whose ids are nobody's places."""
  names = {18: "dog", 3: "cat", 44: "bus", 90: "tail"}
  images, objects = [], []
  for place, (name, ((height, width), _)) in enumerate(IMAGES.items()):
    images.append({"id": 500 - 7 * place, "file_name": name, "width": width, "height": height})
    for category in list(names)[: place % 3]:
      box = [place, 2, 8 + category // 10, 6]
      objects.append(
        {"id": len(objects) + 1, "image_id": images[-1]["id"], "category_id": category,
         "bbox": box, "segmentation": rectangle((height, width), *box), "iscrowd": 0, "area": 50}
      )  # fmt: skip
  categories = [{"id": number, "name": name} for number, name in names.items()]
  write_json("coco.json", {"images": images, "annotations": objects, "categories": categories})
  return folder


@pytest.fixture
def ready(folder, model, monkeypatch) -> Path:
  """The folder, and the model loaded and compiled once for all tests."""
  monkeypatch.setattr(run.Sam3, "from_checkpoint", lambda *_, **__: model)
  return folder


@pytest.fixture
def fails(folder, capsys):
  """Runs the command, which must fail in one line and leave the folder as it was; the line."""

  def call(*typed: object) -> str:
    before = listing(folder)
    status = main.main(["evaluate", *[str(one) for one in typed]])
    captured = capsys.readouterr()
    assert status == 2, captured
    assert captured.out == ""
    assert captured.err.startswith("sam3-jax: error: ")
    assert captured.err.count("\n") == 1, captured.err
    assert listing(folder) == before
    return captured.err

  return call


def less_certain(params, factor):
  dense = params["scoring"]["prompt_project"]
  dense = {name: values * np.float32(factor) for name, values in dense.items()}
  return params | {"scoring": params["scoring"] | {"prompt_project": dense}}


def listing(folder: Path) -> list[tuple[str, bytes]]:
  return sorted((str(p), p.read_bytes() if p.is_file() else b"") for p in folder.rglob("*"))


def write_json(path, values) -> None:
  Path(path).write_text(json.dumps(values))


def rectangle(size, x, y, w, h) -> dict:
  mask = np.zeros(size, np.uint8, order="F")
  mask[y : y + h, x : x + w] = 1
  rle = coco.encode(mask)
  return {"size": list(size), "counts": rle["counts"].decode()}


def pair(*objects: Object, number=1, phrase="cat", exhaustive=True, size=(20, 20)) -> Pair:
  return Pair(number, "a.png", size[1], size[0], phrase, exhaustive, objects)


def thing(*box, crowd=False, size=(20, 20)) -> Object:
  return Object(rectangle(size, *box), box, crowd)


def coco_results() -> list[dict]:
  """The truth of coco.json as results, with its own ids."""
  keys = ("image_id", "category_id", "bbox", "segmentation")
  truth = json.loads(Path("coco.json").read_text())["annotations"]
  return [{key: one[key] for key in keys} | {"score": 0.9} for one in truth]


def perfect(pairs) -> dict[int, list[Prediction]]:
  """The truth as predictions."""
  return {p.id: [Prediction(0.9, one.box, one.rle) for one in p.objects] for p in pairs}


class TestPredict:
  def test_equals_one_call_a_pair(self, model, pairs, folder):
    """Whatever is batched with whatever; masks may differ where a logit is nearly zero."""
    for prompt in ("text", "text+box"):
      found = list(predict.predict(model, pairs, folder, prompt=prompt, least=0))
      assert sorted(one.id for one, _ in found) == [one.id for one in pairs]
      for one, got in found[:: len(found) - 1] + found[5:8]:
        embedding = model.encode(folder / one.file_name)
        asked = predict.as_prompt(one, prompt)
        [want] = model.decode(embedding, asked).instances(0)
        assert len(got) == len(want) == tiny.CONFIG.queries
        scores = [guess.score for guess in got]
        np.testing.assert_allclose(scores, want.scores, atol=1e-5)  # measured 3e-7
        assert scores == sorted(scores, reverse=True)
        boxes = np.clip(want.boxes, 0, [one.width, one.height] * 2)
        boxes[:, 2:] -= boxes[:, :2]
        np.testing.assert_allclose([guess.box for guess in got], boxes, atol=0.011)
        for i, guess in enumerate(got):
          assert np.mean(coco.decode(guess.rle) != want.masks[i]) < 0.01

  def test_each_image_is_read_once_and_nothing_compiled_twice(
    self, model, pairs, folder, monkeypatch
  ):
    list(predict.predict(model, pairs, folder))
    read, compiled = [], model.compilations
    original = predict.read_image
    monkeypatch.setattr(predict, "read_image", lambda path: read.append(path) or original(path))
    steps = []
    list(predict.predict(model, pairs[::-1], folder, progress=lambda *step: steps.append(step)))
    assert sorted(read) == sorted(folder / name for name in IMAGES)
    assert model.compilations == compiled <= 3  # one image's prompts, several's, few images'
    assert steps == [("e.png", 0.0), ("a.png", 0.5)]

  @pytest.mark.parametrize("count", [0, 1])
  def test_few_pairs(self, model, pairs, folder, count):
    found = list(predict.predict(model, pairs[:count], folder, least=0))
    assert [one.id for one, _ in found] == [one.id for one in pairs[:count]]

  def test_scores_and_numbers_are_bounded(self, model, pairs, folder, monkeypatch):
    [(_, every)] = predict.predict(model, pairs[:1], folder, least=0)
    middle = every[4].score
    assert middle > every[5].score
    [(_, some)] = predict.predict(model, pairs[:1], folder, least=float(np.float32(middle)))
    assert len(some) == 5  # a score of just so much stays
    monkeypatch.setattr(predict, "MOST", 3)
    [(_, few)] = predict.predict(model, pairs[:1], folder, least=0)
    assert [one.score for one in few] == pytest.approx([one.score for one in every[:3]])

  def test_what_is_asked(self):
    objects = thing(0, 0, 4, 4), thing(2, 3, 5, 6), thing(0, 0, 20, 20, crowd=True)
    assert predict.as_prompt(pair(*objects), "text").boxes == ()
    asked = predict.as_prompt(pair(*objects), "box")
    assert (asked.text, asked.phrase, asked.boxes) == (None, BOXES_ALONE, ((2, 3, 7, 9),))
    asked = predict.as_prompt(pair(*objects), "text+box")
    assert (asked.text, asked.boxes) == ("cat", ((2, 3, 7, 9),))
    assert predict.as_prompt(pair(), "text+box").boxes == ()
    assert predict.as_prompt(pair(), "box") is None
    assert predict.as_prompt(pair(objects[2]), "box") is None

  def test_pairs_without_objects_are_left_out_of_boxes(self, model, pairs, folder):
    found = {one.id for one, _ in predict.predict(model, pairs, folder, prompt="box")}
    assert found == {one.id for one in pairs if one.objects}

  def test_a_missing_image(self, model, pairs, folder):
    (folder / "e.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no image .*e\.png"):
      list(predict.predict(model, pairs, folder))

  def test_phrases_are_forgotten_in_time(self, model, pairs, folder, monkeypatch):
    want = list(predict.predict(model, pairs, folder, least=0))
    monkeypatch.setattr("sam3_jax.inference.text_cache.REMEMBERED", 6)
    got = list(predict.predict(model, pairs, folder, least=0))
    assert got == want


class TestEvaluate:
  def test_equals_its_parts(self, model, pairs, folder):
    found = {one.id: g for one, g in predict.predict(model, pairs, folder, least=0.05)}
    want = figures(found, pairs, score=0.2)
    assert want["il_recall"] > 0
    assert score.evaluate(model, pairs, folder, score=0.2, precision=True) == want
    fast = score.evaluate(model, pairs, folder, score=0.2)
    assert fast == {name: want[name] for name in fast}
    assert set(want) - set(fast) == set(average_precision(pairs, found))

  def test_new_parameters_compile_nothing(self, pairs, folder, tokenizer_path, model):
    before, compiled = score.evaluate(model, pairs, folder, score=0.2), model.compilations
    params = model.params
    try:
      model.params = less_certain(params, 0.9)
      after = score.evaluate(model, pairs, folder, score=0.2)
    finally:
      model.params = params
    assert after != before
    assert model.compilations == compiled

  def test_boxes_only(self, model, pairs, folder):
    got = score.evaluate(model, pairs, folder, prompt="box", score=0)
    assert got["pairs"] == got["positive_pairs"] == sum(bool(one.objects) for one in pairs)
    assert got["il_mcc"] == got["cgf1"] == 0


class TestScorer:
  def test_pairs_that_count(self):
    open_end = pair(number=2, exhaustive=False)
    assert [one.id for one in score.Scorer([pair(), open_end]).pairs] == [1]
    full = pair(thing(0, 0, 5, 5), number=3)
    assert [one.id for one in score.Scorer([pair(), full], prompt="box").pairs] == [3]
    truths = [pair(), full], [pair(exhaustive=False), pair(number=3)]
    assert [one.id for one in score.Scorer(*truths).pairs] == [3]

  @pytest.mark.parametrize(
    ("truths", "prompt", "message"),
    [
      ([[]], "text", "of 0 pairs none is annotated exhaustively"),
      ([[pair(exhaustive=False)]], "text", "of 1 pairs none is annotated"),
      ([[pair()]], "box", "of 1 pairs none has an object and is annotated"),
      ([[pair()], []], "text", "truth 2 lacks pair 1 (a.png, 'cat')"),
      ([[pair()], [pair(phrase="dog")]], "text", "has something else as pair 1"),
      ([[pair()], [pair(size=(9, 9))]], "text", "has something else as pair 1"),
      ([[pair()], [dataclasses.replace(pair(), image_id=1)]], "text", "has something else as"),
    ],
  )
  def test_faults(self, truths, prompt, message):
    with pytest.raises(ValueError) as fault:
      score.Scorer(*truths, prompt=prompt)
    assert message in str(fault.value)

  def test_masks_and_boxes_choose_their_truth_separately(self):
    """Of two annotators one has the mask, the other the box."""
    mask_only = Object(rectangle((20, 20), 0, 0, 9, 9), (10, 10, 3, 3))
    box_only = Object(rectangle((20, 20), 10, 10, 3, 3), (0, 0, 9, 9))
    scorer = score.Scorer([pair(mask_only)], [pair(box_only)])
    scorer.add(scorer.pairs[0], [Prediction(0.9, (0, 0, 9, 9), mask_only.rle)])
    metrics = scorer.metrics()
    assert metrics["pmf1"] == metrics["box_pmf1"] > 99


class TestAveragePrecision:
  def test_equals_pycocotools_on_files(self):
    truth = annotations.read(GOLDEN / "truth.json")
    rows = json.loads((GOLDEN / "predictions.json").read_text())
    got = average_precision(truth, predictions.read(GOLDEN / "predictions.json", truth)[0])
    for kind, prefix in (("segm", ""), ("bbox", "box_")):
      with redirect_stdout(io.StringIO()):
        whole = COCO()
        whole.dataset = json.loads((GOLDEN / "truth.json").read_text())
        for one in whole.dataset["annotations"]:
          one["id"] += 1  # 0 would stand for "none"
        whole.createIndex()
        work = COCOeval(whole, whole.loadRes(rows), kind)
        work.params.useCats = 0
        work.evaluate()
        work.accumulate()
        work.summarize()
      want = [work.stats[i] for i in (0, 1, 2, 8)]
      names = ("ap", "ap_50", "ap_75", "ar_100")
      assert [got[prefix + name] for name in names] == pytest.approx([100 * v for v in want])
      assert 5 < got[prefix + "ap"] < 95

  def test_perfect_none_and_quiet(self, capsys):
    pairs = [pair(thing(0, 0, 5, 5)), pair(number=2)]
    full = average_precision(pairs, perfect(pairs))
    assert full["ap"] == full["box_ap"] == full["ap_small"] == pytest.approx(100)
    assert full["ap_large"] is None
    assert average_precision(pairs, {})["ap"] == 0
    assert average_precision(pairs[1:], {})["ap"] is None
    assert capsys.readouterr() == ("", "")

  def test_crowds_are_no_false_alarm(self):
    truth = [pair(thing(0, 0, 5, 5), thing(10, 10, 8, 8, crowd=True))]
    assert average_precision(truth, perfect(truth))["ap"] == pytest.approx(100)


class TestFiles:
  def test_there_and_back(self, pairs, folder):
    found = {key: value for key, value in perfect(pairs).items() if value}
    write_json("found.json", predictions.to_coco(found, pairs))
    assert predictions.read("found.json", pairs) == (found, 0)
    write_json("none.json", [])
    assert predictions.read("none.json", pairs) == ({}, 0)

  def test_coco_results_by_image_and_category(self, coco_folder):
    """Rows as any tool for COCO writes them, in any order, against the pairs of read phrases."""
    truth = annotations.read("coco.json")
    rows = coco_results()
    write_json("found.json", rows[::-1])
    found, left_out = predictions.read("found.json", truth)
    assert left_out == 0
    for one in truth:
      got = sorted(guess.box for guess in found.get(one.id, []))
      assert got == sorted(thing.box for thing in one.objects), one

  def test_our_results_fit_the_coco_file(self, coco_folder, capsys):
    truth = annotations.read("coco.json")
    found = {key: value for key, value in perfect(truth).items() if value}
    rows = predictions.to_coco(found, truth)
    write_json("found.json", rows)
    assert predictions.read("found.json", truth) == (found, 0)
    theirs = COCO("coco.json")
    results = theirs.loadRes("found.json")  # raises if an image is not in the file
    for image, category in {(row["image_id"], row["category_id"]) for row in rows}:
      asked = {"imgIds": [image], "catIds": [category]}
      got = [results.anns[i]["bbox"] for i in results.getAnnIds(**asked)]
      assert sorted(got) == sorted(theirs.anns[i]["bbox"] for i in theirs.getAnnIds(**asked))
    assert len(rows) == len(theirs.anns)
    capsys.readouterr()

  def test_categories_of_one_name_are_one_pair(self, folder):
    truth = [dataclasses.replace(pair(number=0), image_id=7, category_ids=(4, 9))]
    row = {"image_id": 7, "score": 1, "segmentation": rectangle((20, 20), 0, 0, 5, 5)}
    write_json("found.json", [row | {"category_id": category} for category in (9, 4, 5)])
    found, left_out = predictions.read("found.json", truth)
    assert (len(found[0]), left_out) == (2, 1)
    assert {one["category_id"] for one in predictions.to_coco(found, truth)} == {4}

  def test_coco_boxes_are_pixels_however_small(self, coco_folder):
    [row, *_] = coco_results()
    write_json("found.json", [row | {"bbox": [0, 0, 1, 1]}])
    found, _ = predictions.read("found.json", annotations.read("coco.json"))
    assert [one.box for several in found.values() for one in several] == [(0, 0, 1, 1)]

  @pytest.mark.parametrize(
    ("change", "message"),
    [
      ({"image_id": 0}, "prediction 0 has image_id 0, which is no image of the data; give"),
      ({"image_id": "500"}, "image_id '500'"),
      ({"category_id": None}, "category_id None, which is no category"),
      ({"category_id": [18]}, "category_id [18]"),
      ({"category_id": 1}, "none of its 1 predictions is of a category that the data ask"),
    ],
  )
  def test_faults_against_coco(self, coco_folder, change, message):
    write_json("found.json", [coco_results()[0] | change])
    with pytest.raises(ValueError) as fault:
      predictions.read("found.json", annotations.read("coco.json"))
    assert message in str(fault.value)
    assert "\n" not in str(fault.value)

  def test_other_forms(self, folder):
    """Boxes as fractions or left out; runs as a list."""
    truth = [pair(size=(20, 40))]
    rle = rectangle((20, 40), 10, 5, 20, 10)
    runs = {"size": [20, 40], "counts": rle_runs(rle).tolist()}
    row = {"image_id": 1, "score": 1, "segmentation": runs}
    write_json("fractions.json", [row | {"bbox": [0.25, 0.25, 0.5, 0.5]}])
    write_json("no_boxes.json", [row])
    write_json("pixels.json", [row | {"bbox": [10, 5, 20, 10], "segmentation": rle}])
    want = {1: [Prediction(1.0, (10, 5, 20, 10), rle)]}
    for name in ("fractions", "no_boxes", "pixels"):
      assert predictions.read(f"{name}.json", truth) == (want, 0)

  @pytest.mark.parametrize(
    ("change", "message"),
    [
      ({"image_id": 7}, "prediction 0 has image_id 7, which is no pair"),
      ({"image_id": "1"}, "image_id '1'"),
      ({"image_id": [1]}, "image_id [1]"),
      ({"score": None}, "its score is None"),
      ({"score": 2}, "its score is 2, but scores are in [0, 1]"),
      ({"score": float("nan")}, "is not valid JSON: NaN is not a JSON number"),
      ({"bbox": [1, 2, 3]}, "its bbox must be [x, y, width, height]; got [1, 2, 3]"),
      ({"bbox": [1, 2, 3, None]}, "its bbox must be"),
      ({"bbox": "all"}, "got 'all'"),
      ({"segmentation": None}, "no run lengths"),
      ({"segmentation": [[1, 2, 3, 4, 5, 6]]}, "no run lengths"),
      ({"segmentation": {"size": [20, 20]}}, "segmentation"),
      ({"segmentation": {"size": [20], "counts": "1"}}, "size must be [height, width]"),
      ({"segmentation": {"size": [20, 20], "counts": "~~"}}, "run lengths are damaged"),
      ({"segmentation": {"size": [20, 20], "counts": [399]}}, "cover 399 pixels"),
      ({"segmentation": {"size": [20, 20], "counts": ""}}, "cover 0 pixels"),
      ({"segmentation": {"size": [20, 20], "counts": "111"}, "bbox": None}, "cover 3 pixels"),
      ({"segmentation": rectangle((20, 21), 0, 0, 5, 5)}, "mask's size is [20, 21]"),
    ],
  )
  def test_faults(self, folder, change, message):
    row = {"image_id": 1, "score": 0.5, "bbox": [0, 0, 5, 5], "category_id": 1}
    row |= {"segmentation": rectangle((20, 20), 0, 0, 5, 5)}
    write_json("found.json", [row | change])
    with pytest.raises(ValueError) as fault:
      predictions.read("found.json", [pair()])
    assert message in str(fault.value)
    assert "\n" not in str(fault.value)

  @pytest.mark.parametrize("text", ["", "{}", "[1]", '{"images": []}', "[", "\xff"])
  def test_other_layouts(self, folder, text):
    Path("found.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"found\.json .* give COCO's results"):
      predictions.read("found.json", [pair()])


class TestWorst:
  def test_order(self):
    def row(truths, found, *matched):
      return concept.Counts(truths, found, np.array([*matched, *[0] * (10 - len(matched))]))

    rows = [row(3, 3), row(1, 0), row(2, 2, 1), row(2, 2, 1, 1), row(0, 0)]
    assert sorted(rows, key=error_gallery.order) == rows


class TestCommand:
  def test_a_model(self, ready, model, pairs, capsys):
    typed = ["--data", "data.json", "--checkpoint", "sam3-tiny", "--threshold", "0.2"]
    assert main.main(["evaluate", *typed, "--worst", "2", "--out", "new/metrics.json"]) == 0
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
    assert main.main(["evaluate", *options]) == 0
    again = [*options, "--predictions", "predictions.json", "--out", "again.json"]
    assert main.main(["evaluate", *again]) == 0
    assert json.loads(Path("again.json").read_text()) == json.loads(
      Path("metrics.json").read_text()
    )
    assert capsys.readouterr() == ("", "")
    assert not Path("worst").exists()

  def test_coco_results_are_scored_and_what_is_not_asked_is_noted(self, coco_folder, capsys):
    rows = coco_results()
    assert len(rows) == 4
    other = rows[0] | {"category_id": 77}
    write_json("found.json", [other, *rows[::-1], other])
    assert main.main(["evaluate", "--data", "coco.json", "--predictions", "found.json"]) == 0
    metrics = json.loads(Path("metrics.json").read_text())
    assert (metrics["positive_pairs"], metrics["il_mcc"]) == (4, pytest.approx(1))
    assert metrics["cgf1"] > 99
    assert "note: 2 predictions are left out: no pair asks" in capsys.readouterr().err

  def test_a_models_predictions_name_the_coco_files_ids(self, ready, coco_folder, capsys):
    options = ["--data", "coco.json", "--threshold", "0.2", "--quiet"]
    assert main.main(["evaluate", *options]) == 0
    rows = json.loads(Path("predictions.json").read_text())
    truth = annotations.read("coco.json")
    assert {(row["image_id"], row["category_id"]) for row in rows} <= {
      (one.image_id, one.category_ids[0]) for one in truth
    }
    again = ["--predictions", "predictions.json", "--out", "again.json"]
    assert main.main(["evaluate", *options, *again]) == 0
    assert Path("again.json").read_text() == Path("metrics.json").read_text()

  def test_several_truths_and_images_elsewhere(self, ready, pairs, capsys):
    (ready / "truths").mkdir()
    emptied = json.loads(Path("data.json").read_text()) | {"annotations": []}
    write_json("truths/other.json", emptied)
    write_json("found.json", predictions.to_coco(perfect(pairs), pairs))
    typed = ["--data", "truths/other.json", "--data", "data.json", "--predictions", "found.json"]
    assert main.main(["evaluate", *typed, "--images", ".", "--worst", "99"]) == 0
    metrics = json.loads(Path("metrics.json").read_text())
    assert (metrics["truths"], metrics["il_mcc"]) == (2, pytest.approx(1))
    assert metrics["cgf1"] > 99
    assert len(list(Path("worst").glob("*.jpg"))) == 2 * len(pairs)
    assert not Path("predictions.json").exists()
    assert "found.json, 14 pairs" in capsys.readouterr().out

  def test_untrained_is_noted(self, ready, model, monkeypatch, capsys):
    monkeypatch.setattr(model, "info", {"trained": False})
    assert main.main(["evaluate", "--data", "data.json", "--prompt", "box"]) == 0
    out, err = capsys.readouterr()
    assert err.startswith("note: sam3-tiny is untrained")
    assert "cgF1 say nothing; see pmF1" in err
    assert out

  def test_a_full_disk_leaves_nothing(self, ready, fails, monkeypatch):
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
      (["--data", "data.json", "--data", "empty.json"], "truth 2 lacks pair 0"),
      (["--data", "data.json", "--images", "sub"], "there is no such image"),
      (["--data", "data.json", "--checkpoint", "x", "--predictions", "y"], "exclude each other"),
      (["--data", "data.json", "--threshold", "2"], "--threshold must be between 0 and 1; got 2.0"),
      (["--data", "data.json", "--threshold", "nan"], "got nan"),
      (["--data", "data.json", "--prompt", "points"], "--prompt"),
      (["--data", "data.json", "--worst", "-1"], "--worst"),
      (["--data", "data.json", "--out", "sub"], "--out sub is a folder"),
      (["--data", "data.json", "--out", "a.png/metrics.json"], "cannot write to a.png"),
      (["--data", "data.json", "--out", "data.json"], "data.json is an input and would be"),
      (["--data", "data.json", "--device", "tpu"], "JAX finds none here"),
    ],
  )
  def test_faults(self, ready, fails, typed, message):
    write_json(
      "empty.json", {"images": [], "annotations": [], "categories": [{"id": 1, "name": "x"}]}
    )
    write_json("unknown.json", [{"image_id": 9999, "score": 1}])
    assert message in fails(*typed)

  def test_a_checkpoint_that_is_not_there(self, folder, fails):
    assert "sam3-jax convert" in fails("--data", "data.json", "--checkpoint", "nowhere")

  def test_all_faults_of_the_data_in_one_report(self, ready, fails):
    """Of the annotations before the model is loaded; of images and phrases once it is there."""
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


class TestScenes:
  """The fixed scenes that figures are reported on."""

  @pytest.mark.parametrize(("name", "images", "pairs"), [("known", 90, 600), ("twemoji", 60, 417)])
  def test_whole_and_faultless(self, name, images, pairs):
    scenes = annotations.read(SCENES / name / "annotations.json")
    assert len(scenes) == pairs
    assert len({one.file_name for one in scenes}) == images
    assert annotations.check(scenes, SCENES / name) == []

  def test_the_truth_scores_best(self):
    """All 600 pairs, as a ceiling; Meta's small terms cost 1e-5 of it."""
    scenes = annotations.read(SCENES / "known" / "annotations.json")
    got = figures(perfect(scenes), scenes)
    assert got["pairs"] == 600
    for name in ("cgf1", "box_cgf1", "ap", "box_ap", "pmf1_75"):
      assert got[name] == pytest.approx(100, abs=0.01), name
