"""Small annotation files in SA-Co's and in COCO's layout."""

import json
import pathlib

import pytest
from evaluation_data import rectangle
from PIL import Image

HEIGHT, WIDTH = 12, 20


def rle(x: int, y: int, w: int, h: int, size: tuple[int, int] = (HEIGHT, WIDTH)) -> dict:
  return rectangle(size, x, y, w, h)


def annotation(number: int, image: int, box: tuple = (2, 3, 4, 5), **other) -> dict:
  return {
    "id": number,
    "image_id": image,
    "category_id": 1,
    "iscrowd": 0,
    "bbox": list(box),
    "segmentation": rle(*box),
  } | other


def entry(number: int, file_name: str = "a.png", **other) -> dict:
  return {"id": number, "file_name": file_name, "width": WIDTH, "height": HEIGHT} | other


def sa_co() -> dict:
  """Three pairs of two images: the second is a negative, the third is not exhaustive."""
  return {
    "images": [
      entry(7, text_input="red apple", is_instance_exhaustive=1),
      entry(3, text_input="green apple", is_instance_exhaustive=1),
      entry(9, "b.png", text_input="dog", is_instance_exhaustive=0),
    ],
    "annotations": [
      annotation(1, 7),
      annotation(2, 9, (0, 0, 20, 12), iscrowd=1),
      annotation(3, 7, (10, 2, 5, 6)),
    ],
  }


def instances() -> dict:
  """Three images in COCO's layout, the last one without annotations."""
  names = ["cat", "dog", "traffic_light", "bird", "cow", "fox"]
  return {
    "images": [entry(10), entry(20, "b.png"), entry(30, "c.png")],
    "categories": [{"id": i, "name": name} for i, name in enumerate(names, start=5)],
    "annotations": [
      annotation(1, 20, category_id=7),
      annotation(2, 10, category_id=5),
      annotation(3, 10, (8, 1, 3, 3), category_id=6, iscrowd=1),
      annotation(4, 10, (1, 1, 2, 2), category_id=5),
    ],
  }


@pytest.fixture
def folder(tmp_path):
  for name in ("a", "b", "c"):
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / f"{name}.png")
  return tmp_path


@pytest.fixture
def write(folder):
  def to_file(content) -> pathlib.Path:
    path = folder / "annotations.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path

  return to_file
