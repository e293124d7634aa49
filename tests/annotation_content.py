"""Contents of COCO files with a few rectangles, and reading them."""

import json
from typing import Any

import pytest

from sam3_jax.datasets import annotations
from sam3_jax.utils.notes import Notes

WIDTH, HEIGHT = 80, 60


def square(x=10, y=10, w=20, h=20):
  return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def one(number: Any = 1, image: Any = 1, category: Any = 1, box=(10, 10, 20, 20), **values: Any):
  base = {"id": number, "image_id": image, "category_id": category, "iscrowd": 0}
  return base | {"bbox": list(box), "segmentation": square(*box)} | values


def image(number=1, name="a.png", **values):
  return {"id": number, "file_name": name, "width": WIDTH, "height": HEIGHT} | values


def content(*objects, images=None, categories=("cat", "dog")):
  named = [
    {"id": i, "name": c} if isinstance(c, str) else c for i, c in enumerate(categories, start=1)
  ]
  return {"images": images or [image()], "categories": named, "annotations": list(objects)}


@pytest.fixture
def read(tmp_path):
  def to_pairs(values, notes=None, **options):
    path = tmp_path / "a.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return annotations.read(path, notes=Notes() if notes is None else notes, **options)

  return to_pairs


def fault_of(call, *values, **options):
  """The message of the error that a call raises; "" if it returns."""
  try:
    call(*values, **options)
  except ValueError as error:
    return str(error)
  return ""
