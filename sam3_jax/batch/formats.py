"""Exports a job to LabelMe and YOLO, with polygons, and to a Parquet table."""

import contextlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from sam3_jax.batch.export_names import ExportNames, relative_parts
from sam3_jax.batch.files import Draft
from sam3_jax.batch.job_files import read_job
from sam3_jax.batch.merge import Records, category_name
from sam3_jax.batch.polygons import join_polygons, mask_to_polygons
from sam3_jax.batch.record_files.listing import is_row_name
from sam3_jax.outputs.rle import decode
from sam3_jax.utils.notes import ListingNotes

ROW_GROUP = 2**14  # rows of a row group in a Parquet file
# Image suffixes that Ultralytics reads: IMG_FORMATS of ultralytics/data/utils.py, version 8.4.
ULTRALYTICS = {
  ".avif", ".bmp", ".dng", ".heic", ".heif", ".jp2", ".jpeg", ".jpg", ".mpo", ".png", ".tif",
  ".tiff", ".webp",
}  # fmt: skip


def write_labelme(out: Path, notes: ListingNotes | None = None) -> Path:
  """Writes OUT/labelme/NAME.json for each image, in the format of LabelMe 5.

  LabelMe finds an image by its path relative to the .json file, so copy the tree of .json files to
  the images. Images listed by absolute path are found from anywhere. The components of an
  instance are shapes with the same `group_id`, its id. Holes are filled.

  Args:
    out: directory of the job.
    notes: counts images whose .json file does not have the usual name.

  Returns:
    The directory.
  """
  notes = ListingNotes() if notes is None else notes
  folder, names = out / "labelme", ExportNames(".json")
  for record in Records(out, read_job(out)):
    image = PurePosixPath(record["image"])
    name, usual = names.of(PurePosixPath(*relative_parts(image)))
    if name != usual:
      notes.remark(
        "image differs from another only in its suffix; open its .json file",
        "images differ from others only in their suffix; open their .json files",
        f"{image}: {name}",
      )
    if "\\" in image.name:
      what = "a backslash in the name, which LabelMe takes for a directory"
      notes.remark(f"image has {what}", f"images have {what}", str(image))
    inside = is_row_name(image.name) or any(part.endswith(".tar") for part in image.parts[:-1])
    shapes = [
      {
        "label": label,
        "points": points.tolist(),
        "group_id": instance["id"],
        "description": f"score {instance['score']:.6f}",
        "shape_type": "polygon",
        "flags": {},
      }
      for label, instance in _instances(record)
      for points in mask_to_polygons(decode(instance["segmentation"]).astype(bool))
    ]
    values = {
      "version": "5.0.0",
      "flags": {},
      "shapes": shapes,
      "imagePath": str(image) if image.is_absolute() and not inside else image.name,
      "imageData": None,
      "imageHeight": record["height"],
      "imageWidth": record["width"],
    }
    _write(folder / name, json.dumps(values) + "\n")
  return folder


