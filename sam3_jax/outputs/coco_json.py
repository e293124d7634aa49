"""Results on disk: COCO-style JSON with run-length masks, beside the image of `visualize`.

The format is that of COCO's instance annotations (https://cocodataset.org/#format-data), with a
`score` as in its results, and an `info` that says which checkpoint was asked what.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from sam3_jax.utils.atomic_files import Draft

if TYPE_CHECKING:
  from sam3_jax.outputs.instances import Instances

Write = Callable[[IO[bytes]], Any]  # writes into a file


def coco(
  file_name: str,
  size: tuple[int, int],
  instances: "Sequence[Instances]",
  phrases: Sequence[str],
  info: Mapping[str, Any],
) -> dict[str, Any]:
  """One image's instances as a COCO data set.

  Args:
    file_name: what the image is called.
    size: its height and width in pixels.
    instances: what was found, one entry a phrase.
    phrases: distinct; they become the categories, found or not.
    info: of the whole, plain values.

  Returns:
    Plain values, ready for JSON. Annotations are sorted by phrase, then by descending score; their
    ids are the identities. `bbox` is x, y, width, height in pixels, clipped to the image;
    `segmentation` is compressed RLE, which pycocotools reads; `area` counts its pixels.
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
  """Instances as plain values, in their order.

  `bbox` is x, y, width, height in pixels, clipped to the image of this height and width; `area`
  counts the mask's pixels.
  """
  from pycocotools import mask  # not at the top: it is slow to import

  from sam3_jax.outputs.instances import xywh  # nor this, which brings JAX

  rows = []
  for i, (score, box) in enumerate(zip(found.scores, xywh(found.boxes, size), strict=True)):
    rle: Any = found.masks.rle(i)
    rows.append(
      {
        "id": int(found.ids[i]),
        "score": float(str(score)),  # as many digits as tell float32 scores apart
        "bbox": box.tolist(),
        "area": int(mask.area(rle)),
        "segmentation": rle,
      }
    )
  return rows


def output_stems(paths: Sequence[Path]) -> list[str]:
  """What each image's results are called, before the ending: its name without the suffix.

  Of images with the same name (whatever the case, as some file systems do not tell `A` from `a`),
  the second becomes `name-2`, and so on, in the order given.
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
  """Writes files that all appear when all are complete, or not at all.

  Raises:
    OSError: with the name of the file, and the reason.
  """
  drafts: list[Draft] = []
  try:
    for path, put in files.items():
      drafts.append(draft := Draft(path))
      with draft.naming():
        put(draft.file)
      draft.sync()
    for draft in drafts:
      draft.commit()
  finally:
    for draft in drafts:
      draft.discard()


def json_of(values: Any) -> Write:
  """Writes plain values."""
  text = json.dumps(values, allow_nan=False) + "\n"
  return lambda file: file.write(text.encode())


def png_of(image: Any) -> Write:
  """Writes a PIL image."""
  # Level 4 takes a third of level 6's time, and 3 % more bytes.
  return lambda file: image.save(file, "PNG", compress_level=4)
