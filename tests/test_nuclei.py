"""Annotations made from label images, and the configurations of the documentation."""

import json
import sys
from pathlib import Path

import nuclei
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from sam3_jax.datasets import annotations
from sam3_jax.training.config import TrainConfig
from sam3_jax.training.config_file import override, read

# pycocotools' own, with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module")
def cells() -> tuple[np.ndarray, np.ndarray]:
  """32 discs of radius 7 on a grid, with brightness by number; tile borders cut some of them."""
  labels = np.zeros((96, 128), np.uint16)
  y, x = np.ogrid[:96, :128]
  for number in range(32):
    row, column = divmod(number, 8)
    labels[(y - 14 - 22 * row) ** 2 + (x - 9 - 16 * column) ** 2 <= 49] = number + 1
  return (labels * 100).astype(np.uint16), labels


@pytest.fixture(scope="module")
def written(cells, tmp_path_factory):
  folder = tmp_path_factory.mktemp("nuclei")
  with pytest.MonkeyPatch.context() as patch:
    for name, array in zip(("cells.tif", "labels.tif"), cells, strict=True):
      Image.fromarray(array).save(folder / name)
    files = ["--image", str(folder / "cells.tif"), "--labels", str(folder / "labels.tif")]
    patch.setattr(sys, "argv", ["nuclei.py", str(folder / "out"), "--tile=48", *files])
    nuclei.main()
  return folder / "out"


def test_train_and_score_tiles_do_not_overlap(cells):
  numbers = np.arange(96 * 128).reshape(96, 128)
  tiles = nuclei.halves(numbers, cells[1], 48)
  seen = {
    name: {p for tile in several for p in tile.pixels.ravel()} for name, several in tiles.items()
  }
  assert not seen["train"] & seen["score"]
  assert all(p % 128 < 64 for p in seen["train"])
  assert len(tiles["score"]) == 2
  assert len(tiles["train"]) == 3 * 4  # overlapping, to four sides


def test_pixels_and_labels_have_the_same_rotation(cells):
  for tile in nuclei.halves(*cells, 48)["train"]:
    assert np.array_equal(tile.pixels, tile.labels * 100)


def test_annotations_are_valid(written):
  for name, images in (("train", 12), ("score", 2)):
    pairs = annotations.read(written / name / "annotations.json")
    assert annotations.check(pairs, written / name) == []
    assert len({pair.file_name for pair in pairs}) == images
    for pair in pairs:
      assert bool(pair.objects) == (pair.phrase == "cell nucleus")
    assert sum(not pair.objects for pair in pairs) == images  # a phrase for nothing each


def test_masks_equal_the_labels(written, cells):
  record = json.loads((written / "score" / "annotations.json").read_text())
  for number, top in enumerate((0, 48)):
    labels = cells[1][top : top + 48, 64:112]
    with Image.open(written / "score" / record["images"][number]["file_name"]) as image:
      stored = np.asarray(image)
    white = np.percentile(cells[0], 99)
    want = np.clip(labels.astype(float) * 100 / white, 0, 1) * 255
    assert np.abs(stored - want).max() <= 0.5
    found = [one for one in record["annotations"] if one["image_id"] == number]
    areas = np.bincount(labels.ravel(), minlength=33)[1:]
    assert sorted(one["area"] for one in found) == sorted(areas[areas >= nuclei.SMALLEST])
    assert (areas[areas > 0] < nuclei.SMALLEST).sum() > 0  # slivers there are
    for one in found:
      mask = coco.decode(one["segmentation"]).astype(bool)
      [value] = np.unique(labels[mask])
      assert np.array_equal(mask, labels == value)
      rows, columns = np.nonzero(mask)
      assert one["bbox"] == [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]


@pytest.mark.parametrize("bright", [0, 1, 235, 30000])
def test_outliers_do_not_darken_the_image(bright, tmp_path):
  pixels = np.full((20, 20), bright, np.uint16)
  pixels[0, :2] = 0, 2 * bright
  Image.fromarray(pixels).save(tmp_path / "a.tif")
  got = nuclei.read(tmp_path / "a.tif")
  assert got[0, 0] == 0
  assert (got.ravel()[1:] == (255 if bright else 0)).all()


def test_errors(cells, monkeypatch):
  with pytest.raises(SystemExit, match="halves of at least 65 x 65"):
    nuclei.halves(*cells, 65)
  with pytest.raises(SystemExit, match="must have the same size"):
    nuclei.halves(cells[0], cells[1][1:], 48)
  monkeypatch.setattr(nuclei.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(SystemExit, match="pip install --no-deps stardist"):
    nuclei.shipped("img2d.tif")


def test_empty_labels_have_no_objects():
  assert list(nuclei.objects(np.zeros((5, 5), np.uint16))) == []


@pytest.mark.parametrize(
  ("name", "trained"), [("fine-tuning.toml", "(?!trunk/|neck/).*"), ("nuclei.toml", ".*")]
)
def test_configurations_of_the_fine_tuning_guide(name, trained):
  values = read(Path(__file__).parents[1] / "docs" / name)
  config = TrainConfig.from_dict(override(values, {"checkpoint": "sam3-tiny", "steps": 3}))
  assert config.trainable_pattern == trained
  assert config.optimizer.warmup_steps < 250  # the fewest steps in the guide
  guide = (Path(__file__).parents[1] / "docs" / "guides" / "fine-tuning.md").read_text()
  assert f"docs/{name}" in guide


VISUAL_STAGES = ("visual-first", "visual", "visual-levels", "visual-wide", "visual-end")


@pytest.mark.parametrize("name", ["dense", "detection", "one-to-one", "larger", *VISUAL_STAGES])
def test_configurations_of_sam3_tiny(name):
  root = Path(__file__).parents[1]
  values = read(root / "docs" / "sam3-tiny" / f"{name}.toml")
  start = {} if "model" in values else {"checkpoint": "sam3-tiny"}
  config = TrainConfig.from_dict(override(values, start))
  assert config.scenes is not None
  assert config.steps > config.optimizer.cooldown_steps + config.optimizer.warmup_steps
  guide = (
    "docs/guides/visual-prompts.md" if name in VISUAL_STAGES else "checkpoints/sam3-tiny/README.md"
  )
  assert f"docs/sam3-tiny/{name}.toml" in (root / guide).read_text()
