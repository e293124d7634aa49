"""All parts of a job as one dataset: their records in order, and COCO's layout made of them.

Two passes over the parts, so that memory does not grow with them.
"""

import json
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sam3_jax.batch import parts
from sam3_jax.batch.files import Draft, remove_drafts
from sam3_jax.inputs.prompts import BOXES_ALONE
from sam3_jax.outputs.rle import bounds

ANNOTATIONS = "annotations.json"
EMPTY = "instances without a pixel left out"


def merge(out: Path) -> dict[str, int]:
  """Writes OUT/annotations.json, COCO's layout with scores; the same bytes from the same parts.

  An image's id is its place in the list, from 1; images that failed are not in it. Categories are
  the phrases, in the order in which they first come up; what was found without a phrase, by example
  boxes alone or by visual prompts, is of the category "visual".

  `train` and `evaluate` read the file. So an instance without a pixel is left out, a box without
  area is replaced by that of the mask, and an image has LVIS's two lists: `neg_category_ids` are
  the phrases that nothing was found for, as what was not asked is not absent, and
  `not_exhaustive_category_ids` those of which an instance was left out.

  Returns:
    How many images, annotations, categories and failures there are, and instances left out, if any.

  Raises:
    FileNotFoundError: `out` holds no results.
    ValueError: parts are missing, damaged, or another job's.
    OSError: the file cannot be written.
  """
  job = parts.read_job(out)
  records = Records(out, job)
  remove_drafts(out, lambda name: name.startswith("annotations."))  # of write_parquet, too
  counts = {"images": 0, "annotations": 0, "failed": parts.write_errors(out)}
  categories = records.categories()
  info = {
    "description": f"sam3-jax {version('sam3-jax')}",
    **{key: job[key] for key in ("checkpoint", "dtype", "threshold", "max_detections")},
  }

  def images() -> Iterator[dict[str, Any]]:
    for record in records:
      counts["images"] += 1
      yield {
        "id": record["input"] + 1,
        "file_name": record["image"],
        "width": record["width"],
        "height": record["height"],
        "neg_category_ids": [categories[phrase] for phrase in _absent(record)],
        "not_exhaustive_category_ids": [categories[name] for name in _incomplete(record)],
      }

  def annotations() -> Iterator[dict[str, Any]]:
    for record in records:
      for prompt in record["prompts"]:
        for one in prompt["instances"]:
          if not one["area"]:
            counts[EMPTY] = counts.get(EMPTY, 0) + 1
            continue
          counts["annotations"] += 1
          yield {
            "id": counts["annotations"],
            "image_id": record["input"] + 1,
            "category_id": categories[name_of(prompt)],
            "iscrowd": 0,
            "identity": one["id"],
            "bbox": _box(one),
            **{key: one[key] for key in ("area", "score", "segmentation")},
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
    self._out, self._job, self._parts = out, job, range(parts.count(job))
    missing = sorted(set(self._parts) - parts.done(out))
    if missing:
      raise ValueError(
        f"{len(missing):,} of {len(self._parts):,} parts in {out} are not done yet, the first is "
        f"{missing[0]}; run batch again to do the rest, then merge."
      )

  def __iter__(self) -> Iterator[dict[str, Any]]:
    for part in self._parts:
      yield from parts.lines(self._out, part, parts.job_digest(self._job, part))

  def categories(self) -> dict[str, int]:
    """Numbers from 1 of all phrases, in the order in which they first come up."""
    names = (name_of(prompt) for record in self for prompt in record["prompts"])
    return {name: number for number, name in enumerate(dict.fromkeys(names), start=1)}


def name_of(prompt: dict[str, Any]) -> str:
  """What the instances of a prompt are called."""
  text = prompt.get("text")
  return BOXES_ALONE if text is None else text


def _absent(record: dict[str, Any]) -> list[str]:
  """The phrases that were asked and that nothing was found for."""
  found = {_folded(name_of(prompt)) for prompt in record["prompts"] if prompt["instances"]}
  asked = dict.fromkeys(prompt["text"] for prompt in record["prompts"] if prompt.get("text"))
  return [phrase for phrase in asked if _folded(phrase) not in found]


def _incomplete(record: dict[str, Any]) -> list[str]:
  """The categories of which instances have no pixel."""
  prompts = (p for p in record["prompts"] if not all(one["area"] for one in p["instances"]))
  return list(dict.fromkeys(map(name_of, prompts)))


def _folded(phrase: str) -> str:
  """What is the same of phrases that are one to the readers of annotation files."""
  return " ".join(phrase.replace("_", " ").split()).casefold()


def _box(instance: dict[str, Any]) -> list[float]:
  """x, y, width, height: the instance's own, or its mask's if that has no area."""
  box = instance["bbox"]
  return box if min(box[2:]) > 0 else list(bounds(instance["segmentation"]))


def _write_list(draft: Draft, key: str, rows: Iterable[Any]) -> None:
  draft.write(f', "{key}": ['.encode())
  for number, row in enumerate(rows):
    draft.write((b",\n" if number else b"\n") + json.dumps(row, allow_nan=False).encode())
  draft.write(b"]")
