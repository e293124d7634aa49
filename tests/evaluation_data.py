"""Small annotated datasets and predictions, for the tests of evaluation."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from sam3_jax.datasets import annotations
from sam3_jax.datasets.annotations import Object, Pair
from sam3_jax.evaluation import cgf1
from sam3_jax.evaluation.average_precision import average_precision
from sam3_jax.evaluation.predictions import EvalPrediction
from sam3_jax.evaluation.score import Scorer

# Size and phrases of each image: full batches of prompts, incomplete ones, and a single pair.
IMAGES = {
  "a.png": ((40, 60), ["cat", "dog", "ear", "bus", "tail"]),
  "b.png": ((33, 20), ["cat"]),
  "sub/c.png": ((64, 48), ["dog", "nose"]),
  "d.png": ((20, 30), ["cat", "dog", "ear", "bus"]),
  "e.png": ((24, 24), ["paw", "cat"]),
}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
  """The working directory, with images and annotations in SA-Co's format."""
  monkeypatch.chdir(tmp_path)
  return write_saco(tmp_path)


@pytest.fixture
def pairs(folder) -> list[Pair]:
  return annotations.read("data.json")


@pytest.fixture
def coco_folder(folder) -> Path:
  """The directory, with the same images annotated in COCO's format."""
  return write_coco(folder)


def write_saco(folder: Path) -> Path:
  """Writes images, and data.json with annotations in SA-Co's format; returns the directory."""
  rng = np.random.default_rng(0)
  (folder / "sub").mkdir()
  entries, objects = [], []
  for name, ((height, width), phrases) in IMAGES.items():
    Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(folder / name)
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
  write_json(folder / "data.json", {"images": entries, "annotations": objects})
  return folder


def write_coco(folder: Path) -> Path:
  """Writes coco.json: annotations of the same images in COCO's format, with unordered ids."""
  names = {18: "dog", 3: "cat", 44: "bus", 90: "tail"}
  images, objects = [], []
  for index, (name, ((height, width), _)) in enumerate(IMAGES.items()):
    images.append({"id": 500 - 7 * index, "file_name": name, "width": width, "height": height})
    for category in list(names)[: index % 3]:
      box = [index, 2, 8 + category // 10, 6]
      objects.append(
        {"id": len(objects) + 1, "image_id": images[-1]["id"], "category_id": category,
         "bbox": box, "segmentation": rectangle((height, width), *box), "iscrowd": 0, "area": 50}
      )  # fmt: skip
  categories = [{"id": number, "name": name} for number, name in names.items()]
  content = {"images": images, "annotations": objects, "categories": categories}
  write_json(folder / "coco.json", content)
  return folder


def write_json(path, values) -> None:
  Path(path).write_text(json.dumps(values))


def rectangle(size, x, y, w, h) -> dict:
  mask = np.zeros(size, np.uint8, order="F")
  mask[y : y + h, x : x + w] = 1
  rle = coco.encode(mask)
  return {"size": list(size), "counts": rle["counts"].decode()}


def pair(*objects: Object, number=1, phrase="cat", exhaustive=True, size=(20, 20)) -> Pair:
  return Pair(number, "a.png", size[1], size[0], phrase, exhaustive, objects)


def target(*box, crowd=False, size=(20, 20)) -> Object:
  return Object(rectangle(size, *box), box, crowd)


def coco_results() -> list[dict]:
  """The truth in coco.json as COCO results with the same ids."""
  keys = ("image_id", "category_id", "bbox", "segmentation")
  truth = json.loads(Path("coco.json").read_text())["annotations"]
  return [{key: one[key] for key in keys} | {"score": 0.9} for one in truth]


def perfect(pairs) -> dict[int, list[EvalPrediction]]:
  """The truth as predictions."""
  return {p.id: [EvalPrediction(0.9, one.box, one.rle) for one in p.objects] for p in pairs}


def all_metrics(found, *truths, score: float = cgf1.THRESHOLD) -> dict:
  """All metrics of predictions."""
  scorer = Scorer(*truths, score=score)
  for pair in scorer.pairs:
    scorer.add(pair, found.get(pair.id, ()))
  return scorer.metrics() | average_precision(scorer.pairs, found)
