"""Runs that are resumed with other data are refused, with the changes."""

import json
import os
import shutil

import pytest
import training_runs
from training_runs import Stop, Stopping, train

from sam3_jax.training.run_data import RUN_DATA_FILE, RunData, identify_data

quick = training_runs.quick


@pytest.fixture
def data(tmp_path):
  """Returns a function that identifies the data: an annotation file and three images."""
  (tmp_path / "images").mkdir()
  for name in "abc":
    (tmp_path / "images" / name).write_text(name * 10)
  (tmp_path / "data.json").write_text("{}")

  def now(checkpoint="seal"):
    images = (str(tmp_path / "images"), ["a", "b", "c", "a"])
    return identify_data([str(tmp_path / "data.json")], [images], checkpoint)

  return now


@pytest.mark.slow
def test_same_data_are_resumed_and_other_data_refused(tmp_path, quick, data):
  out = tmp_path / "run"
  with pytest.raises(Stop):
    train(out, source=Stopping(3), data=data())
  os.utime(tmp_path / "data.json", (1, 1))  # the content counts
  with pytest.raises(Stop):
    train(out, source=Stopping(5), data=data())
  (tmp_path / "data.json").write_text("[]")
  with pytest.raises(ValueError, match=r"annotations: 1 file modified \(.*data\.json\)") as caught:
    train(out, data=data())
  assert "give another --out" in str(caught.value)
  (tmp_path / "data.json").write_text("{}")
  final = train(out, data=data())
  assert final.exists()
  (tmp_path / "images" / "b").write_text("other")
  with pytest.raises(ValueError, match=r"images: 1 file modified \(.*b\)"):  # also after the end
    train(out, data=data())


@pytest.mark.parametrize(
  ("change", "words"),
  [
    (lambda folder: (folder / "images/a").write_text("b" * 10), "images: 1 file modified"),
    (lambda folder: os.utime(folder / "images/a", (1, 1)), "images: 1 file modified"),
    (lambda folder: shutil.copy(folder / "images/a", folder / "images/b"), "images: 1 file modif"),
    (lambda folder: (folder / "images/a").unlink(), "images: 1 file modified"),
    (lambda folder: (folder / "data.json").write_text("[]"), "annotations: 1 file modified"),
    (lambda folder: None, ""),
  ],
)
def test_changes_are_reported(tmp_path, data, change, words):
  data().write(tmp_path)
  change(tmp_path)
  fault = data().fault(tmp_path)
  assert words in fault
  assert bool(fault) == bool(words)


def test_changed_checkpoint_is_reported(tmp_path, data):
  data().write(tmp_path)
  assert "the starting checkpoint differs" in data("other").fault(tmp_path)


def test_missing_and_damaged_files(tmp_path, data):
  assert data().fault(tmp_path) == ""
  for text in ("{", "[]", json.dumps({"annotations": 3, "images": {}, "checkpoint": ""})):
    (tmp_path / RUN_DATA_FILE).write_text(text)
    assert "is damaged" in data().fault(tmp_path)


def test_copies_of_images_have_the_same_digest(tmp_path, data):
  before = data()
  os.utime(tmp_path / "images" / "a", (1, 1))
  assert data() != before
  assert data().digest() == before.digest()
  (tmp_path / "images" / "a").write_text("longer than before")
  assert data().digest() != before.digest()
  assert RunData().digest() != before.digest()
