"""All parts of a job as one data set: their records in order, and COCO's layout made of them.

Two passes over the parts, so that memory does not grow with them.
"""

import json
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sam3_jax.batch import parts
from sam3_jax.batch.files import Draft, remove_drafts
from sam3_jax.prompts import BOXES_ALONE

ANNOTATIONS = "annotations.json"


def merge(out: Path) -> dict[str, int]:
  """Writes OUT/annotations.json, COCO's layout with scores; the same bytes from the same parts.

  An image's id is its place in the list, from 1; images that failed are not in it. Categories are
  the phrases, in the order in which they first come up; what was found without a phrase, by example
  boxes alone or by visual prompts, is of the category "visual".

  Returns:
    How many images, annotations, categories and failures there are.

  Raises:
    FileNotFoundError: `out` holds no results.
    ValueError: parts are missing or damaged.
    OSError: the file cannot be written.
  """
  job = parts.read_job(out)
  records = Records(out, job)
  remove_drafts(out, lambda name: name == ANNOTATIONS)
  counts = {"images": 0, "annotations": 0, "failed": parts.write_errors(out)}
  categories = records.categories()
  info = {
    "description": f"sam3-jax {version('sam3-jax')}",
    **{key: job[key] for key in ("checkpoint", "dtype", "threshold", "max_detections")},
  }

  def images() -> Iterator[dict[str, Any]]:
    for record in records:
      counts["images"] += 1
      asked = {name_of(prompt): False for prompt in record["prompts"]}
      asked |= {name_of(prompt): True for prompt in record["prompts"] if prompt["instances"]}
      # LVIS's: categories that were asked and not found; of the others nothing is known.
      absent = [categories[name] for name, found in asked.items() if not found]
      yield {"id": record["input"] + 1, "file_name": record["image"]} | {
        **{side: record[side] for side in ("width", "height")},
        "neg_category_ids": absent,
      }

  def annotations() -> Iterator[dict[str, Any]]:
    for record in records:
      for prompt in record["prompts"]:
        for one in prompt["instances"]:
          counts["annotations"] += 1
          yield {
            "id": counts["annotations"],
            "image_id": record["input"] + 1,
            "category_id": categories[name_of(prompt)],
            "iscrowd": 0,
            "identity": one["id"],
            **{key: one[key] for key in ("bbox", "area", "score", "segmentation")},
          }

  with Draft(out / ANNOTATIONS) as draft:
    draft.write(b'{"info": ' + json.dumps(info).encode())
    _write_list(draft, "images", images())
    rows = ({"id": number, "name": name} for name, number in categories.items())
    _write_list(draft, "categories", rows)
    _write_list(draft, "annotations", annotations())
    draft.write(b"}\n")
    draft.commit()
  return counts | {"categories": len(categories)}


class Records:
  """The records of all parts of a job, in the list's order, as often as they are asked for."""

  def __init__(self, out: Path, job: dict[str, Any]):
    """Raises ValueError if there are parts that are not done."""
    self._out, self._parts = out, range(parts.count(job))
    missing = sorted(set(self._parts) - parts.done(out))
    if missing:
      raise ValueError(
        f"{len(missing):,} of {len(self._parts):,} parts in {out} are not done yet, the first is "
        f"{missing[0]}; run batch again to do the rest, then merge."
      )

  def __iter__(self) -> Iterator[dict[str, Any]]:
    for part in self._parts:
      yield from parts.lines(self._out, part)

  def categories(self) -> dict[str, int]:
    """Numbers from 1 of all phrases, in the order in which they first come up."""
    names = (name_of(prompt) for record in self for prompt in record["prompts"])
    return {name: number for number, name in enumerate(dict.fromkeys(names), start=1)}


def name_of(prompt: dict[str, Any]) -> str:
  """What the instances of a prompt are called."""
  text = prompt.get("text")
  return BOXES_ALONE if text is None else text


def _write_list(draft: Draft, key: str, rows: Iterable[Any]) -> None:
  draft.write(f', "{key}": ['.encode())
  for number, row in enumerate(rows):
    draft.write((b",\n" if number else b"\n") + json.dumps(row, allow_nan=False).encode())
  draft.write(b"]")
