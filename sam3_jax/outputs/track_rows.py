"""Rows of tracks: the JSON values of lines of `track_lines`, as writers of formats read them."""

from collections.abc import Iterable
from typing import Any

from sam3_jax.outputs.rle import areas

OBJECT = "object"  # the category of objects that no phrase found


def visible(row: dict[str, Any]) -> list[dict[str, Any]]:
  """The objects of a row that have pixels, by id, with their areas."""
  objects = sorted(row["objects"], key=lambda one: one["id"])
  height, width = row["size"]
  found, _ = areas([one["segmentation"] for one in objects], [(height, width)] * len(objects))
  return [
    {**one, "area": int(area)} for one, area in zip(objects, found.tolist(), strict=True) if area
  ]


def category_numbers(rows: Iterable[dict[str, Any]], other: str = OBJECT) -> dict[str, int]:
  """The categories of the objects in rows, numbered from 1 in order of first occurrence.

  Args:
    rows: of a video.
    other: the category of objects without a phrase; also that of a video without objects.
  """
  names: dict[str, None] = {}
  for row in rows:
    for one in sorted(row["objects"], key=lambda one: one["id"]):
      names.setdefault(one.get("phrase", other))
  return {name: number for number, name in enumerate(names or (other,), start=1)}


def category_entries(numbers: dict[str, int]) -> list[dict[str, Any]]:
  """The list `categories` of a file in COCO's style."""
  return [{"id": number, "name": name} for name, number in numbers.items()]


def image_name(name: str, frame: int) -> str:
  """The name of a frame of a video, as YouTube-VIS names them."""
  return f"{name}/{frame:05d}.jpg"