def write_yolo(out: Path, notes: ListingNotes | None = None) -> Path:
  """Writes OUT/yolo/data.yaml and OUT/yolo/labels/NAME.txt, in the format of Ultralytics.

  Ultralytics looks for images in OUT/yolo/images, and for their labels in the files that
  `_label_path` names. Copy the tree of images there, or link the files (`cp -rs`); a link to the
  directory does not work, because Ultralytics resolves it. A line is an instance: class, then its
  polygon as fractions of width and height. The components of an instance are joined by bridges of
  zero width, as Ultralytics does for COCO. Holes are filled.

  Args:
    out: directory of the job.
    notes: counts images that Ultralytics does not read, or confuses with others.

  Returns:
    The directory.
  """
  notes = ListingNotes() if notes is None else notes
  folder, names, records = out / "yolo", ExportNames(".txt"), Records(out, read_job(out))
  numbers = {name: number - 1 for name, number in records.categories().items()}
  classes = "".join(f"\n  {number}: {_quoted(name)}" for name, number in numbers.items()) or " {}"
  # Without the key `path`, paths are relative to data.yaml.
  _write(folder / "data.yaml", f"train: images\nval: images\nnames:{classes}\n")
  for record in records:
    lines = []
    for label, instance in _instances(record):
      points = join_polygons(mask_to_polygons(decode(instance["segmentation"]).astype(bool)))
      if len(points):
        fractions = points / [record["width"], record["height"]]
        lines.append(" ".join([str(numbers[label]), *(f"{v:.6g}" for v in np.ravel(fractions))]))
    text = "".join(line + "\n" for line in lines)
    image = PurePosixPath(*relative_parts(PurePosixPath(record["image"])))
    name, usual = names.of(_label_path(image))
    if name != usual:
      renamed = PurePosixPath("images", image.with_name(name.stem + image.suffix))
      notes.remark(
        "image differs from another only in its suffix, and would get the labels of that image",
        "images differ from others only in their suffix, and would get the labels of those images",
        f"copy {image} as {renamed}",
      )
    if image.suffix.lower() not in ULTRALYTICS:
      what = "a suffix that Ultralytics does not read"
      notes.remark(f"image has {what}", f"images have {what}", str(image))
    _write(folder / name, text)
  return folder


def write_parquet(out: Path) -> Path:
  """Writes OUT/annotations.parquet: one row per instance, in the order of the list.

  Columns: input, image, width, height, text (null if there was no phrase), id, score, bbox (x, y,
  width, height in pixels), area, counts (COCO's compressed run lengths over height x width).

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
  schema, rows = pyarrow.schema(list(columns.items())), _rows(Records(out, read_job(out)))
  with Draft(out / "annotations.parquet") as draft:
    with contextlib.closing(parquet.ParquetWriter(draft, schema)) as writer:
      while group := list(itertools.islice(rows, ROW_GROUP)):
        writer.write_table(pyarrow.Table.from_pylist(group, schema))
    draft.commit()
  return draft.path


def _rows(records: Records) -> Iterator[dict[str, Any]]:
  for record in records:
    image = {key: record[key] for key in ("input", "width", "height")}
    image["image"] = _utf8(record["image"])
    for prompt in record["prompts"]:
      for instance in prompt["instances"]:
        found = {key: instance[key] for key in ("id", "score", "bbox", "area")}
        counts = instance["segmentation"]["counts"]
        yield {**image, "text": _utf8(prompt.get("text")), **found, "counts": counts}


def _instances(record: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
  for prompt in record["prompts"]:
    for instance in prompt["instances"]:
      yield category_name(prompt), instance


def _label_path(image: PurePosixPath) -> PurePosixPath:
  """Where Ultralytics looks for the labels of images/IMAGE: the last `images` becomes `labels`.

  `img2label_paths` in ultralytics/data/utils.py, version 8.4; the suffix is not replaced here.
  """
  folders = ["images", *image.parent.parts]
  last = len(folders) - 1 - folders[::-1].index("images")
  folders[last] = "labels"
  return PurePosixPath(*folders, image.name)


def _quoted(name: str) -> str:
  """A string as a double-quoted YAML scalar, which is never a number, a key or a boolean."""
  # JSON escapes do not work in YAML: a surrogate pair would be two characters.
  escapes = {'"': '\\"', "\\": "\\\\"}
  return '"' + "".join(
    escapes.get(char, char) if char.isprintable() else f"\\U{ord(char):08x}" for char in name
  ) + '"'  # fmt: skip


def _utf8(text: str | None) -> str | None:
  """Escapes bytes of a file name that are not UTF-8, which Parquet cannot store."""
  return text if text is None else text.encode(errors="backslashreplace").decode()


def _write(path: Path, text: str) -> None:
  with Draft(path) as draft:
    draft.write(text.encode())
    draft.commit()
