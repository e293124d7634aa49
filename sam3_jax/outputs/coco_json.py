"""Writes results as COCO JSON with run-length masks.

The format is COCO's instance annotations (https://cocodataset.org/#format-data) with a `score`, as
in COCO results, and an `info` that names the checkpoint and the prompts.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from sam3_jax.utils.atomic_files import Draft

if TYPE_CHECKING:
  from sam3_jax.outputs.instances import Instances

Write = Callable[[IO[bytes]], Any]  # writes to a binary file


def coco(
  file_name: str,
  size: tuple[int, int],
  instances: "Sequence[Instances]",
  phrases: Sequence[str],
  info: Mapping[str, Any],
) -> dict[str, Any]:
  """Converts the instances of an image to a COCO dataset.

  Args:
    file_name: name of the image.
    size: height and width of the image in pixels.
    instances: the results, one entry for each phrase.
    phrases: distinct; they become the categories, even without instances.
    info: JSON values for `info`.

  Returns:
    JSON values. Annotations are sorted by phrase, then by descending score; their ids are the
    instances' ids. `bbox` is x, y, width, height in pixels, clipped to the image; `segmentation` is
    compressed RLE, which pycocotools reads; `area` is the number of its pixels.
  """
  height, width = size
  annotations = [
    {**entry, "image_id": 1, "category_id": category, "iscrowd": 0}
    for category, found in enumerate(instances, start=1)
    for entry in entries(found[np.argsort(-np.asarray(found.scores), kind="stable")], size)
  ]
  return {
    "info": dict(info),
    "images": [{"id": 1, "file_name": file_name, "width": width, "height": height}],
    "categories": [{"id": i, "name": phrase} for i, phrase in enumerate(phrases, start=1)],
    "annotations": annotations,
  }


def entries(found: "Instances", size: tuple[int, int]) -> list[dict[str, Any]]:
  """Converts instances to JSON values, in their order.

  `bbox` is x, y, width, height in pixels, clipped to an image of `size` (height and width); `area`
  is the number of pixels of the mask.
  """
  from pycocotools import mask  # not at the top: it is slow to import

  from sam3_jax.outputs.instances import xywh  # imports JAX

  rows = []
  for i, (score, box) in enumerate(zip(found.scores, xywh(found.boxes, size), strict=True)):
    rle: Any = found.masks.rle(i)
    rows.append(
      {
        "id": int(found.ids[i]),
        "score": float(str(score)),  # with the digits that distinguish float32 values
        "bbox": box.tolist(),
        "area": int(mask.area(rle)),
        "segmentation": rle,
      }
    )
  return rows


def output_stems(paths: Sequence[Path]) -> list[str]:
  """Unique stems for the output files of images: their names without the suffix.

  If several images have the same stem (ignoring case, as some file systems do), the second becomes
  `name-2`, and so on, in the given order.
  """
  taken = {path.stem.casefold() for path in paths}
  seen: set[str] = set()
  counts: dict[str, int] = {}
  stems = []
  for path in paths:
    stem, name = path.stem, path.stem.casefold()
    if name in seen:
      count = counts.get(name, 1) + 1
      while any((stem := f"{path.stem}-{count}").casefold() in one for one in (taken, seen)):
        count += 1
      counts[name] = count
    seen.add(stem.casefold())
    stems.append(stem)
  return stems


def write(files: Mapping[Path, Write]) -> None:
  """Writes several files atomically: all of them appear, or none.

  Raises:
    OSError: a file cannot be written; it has its name and the reason.
  """
  drafts: list[Draft] = []
  try:
    for path, write_to in files.items():
      drafts.append(draft := Draft(path))
      with draft.naming():
        write_to(draft.file)
      draft.sync()
    for draft in drafts:
      draft.commit()
  finally:
    for draft in drafts:
      draft.discard()


def json_of(values: Any) -> Write:
  """A function that writes JSON values to a file."""
  text = json.dumps(values, allow_nan=False) + "\n"
  return lambda file: file.write(text.encode())


def png_of(image: Any) -> Write:
  """A function that writes a PIL image to a file as PNG."""
  # Level 4 takes a third of the time of level 6 and 3 % more bytes.
  return lambda file: image.save(file, "PNG", compress_level=4)
