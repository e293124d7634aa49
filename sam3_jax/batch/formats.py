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
from sam3_jax.batch.polygons import joined, outlines
from sam3_jax.outputs.rle import decode
from sam3_jax.utils.notes import ListingNotes

ROWS = 2**14  # of a group in a Parquet file
# Endings of images that Ultralytics reads: IMG_FORMATS of ultralytics/data/utils.py, version 8.4.
ULTRALYTICS = {
  ".avif", ".bmp", ".dng", ".heic", ".heif", ".jp2", ".jpeg", ".jpg", ".mpo", ".png", ".tif",
  ".tiff", ".webp",
}  # fmt: skip


def write_labelme(out: Path, notes: ListingNotes | None = None) -> Path:
  """Writes OUT/labelme/NAME.json for each image, as LabelMe reads it (version 5).

  LabelMe finds an image by its path relative to the .json file: copy the tree of files beside the
  images. Images given by an absolute path are found from anywhere. Pieces of an instance are shapes
  with the same `group_id`, its identity. Holes are filled.

  Args:
    out: the job's directory.
    notes: counts images whose file has another name than usual.

  Returns:
    The directory.
  """
  notes = ListingNotes() if notes is None else notes
  folder, names = out / "labelme", _Names(".json")
  for record in Records(out, parts.read_job(out)):
    image = PurePosixPath(record["image"])
    name, usual = names.of(PurePosixPath(*_parts(image)))
    if name != usual:
      what = "its name with another but for the ending; open its .json file"
      notes.remark(
        f"image shares {what}", f"images share {what.replace('its', 'their')}", f"{image}: {name}"
      )
    if "\\" in image.name:
      what = "a backslash in its name, which LabelMe takes for a directory"
      notes.remark(f"image has {what}", f"images have {what.replace('its', 'their')}", str(image))
    unpacked = any(part.endswith(".tar") for part in image.parts[:-1])
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
      "imagePath": str(image) if image.is_absolute() and not unpacked else image.name,
      "imageData": None,
      "imageHeight": record["height"],
      "imageWidth": record["width"],
    }
    _write(folder / name, json.dumps(values) + "\n")
  return folder


def write_yolo(out: Path, notes: ListingNotes | None = None) -> Path:
  """Writes OUT/yolo/data.yaml and OUT/yolo/labels/NAME.txt, as Ultralytics reads them.

  Ultralytics looks for images in OUT/yolo/images, and for the labels of each where `_label_path`
  says: copy the tree of images there, or links to the files (`cp -rs`); a link to the directory
  would be resolved first. A line is an instance: class, then its outline as fractions of width and
  height. The pieces of an instance are joined by lines without width, as Ultralytics joins COCO's.
  Holes are filled.

  Args:
    out: the job's directory.
    notes: counts images that Ultralytics does not read, or takes for others.

  Returns:
    The directory.
  """
  notes = ListingNotes() if notes is None else notes
  folder, names, records = out / "yolo", _Names(".txt"), Records(out, parts.read_job(out))
  numbers = {name: number - 1 for name, number in records.categories().items()}
  classes = "".join(f"\n  {number}: {_quoted(name)}" for name, number in numbers.items()) or " {}"
  # Without `path`, the directory of data.yaml counts, wherever that is.
  _write(folder / "data.yaml", f"train: images\nval: images\nnames:{classes}\n")
  for record in records:
    lines = []
    for label, one in _instances(record):
      points = joined(outlines(decode(one["segmentation"]).astype(bool)))
      if len(points):
        fractions = points / [record["width"], record["height"]]
        lines.append(" ".join([str(numbers[label]), *(f"{v:.6g}" for v in np.ravel(fractions))]))
    text = "".join(line + "\n" for line in lines)
    image = PurePosixPath(*_parts(PurePosixPath(record["image"])))
    name, usual = names.of(_label_path(image))
    if name != usual:
      what = "its name with another but for the ending, and would get that one's labels"
      renamed = PurePosixPath("images", image.with_name(name.stem + image.suffix))
      notes.remark(
        f"image shares {what}", f"images share {what.replace('its', 'their')}",
        f"copy {image} as {renamed}",
      )  # fmt: skip
    if image.suffix.lower() not in ULTRALYTICS:
      what = "an ending that Ultralytics does not read"
      notes.remark(f"image has {what}", f"images have {what}", str(image))
    _write(folder / name, text)
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
    image = {key: record[key] for key in ("input", "width", "height")}
    image["image"] = _utf8(record["image"])
    for prompt in record["prompts"]:
      for one in prompt["instances"]:
        found = {key: one[key] for key in ("id", "score", "bbox", "area")}
        counts = one["segmentation"]["counts"]
        yield {**image, "text": _utf8(prompt.get("text")), **found, "counts": counts}


def _instances(record: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
  for prompt in record["prompts"]:
    for one in prompt["instances"]:
      yield name_of(prompt), one


class _Names:
  """Names of files in a layout that has one for each image, by the image's name without its ending.

  Images of which both would have the same file get different ones; so do files and directories.
  """

  def __init__(self, ending: str):
    self._ending, self._taken = ending, set[PurePosixPath]()

  def of(self, image: PurePosixPath) -> tuple[PurePosixPath, PurePosixPath]:
    """The name of an image's file, and the name that it usually has."""
    usual = image.with_name(image.stem + self._ending)
    parents = [part + "_" if part.endswith(self._ending) else part for part in usual.parent.parts]
    folder, number = PurePosixPath(*parents), 1
    name = folder / usual.name
    while name in self._taken:
      several = f"-{number}" if number > 1 else ""
      name, number = folder / f"{image.name}{several}{self._ending}", number + 1
    self._taken.add(name)
    return name, usual


def _parts(image: PurePosixPath) -> list[str]:
  """An image's name below any directory: without root and `..`."""
  kept = [part.replace("\0", "_") for part in image.parts if part not in ("/", "//", "..")]
  return kept or ["_"]


def _label_path(image: PurePosixPath) -> PurePosixPath:
  """Where Ultralytics looks for the labels of images/IMAGE: the last `images` becomes `labels`.

  `img2label_paths` of ultralytics/data/utils.py, version 8.4; the ending is not replaced here.
  """
  folders = ["images", *image.parent.parts]
  last = len(folders) - 1 - folders[::-1].index("images")
  folders[last] = "labels"
  return PurePosixPath(*folders, image.name)


def _quoted(name: str) -> str:
  """A string as YAML's double-quoted scalar, which nothing takes for a number, a key or `no`."""
  # JSON's escapes are not YAML's: its pairs of surrogates would be two characters.
  escapes = {'"': '\\"', "\\": "\\\\"}
  return '"' + "".join(
    escapes.get(one, one) if one.isprintable() else f"\\U{ord(one):08x}" for one in name
  ) + '"'  # fmt: skip


def _utf8(text: str | None) -> str | None:
  """Text that Parquet can hold: bytes of a file name that are not UTF-8 are escaped."""
  return text if text is None else text.encode(errors="backslashreplace").decode()


def _write(path: Path, text: str) -> None:
  with Draft(path) as draft:
    draft.write(text.encode())
    draft.commit()
