"""Other layouts made of a job's parts: LabelMe's and YOLO's, with polygons, and a Parquet table."""

import contextlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from sam3_jax.batch import parts
from sam3_jax.batch.files import Draft
from sam3_jax.batch.merge import Records, name_of
from sam3_jax.batch.outlines import joined, outlines
from sam3_jax.rle import decode

ROWS = 2**14  # of a group in a Parquet file


def write_labelme(out: Path) -> Path:
  """Writes OUT/labelme/NAME.json for each image, as LabelMe reads it (version 5).

  Pieces of an instance are shapes with the same `group_id`, its identity. Holes are filled.

  Returns:
    The folder.
  """
  folder, taken = out / "labelme", {}
  for record in Records(out, parts.read_job(out)):
    shapes = [
      {
        "label": label,
        "points": points.tolist(),
        "group_id": one["id"],
        "description": f"score {one['score']:.6f}",
        "shape_type": "polygon",
        "flags": {},
      }
      for label, one in _instances(record)
      for points in outlines(decode(one["segmentation"]).astype(bool))
    ]
    values = {
      "version": "5.0.0",
      "flags": {},
      "shapes": shapes,
      "imagePath": record["image"],
      "imageData": None,
      "imageHeight": record["height"],
      "imageWidth": record["width"],
    }
    _write(folder / _name(record["image"], ".json", taken), json.dumps(values) + "\n")
  return folder


def write_yolo(out: Path) -> Path:
  """Writes OUT/yolo/data.yaml and OUT/yolo/labels/NAME.txt, as Ultralytics reads them.

  A line is an instance: class, then its outline as fractions of width and height. The pieces of
  an instance are joined by lines without width, as Ultralytics joins COCO's. Holes are filled.

  Returns:
    The folder.
  """
  folder, taken, records = out / "yolo", {}, Records(out, parts.read_job(out))
  numbers = {name: number - 1 for name, number in records.categories().items()}
  names = "".join(f"  {number}: {json.dumps(name)}\n" for name, number in numbers.items())
  _write(folder / "data.yaml", f"path: .\ntrain: images\nval: images\nnames:\n{names}")
  for record in records:
    lines = []
    for label, one in _instances(record):
      points = joined(outlines(decode(one["segmentation"]).astype(bool)))
      if len(points):
        fractions = points / [record["width"], record["height"]]
        lines.append(" ".join([str(numbers[label]), *(f"{v:.6g}" for v in np.ravel(fractions))]))
    text = "".join(line + "\n" for line in lines)
    _write(folder / "labels" / _name(record["image"], ".txt", taken), text)
  return folder


def write_parquet(out: Path) -> Path:
  """Writes OUT/annotations.parquet: a row an instance, in the list's order.

  Columns: input, image, width, height, text (null where there was no phrase), id, score, bbox (x,
  y, width, height in pixels), area, counts (COCO's compressed run lengths over height x width).

  Returns:
    The file.

  Raises:
    ImportError: pyarrow is not installed.
  """
  try:
    import pyarrow  # pyright: ignore[reportMissingImports]
    from pyarrow import parquet  # pyright: ignore[reportMissingImports]
  except ImportError as error:
    raise ImportError("--to parquet needs pyarrow: pip install 'sam3-jax[parquet]'.") from error
  whole, text = pyarrow.int32(), pyarrow.string()
  columns = {
    "input": pyarrow.int64(), "image": text, "width": whole, "height": whole, "text": text,
    "id": whole, "score": pyarrow.float32(), "bbox": pyarrow.list_(pyarrow.float32(), 4),
    "area": pyarrow.int64(), "counts": text,
  }  # fmt: skip
  schema, rows = pyarrow.schema(list(columns.items())), _rows(Records(out, parts.read_job(out)))
  with Draft(out / "annotations.parquet") as draft:
    with contextlib.closing(parquet.ParquetWriter(draft, schema)) as writer:
      while group := list(itertools.islice(rows, ROWS)):
        writer.write_table(pyarrow.Table.from_pylist(group, schema))
    draft.commit()
  return draft.path


def _rows(records: Records) -> Iterator[dict[str, Any]]:
  for record in records:
    picture = {key: record[key] for key in ("input", "image", "width", "height")}
    for prompt in record["prompts"]:
      for one in prompt["instances"]:
        found = {key: one[key] for key in ("id", "score", "bbox", "area")}
        counts = one["segmentation"]["counts"]
        yield {**picture, "text": prompt.get("text"), **found, "counts": counts}


def _instances(record: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
  for prompt in record["prompts"]:
    for one in prompt["instances"]:
      yield name_of(prompt), one


def _name(image: str, ending: str, taken: dict[PurePosixPath, str]) -> PurePosixPath:
  """A picture's name with another ending, below any folder: without root and `..`."""
  kept = [part for part in PurePosixPath(image).parts if part not in ("/", "..")]
  name = PurePosixPath(*kept).with_suffix(ending)
  if taken.setdefault(name, image) != image:
    raise ValueError(
      f"{taken[name]} and {image} would both be {name}, as this layout has it; rename one of them, "
      "or use --to coco."
    )
  return name


def _write(path: Path, text: str) -> None:
  with Draft(path) as draft:
    draft.write(text.encode())
    draft.commit()
