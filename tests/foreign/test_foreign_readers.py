"""LabelMe, Ultralytics and supervision read our exports with their own code.

Each test runs if its tool is installed, with `pytest -m foreign`. tests/test_batch_formats.py tests
their rules for finding files without these tools.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
from batches import MASK, instance, write_job
from PIL import Image

from sam3_jax.batch.formats import write_labelme, write_yolo
from sam3_jax.batch.merge import ANNOTATIONS, merge

pytestmark = [pytest.mark.foreign, pytest.mark.filterwarnings("ignore")]

IMAGES = ["day1/x.png", "day 2/images/ü.png", "top.png"]
LABELS = ["yellow school bus", "no", "1", 'a: "b" #\\', "😀\u2028\x85", "n0"]


@pytest.fixture
def job(tmp_path, monkeypatch):
  """The directory of a job, beside `images`; the working directory is elsewhere."""
  for name in IMAGES:
    path = tmp_path / "images" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (80, 60), "red").save(path)
  found = {label: [instance(MASK), instance(np.zeros_like(MASK))] for label in LABELS}
  found["two pieces"] = [instance(MASK | np.roll(MASK, 32, axis=1))]
  (tmp_path / "elsewhere").mkdir()
  monkeypatch.chdir(tmp_path / "elsewhere")
  return write_job(tmp_path / "out", dict.fromkeys(IMAGES, found))


def test_labelme(job):
  labelme = pytest.importorskip("labelme")
  images = job.parent / "images"
  shutil.copytree(write_labelme(job), images, dirs_exist_ok=True)
  for name in IMAGES:
    file = labelme.LabelFile(str((images / name).with_suffix(".json")))
    assert [shape["label"] for shape in file.shapes] == [*LABELS, "two pieces", "two pieces"]
    assert {shape["shape_type"] for shape in file.shapes} == {"polygon"}
    path = getattr(file, "image_path", None) or file.imagePath
    assert (images / name).parent / path == images / name


def test_labelme_with_absolute_names(job):
  labelme = pytest.importorskip("labelme")
  image = job.parent / "images" / "top.png"
  out = write_job(job.parent / "absolute", [str(image)])
  [path] = write_labelme(out).rglob("*.json")
  assert len(labelme.LabelFile(str(path)).shapes) == 1


def test_supervision_coco(job):
  supervision = pytest.importorskip("supervision")
  merge(job)
  dataset = supervision.DetectionDataset.from_coco(
    str(job.parent / "images"), str(job / ANNOTATIONS), force_masks=True
  )
  assert dataset.classes == [*LABELS, "two pieces"]
  assert len(dataset) == len(IMAGES)
  for _, _, found in dataset:
    assert len(found) == len(LABELS) + 1
    np.testing.assert_array_equal(found.mask[0], MASK)


def test_supervision_yolo(job):
  """supervision looks for labels in one flat directory."""
  supervision = pytest.importorskip("supervision")
  folder = write_yolo(job)
  flat = job.parent / "flat"
  flat.mkdir()
  shutil.copy(job.parent / "images" / "top.png", flat)
  dataset = supervision.DetectionDataset.from_yolo(
    str(flat), str(folder / "labels"), str(folder / "data.yaml"), force_masks=True
  )
  assert dataset.classes == [*LABELS, "two pieces"]
  [(_, _, found)] = dataset
  assert len(found) == len(LABELS) + 1
  overlap = (found.mask[0] & MASK).sum() / (found.mask[0] | MASK).sum()
  assert overlap > 0.9  # supervision fills the pixels on the outline, too: measured 0.92


@pytest.mark.parametrize("given", ["../out/yolo/data.yaml", "{job}/yolo/data.yaml"])
def test_ultralytics(job, given):
  pytest.importorskip("ultralytics")
  from ultralytics.data.dataset import YOLODataset
  from ultralytics.data.utils import check_det_dataset

  folder = write_yolo(job)
  shutil.copytree(job.parent / "images", folder / "images", dirs_exist_ok=True)
  data = check_det_dataset(given.format(job=job), autodownload=False)
  assert list(data["names"].values()) == [*LABELS, "two pieces"]
  assert Path(data["train"]) == (folder / "images").resolve()
  dataset = YOLODataset(data["train"], data=data, task="segment", augment=False)
  assert len(dataset.labels) == len(IMAGES)
  for found in dataset.labels:
    assert found["cls"].ravel().tolist() == list(range(len(LABELS) + 1))
    assert len(found["segments"]) == len(LABELS) + 1
