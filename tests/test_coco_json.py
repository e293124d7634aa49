"""COCO JSON, read by pycocotools, and atomic writing of several files."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO

from sam3_jax.outputs.coco_json import coco, json_of, output_stems, png_of, write
from sam3_jax.outputs.instances import Instances
from sam3_jax.outputs.masks import Masks

SIZE = (70, 90)

# pycocotools' own, with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def instances(seed: int, count: int) -> Instances:
  """Random blobs, best first, as from postprocessing; some boxes exceed the image."""
  rng = np.random.default_rng(seed)
  corners = rng.uniform(-30, 100, (count, 2, 2)).astype(np.float32)
  return Instances(
    np.arange(1, count + 1) + 200 * seed,
    np.sort(rng.random(count).astype(np.float32))[::-1],
    np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1),
    Masks(rng.normal(size=(count, 12, 12)).astype(np.float32), SIZE),
  )


@pytest.fixture
def record() -> dict:
  found = [instances(0, 4), instances(1, 0), instances(2, 1)]
  return coco("dir/a.jpg", SIZE, found, ["cat", "dog", "café [1]"], {"threshold": 0.5})


def test_pycocotools_reads_the_file(record, tmp_path):
  write({tmp_path / "a.json": json_of(record)})
  with contextlib.redirect_stdout(io.StringIO()):
    data = COCO(str(tmp_path / "a.json"))
  assert [c["name"] for c in data.loadCats(data.getCatIds())] == ["cat", "dog", "café [1]"]
  assert data.loadImgs([1])[0] == {"id": 1, "file_name": "dir/a.jpg", "width": 90, "height": 70}
  assert sorted(data.getAnnIds()) == [1, 2, 3, 4, 401]
  assert data.getAnnIds(catIds=[2]) == []
  expected = {1: instances(0, 4), 3: instances(2, 1)}
  for category, found in expected.items():
    for i, annotation in enumerate(data.loadAnns(data.getAnnIds(catIds=[category]))):
      assert np.array_equal(data.annToMask(annotation).astype(bool), found.masks[i])
      assert annotation["area"] == found.masks[i].sum()
      assert annotation["id"] == found.ids[i]
      assert abs(annotation["score"] - found.scores[i]) < 1e-6


def test_boxes_are_clipped_to_the_image(record):
  found = instances(0, 4)
  for annotation, box in zip(record["annotations"], found.boxes, strict=False):
    x, y, w, h = annotation["bbox"]
    assert x >= 0
    assert y >= 0
    assert x + w <= 90 + 1e-9
    assert y + h <= 70 + 1e-9
    clipped = np.clip(box, 0, [90, 70, 90, 70])
    assert np.allclose([x, y, x + w, y + h], clipped, atol=0.0051)  # two decimals


def test_box_and_mask_agree():
  """The bounding box of a rectangle's mask is the rectangle."""
  logits = np.full((1, 70, 90), -1, np.float32)
  logits[:, 10:31, 20:61] = 1
  one = Instances(np.array([7]), np.array([0.5]), np.array([[20, 10, 61, 31]]), Masks(logits, SIZE))
  [annotation] = coco("a", SIZE, [one], ["x"], {})["annotations"]
  assert rle.toBbox(annotation["segmentation"]).tolist() == annotation["bbox"] == [20, 10, 41, 21]
  assert annotation["area"] == 41 * 21
  assert (annotation["id"], annotation["category_id"], annotation["iscrowd"]) == (7, 1, 0)


def test_best_first_within_a_phrase():
  found = instances(3, 5)[[2, 0, 4, 1, 3]]
  scores = [one["score"] for one in coco("a", SIZE, [found], ["x"], {})["annotations"]]
  assert scores == sorted(scores, reverse=True)


def test_values_are_json_types(record):
  assert json.loads(json.dumps(record)) == record
  assert record["info"] == {"threshold": 0.5}


@pytest.mark.parametrize(
  ("paths", "stems"),
  [
    ([], []),
    (["a.jpg"], ["a"]),
    (["a.jpg", "b/c.tar.png"], ["a", "c.tar"]),
    (["a.jpg", "b/a.jpg", "c/A.png"], ["a", "a-2", "A-3"]),
    (["a.jpg", "b/a.jpg", "a-2.jpg"], ["a", "a-3", "a-2"]),
    (["a-2.jpg", "a.jpg", "b/a.jpg"], ["a-2", "a", "a-3"]),
  ],
)
def test_output_stems(paths, stems):
  got = output_stems([Path(path) for path in paths])
  assert got == stems
  assert len({stem.casefold() for stem in got}) == len(paths)


class TestWriting:
  def test_creates_the_directory(self, tmp_path):
    write({tmp_path / "a" / "b" / "c.json": json_of({"é": 1})})
    assert json.loads((tmp_path / "a" / "b" / "c.json").read_text()) == {"é": 1}

  def test_image(self, tmp_path):
    image = Image.new("RGB", (70, 50), (200, 30, 40))
    write({tmp_path / "a.png": png_of(image)})
    with Image.open(tmp_path / "a.png") as read:
      assert (read.format, read.size) == ("PNG", (70, 50))
      assert np.all(np.asarray(read) == (200, 30, 40))

  def test_rejects_numbers_that_are_not_finite(self):
    with pytest.raises(ValueError):
      json_of({"new": float("nan")})

  @pytest.mark.parametrize(
    ("error", "reason"),
    [
      (OSError(28, "No space left on device", "draft"), "No space left on device"),
      (OSError("encoder error"), "encoder error"),
      (KeyboardInterrupt(), None),
    ],
  )
  def test_failure_keeps_existing_files(self, tmp_path, error, reason):
    first, second = tmp_path / "a.json", tmp_path / "a.png"
    write({first: json_of({"old": 1})})

    def fail(file):
      file.write(b"half")
      raise error

    with pytest.raises(type(error)) as raised:
      write({first: json_of({"new": 1}), second: fail})
    if reason:
      assert (raised.value.strerror, raised.value.filename) == (reason, str(second))
    assert json.loads(first.read_text()) == {"old": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]
