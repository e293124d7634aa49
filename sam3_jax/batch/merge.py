"""Merges the parts of a job into one dataset in COCO's format.

The parts are read twice, so that memory does not grow with them.
"""

import json
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sam3_jax.batch.files import Draft, remove_drafts
from sam3_jax.batch.job_files import (
  finished_parts,
  is_finished,
  job_digest,
  part_count,
  read_job,
  read_records,
  write_errors,
)
from sam3_jax.inputs.prompts import BOXES_ALONE
from sam3_jax.outputs.rle import bounds

ANNOTATIONS = "annotations.json"
EMPTY = "instances without a pixel left out"


def merge(out: Path) -> dict[str, int]:
  """Writes OUT/annotations.json, in COCO's format with scores; the same parts give the same bytes.

  The id of an image is its position in the list, from 1; images that failed are left out.
  Categories are the phrases, in order of first occurrence. Instances of a concept without a phrase
  have the name of its file, without the suffix; those of other prompts without a phrase (exemplar
  boxes alone, or visual prompts) have the category "visual".

  `train` and `evaluate` read the file. Therefore an instance without a pixel is left out, a box
  without area is replaced by the box of the mask, and an image has the two lists of LVIS:
  `neg_category_ids` are the phrases for which nothing was found (phrases that were not prompted are
  not known to be absent), and `not_exhaustive_category_ids` those with an instance left out.

  Returns:
    The numbers of images, annotations, categories and failures, and of instances left out, if any.

  Raises:
    FileNotFoundError: `out` has no results.
    ValueError: parts are missing, damaged, or belong to another job.
    OSError: the file cannot be written.
  """
  job = read_job(out)
  records = Records(out, job)
  remove_drafts(out, lambda name: name.startswith("annotations."))  # and those of write_parquet
  counts = {"images": 0, "annotations": 0, "failed": write_errors(out, range(part_count(job)))}
  categories = records.categories()
  info = {
    "description": f"sam3-jax {version('sam3-jax')}",
    **{key: job[key] for key in ("checkpoint", "dtype", "threshold", "max_detections")},
  }
  with Draft(out / ANNOTATIONS) as draft:
    draft.write(b'{"info": ' + json.dumps(info).encode())
    write_list(draft, "images", _images(records, categories, counts))
    entries = ({"id": number, "name": name} for name, number in categories.items())
    write_list(draft, "categories", entries)
    write_list(draft, "annotations", _annotations(records, categories, counts))
    draft.write(b"}\n")
    draft.commit()
  return counts | {"categories": len(categories)}


class Records:
  """The records of all parts of a job, in the order of the list; may be iterated repeatedly."""

  def __init__(self, out: Path, job: dict[str, Any]):
    """Raises ValueError if parts are not done."""
    self._out, self._job, self._parts = out, job, range(part_count(job))
    finished = finished_parts(out)
    missing = [p for p in self._parts if p not in finished and not is_finished(out, p)]
    if missing:
      raise ValueError(
        f"{len(missing):,} of {len(self._parts):,} parts in {out} are not done yet, the first is "
        f"{missing[0]}; run batch again to finish the rest, then merge."
      )

  def __iter__(self) -> Iterator[dict[str, Any]]:
    for part in self._parts:
      yield from read_records(self._out, part, job_digest(self._job, part))

  def categories(self) -> dict[str, int]:
    """The numbers of all categories, from 1, in order of first occurrence."""
    names = (category_name(prompt) for record in self for prompt in record["prompts"])
    return {name: number for number, name in enumerate(dict.fromkeys(names), start=1)}


def category_name(prompt: dict[str, Any]) -> str:
  """The category of the instances of a prompt."""
  text = prompt.get("text")
  if text is None and "concept" in prompt:
    return Path(prompt["concept"]).stem
  return BOXES_ALONE if text is None else text


def _images(
  records: Records, categories: dict[str, int], counts: dict[str, int]
) -> Iterator[dict[str, Any]]:
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


def _annotations(
  records: Records, categories: dict[str, int], counts: dict[str, int]
) -> Iterator[dict[str, Any]]:
  for record in records:
    for prompt in record["prompts"]:
      for instance in prompt["instances"]:
        if not instance["area"]:
          counts[EMPTY] = counts.get(EMPTY, 0) + 1
          continue
        counts["annotations"] += 1
        yield {
          "id": counts["annotations"],
          "image_id": record["input"] + 1,
          "category_id": categories[category_name(prompt)],
          "iscrowd": 0,
          "identity": instance["id"],
          "bbox": _box(instance),
          **{key: instance[key] for key in ("area", "score", "segmentation")},
        }


def _absent(record: dict[str, Any]) -> list[str]:
  """The phrases of an image for which nothing was found."""
  found = {_normalized(category_name(p)) for p in record["prompts"] if p["instances"]}
  phrases = dict.fromkeys(prompt["text"] for prompt in record["prompts"] if prompt.get("text"))
  return [phrase for phrase in phrases if _normalized(phrase) not in found]


def _incomplete(record: dict[str, Any]) -> list[str]:
  """The categories that have an instance without a pixel."""
  prompts = (p for p in record["prompts"] if not all(one["area"] for one in p["instances"]))
  return list(dict.fromkeys(map(category_name, prompts)))


def _normalized(phrase: str) -> str:
  """Equal for phrases that readers of annotation files do not distinguish."""
  return " ".join(phrase.replace("_", " ").split()).casefold()


def _box(instance: dict[str, Any]) -> list[float]:
  """x, y, width, height of the instance, or of its mask if the box has no area."""
  box = instance["bbox"]
  return box if min(box[2:]) > 0 else list(bounds(instance["segmentation"]))


def write_list(draft: Draft, key: str, entries: Iterable[Any]) -> None:
  """Writes a key and its list, one entry a line, without holding the list in memory."""
  draft.write(f', "{key}": ['.encode())
  for number, entry in enumerate(entries):
    draft.write((b",\n" if number else b"\n") + json.dumps(entry, allow_nan=False).encode())
  draft.write(b"]")
