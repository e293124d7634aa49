"""A picture's results as a line of a part: plain values, masks as COCO's run lengths."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from sam3_jax.batch.asked import AnyPrompt, as_json
from sam3_jax.postprocess import Instances


def record(
  number: int | None,
  name: str,
  size: tuple[int, int],
  prompts: Sequence[AnyPrompt],
  found: Sequence[Instances],
) -> bytes:
  """A line of JSON.

  Args:
    number: the input's place in the list; None for an input of no list.
    name: of the picture.
    size: its height and width in pixels.
    prompts: what was asked.
    found: what was found for each.
  """
  height, width = size
  asked = [
    {**as_json(prompt), "instances": entries(one, size)}
    for prompt, one in zip(prompts, found, strict=True)
  ]
  place = {} if number is None else {"input": number}
  values = {**place, "image": name, "width": width, "height": height, "prompts": asked}
  return json.dumps(values, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def entries(found: Instances, size: tuple[int, int]) -> list[dict[str, Any]]:
  """Instances as plain values, best first.

  `bbox` is x, y, width, height in pixels, clipped to the picture; `area` counts the mask's pixels.
  """
  from pycocotools import mask as coco  # not at the top: it is slow to import

  height, width = size
  boxes = np.clip(found.boxes.astype(np.float64), 0, [width, height] * 2)
  boxes = np.round(np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1), 2)
  rows = []
  for i, (score, box) in enumerate(zip(found.scores, boxes.tolist(), strict=True)):
    rle: Any = found.masks.rle(i)
    rows.append(
      {
        "id": int(found.ids[i]),
        "score": float(str(score)),  # as many digits as tell float32 scores apart
        "bbox": box,
        "area": int(coco.area(rle)),
        "segmentation": rle,
      }
    )
  return rows
