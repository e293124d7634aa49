"""Results of `batch --merge` are read by `train` and `evaluate` as data and as predictions."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sam3_jax.batch.merge import category_name
from sam3_jax.batch.merge import merge as merge_parts
from sam3_jax.datasets import annotations
from sam3_jax.evaluation import predictions
from sam3_jax.evaluation.score import Scorer
from sam3_jax.outputs.coco_json import entries
from sam3_jax.outputs.instances import Instances
from sam3_jax.outputs.masks import Masks
from sam3_jax.training.sources import PairSource
from sam3_jax.utils.notes import Notes

SIZE = 60, 80


def instances(*boxes, pixels=True):
  """Objects that fill their boxes x0, y0, x1, y1 except for the border, or are empty."""
  logits = np.full((len(boxes), *SIZE), -5, np.float32)
  for i, (x0, y0, x1, y1) in enumerate(boxes):
    logits[i, y0 + 3 : y1, x0:x1] = 5 if pixels else -5
  scores = np.linspace(0.9, 0.8, len(boxes), dtype=np.float32)
  corners = np.array(boxes, np.float32).reshape(-1, 4)
  return Instances(np.arange(len(boxes)), scores, corners, Masks(logits, SIZE))


@pytest.fixture
def merged(tmp_path, monkeypatch):
  """A function that makes a merged job from prompts and instances by image."""
  from sam3_jax.batch import merge

  (tmp_path / "images").mkdir()

  def make(**images):
    rows = []
    for number, (name, prompts) in enumerate(images.items()):
      file = f"{name.split('_')[0]}.png"
      Image.new("RGB", (80, 60)).save(tmp_path / "images" / file)
      found = [
        {"text": text, "instances": entries(one, SIZE)} if text else
        {"boxes": [[1, 1, 5, 5]], "instances": entries(one, SIZE)}
        for text, one in prompts
      ]  # fmt: skip
      row = {"input": number, "image": file, "width": 80, "height": 60, "prompts": found}
      rows.append(json.loads(json.dumps(row)))

    class Records(list):
      def categories(self):
        names = (category_name(prompt) for record in self for prompt in record["prompts"])
        return {name: number for number, name in enumerate(dict.fromkeys(names), start=1)}

    job = dict.fromkeys(("checkpoint", "dtype", "threshold", "max_detections"))
    job |= {"inputs": len(rows), "part_size": 1}
    monkeypatch.setattr(merge, "read_job", lambda _: job)
    monkeypatch.setattr(merge, "write_errors", lambda *_: 0)
    monkeypatch.setattr(merge, "Records", lambda *_: Records(rows))
    merge_parts(tmp_path)
    return tmp_path / "annotations.json"

  return make


def read(path: Path, notes=None):
  return annotations.read_checked(
    path, path.parent / "images", notes=Notes() if notes is None else notes
  )


def found(pairs):
  return [(p.file_name, p.phrase, len(p.objects), p.exhaustive) for p in pairs]


def test_merged_results_have_the_prompts_and_instances(merged):
  cat, none = instances((10, 10, 40, 30)), instances()
  path = merged(
    a=[("cat", cat), ("dog", none)],
    b=[("dog", none)],
    c=[("cat", instances((5, 5, 20, 20), pixels=False))],
    d=[(None, cat)],
  )
  notes = Notes()
  pairs = read(path, notes)
  assert found(pairs) == [
    ("a.png", "cat", 1, True),
    ("a.png", "dog", 0, True),
    ("b.png", "dog", 0, True),  # no prompt "cat"
  ]  # nor c.png with "cat", which is neither present nor absent
  lines = "\n".join(notes.lines())
  assert "boxes unlike their masks" in lines
  assert "category 'visual'" in lines
  assert len(PairSource(pairs, path.parent)) == 2
  assert [p.id for p in Scorer(pairs).pairs] == [0, 1, 2]


def test_image_with_two_prompts_is_read_once(merged):
  cat, dog = instances((10, 10, 40, 30)), instances((50, 5, 70, 50), (10, 10, 40, 30))
  path = merged(a_1=[("cat", cat), ("fox", instances())], a_2=[("dog", dog), ("cat", cat)])
  assert found(read(path)) == [
    ("a.png", "cat", 1, True),
    ("a.png", "dog", 2, True),
    ("a.png", "fox", 0, True),
  ]


def test_job_without_instances_is_scored(merged):
  path = merged(a=[("cat", instances())])
  pair = annotations.Pair(1, "a.png", SIZE[1], SIZE[0], "cat")
  assert predictions.read(path, [pair]) == ({}, 0)


def test_job_is_scored_against_data_with_other_ids(merged, tmp_path):
  """By file name and phrase, in both layouts."""
  path = merged(
    a=[("A Cat", instances((10, 10, 40, 30))), ("fox", instances())],
    b=[("A Cat", instances((5, 5, 30, 30), (40, 10, 70, 50)))],
    c=[("A Cat", instances())],
  )
  rows = json.loads(path.read_text())
  names = {one["id"]: one["file_name"] for one in rows["images"]}
  truths = [
    {"id": 100 + i, "image_id": 70 + row["image_id"], "category_id": 9, "iscrowd": 0,
     "segmentation": row["segmentation"]} for i, row in enumerate(rows["annotations"])
  ]  # fmt: skip
  images = [
    {"id": 70 + number, "file_name": name, "width": 80, "height": 60}
    for number, name in names.items()
    if name != "c.png"
  ]
  coco = {"images": images, "annotations": truths, "categories": [
    {"id": 9, "name": "a_cat"}, {"id": 4, "name": "owl"}]}  # fmt: skip
  sa_co = {"images": [one | {"text_input": "a cat"} for one in images], "annotations": truths}
  for content in (coco, sa_co):
    (tmp_path / "truth.json").write_text(json.dumps(content))
    pairs = annotations.read(tmp_path / "truth.json")
    notes = Notes()
    got, left_out = predictions.read(path, pairs, notes)
    assert left_out == 0
    assert [len(got.get(p.id, ())) for p in pairs if p.objects] == [1, 2]
    for p in pairs:
      assert [guess.rle for guess in got.get(p.id, ())] == [one.rle for one in p.objects]
    unasked = [p for p in pairs if not p.objects]  # "owl"
    assert len(notes.lines()) == bool(unasked)
  row = rows["annotations"][0]
  rows["images"][0]["file_name"] = f"/data/{rows['images'][0]['file_name']}"
  path.write_text(json.dumps(rows))
  assert len(predictions.read(path, pairs)[0]) == 2  # by the last parts of the name
  rows["images"][2]["file_name"] = "/other/a.png"
  path.write_text(json.dumps(rows))
  with pytest.raises(ValueError, match=r"/data/a.png and /other/a.png may both be a.png"):
    predictions.read(path, pairs)
  assert row["score"] == 0.9


@pytest.mark.parametrize(("count", "refused"), [(1, True), (0, False)])
def test_predictions_with_corners_as_boxes(tmp_path, count, refused):
  image = {"id": 1, "file_name": "a.png", "width": 80, "height": 60, "text_input": "cat"}
  (tmp_path / "truth.json").write_text(json.dumps({"images": [image], "annotations": []}))
  [one] = entries(instances((20, 20, 40, 40)), SIZE)
  x, y, w, h = one["bbox"]
  box = [x, y + 3, x + w, y + h] if count else [x, y, w, h]
  row = {"image_id": 1, "score": 0.5, "bbox": box, "segmentation": one["segmentation"]}
  (tmp_path / "found.json").write_text(json.dumps([row]))
  pairs = annotations.read(tmp_path / "truth.json")
  if refused:
    with pytest.raises(ValueError, match="1 boxes look like corners"):
      predictions.read(tmp_path / "found.json", pairs)
  else:
    assert predictions.read(tmp_path / "found.json", pairs)[0]
