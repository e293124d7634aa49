"""Files of predictions: both formats, and messages for faulty files."""

import dataclasses
from pathlib import Path

import evaluation_data
import pytest
from evaluation_data import (
  coco_results,
  pair,
  perfect,
  rectangle,
  write_json,
)
from pycocotools.coco import COCO

from sam3_jax.datasets import annotations
from sam3_jax.evaluation import predictions
from sam3_jax.evaluation.predictions import EvalPrediction
from sam3_jax.outputs.rle import runs as rle_runs

folder = evaluation_data.folder
pairs = evaluation_data.pairs
coco_folder = evaluation_data.coco_folder

# A warning of pycocotools with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def test_round_trip(pairs, folder):
  found = {key: value for key, value in perfect(pairs).items() if value}
  write_json("found.json", predictions.to_coco(found, pairs))
  assert predictions.read("found.json", pairs) == (found, 0)
  write_json("none.json", [])
  assert predictions.read("none.json", pairs) == ({}, 0)


def test_coco_results_by_image_and_category(coco_folder):
  """Results in any order, as COCO tools write them."""
  truth = annotations.read("coco.json")
  rows = coco_results()
  write_json("found.json", rows[::-1])
  found, left_out = predictions.read("found.json", truth)
  assert left_out == 0
  for one in truth:
    got = sorted(guess.box for guess in found.get(one.id, []))
    assert got == sorted(item.box for item in one.objects), one


def test_written_results_have_the_ids_of_the_coco_file(coco_folder, capsys):
  truth = annotations.read("coco.json")
  found = {key: value for key, value in perfect(truth).items() if value}
  rows = predictions.to_coco(found, truth)
  write_json("found.json", rows)
  assert predictions.read("found.json", truth) == (found, 0)
  theirs = COCO("coco.json")
  results = theirs.loadRes("found.json")  # raises if an image is missing in the file
  for image, category in {(row["image_id"], row["category_id"]) for row in rows}:
    ids = {"imgIds": [image], "catIds": [category]}
    got = [results.anns[i]["bbox"] for i in results.getAnnIds(**ids)]
    assert sorted(got) == sorted(theirs.anns[i]["bbox"] for i in theirs.getAnnIds(**ids))
  assert len(rows) == len(theirs.anns)
  capsys.readouterr()


def test_categories_of_one_name_are_one_pair(folder):
  truth = [dataclasses.replace(pair(number=0), image_id=7, category_ids=(4, 9))]
  row = {"image_id": 7, "score": 1, "segmentation": rectangle((20, 20), 0, 0, 5, 5)}
  write_json("found.json", [row | {"category_id": category} for category in (9, 4, 5)])
  found, left_out = predictions.read("found.json", truth)
  assert (len(found[0]), left_out) == (2, 1)
  assert {one["category_id"] for one in predictions.to_coco(found, truth)} == {4}


def test_small_coco_boxes_are_pixels(coco_folder):
  [row, *_] = coco_results()
  write_json("found.json", [row | {"bbox": [0, 0, 1, 1]}])
  found, _ = predictions.read("found.json", annotations.read("coco.json"))
  assert [one.box for several in found.values() for one in several] == [(0, 0, 1, 1)]


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"image_id": 0}, "prediction 0 has image_id 0, which is not an image of the data; give"),
    ({"image_id": "500"}, "image_id '500'"),
    ({"category_id": None}, "category_id None, which is not a category"),
    ({"category_id": [18]}, "category_id [18]"),
    ({"category_id": 1}, "none of its 1 predictions is of a category that the data have"),
  ],
)
def test_faults_against_coco(coco_folder, change, message):
  write_json("found.json", [coco_results()[0] | change])
  with pytest.raises(ValueError) as fault:
    predictions.read("found.json", annotations.read("coco.json"))
  assert message in str(fault.value)
  assert "\n" not in str(fault.value)


def test_other_formats_of_boxes_and_masks(folder):
  """Boxes as fractions or left out; run lengths as a list."""
  truth = [pair(size=(20, 40))]
  rle = rectangle((20, 40), 10, 5, 20, 10)
  runs = {"size": [20, 40], "counts": rle_runs(rle).tolist()}
  row = {"image_id": 1, "score": 1, "segmentation": runs}
  write_json("fractions.json", [row | {"bbox": [0.25, 0.25, 0.5, 0.5]}])
  write_json("no_boxes.json", [row])
  write_json("pixels.json", [row | {"bbox": [10, 5, 20, 10], "segmentation": rle}])
  want = {1: [EvalPrediction(1.0, (10, 5, 20, 10), rle)]}
  for name in ("fractions", "no_boxes", "pixels"):
    assert predictions.read(f"{name}.json", truth) == (want, 0)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"image_id": 7}, "prediction 0 has image_id 7, which is not a pair"),
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
def test_faults(folder, change, message):
  row = {"image_id": 1, "score": 0.5, "bbox": [0, 0, 5, 5], "category_id": 1}
  row |= {"segmentation": rectangle((20, 20), 0, 0, 5, 5)}
  write_json("found.json", [row | change])
  with pytest.raises(ValueError) as fault:
    predictions.read("found.json", [pair()])
  assert message in str(fault.value)
  assert "\n" not in str(fault.value)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"images": []}', "[", "\xff"])
def test_files_without_predictions(folder, text):
  Path("found.json").write_bytes(text.encode("latin-1"))
  with pytest.raises(ValueError, match=r"found\.json .* give COCO's results"):
    predictions.read("found.json", [pair()])
