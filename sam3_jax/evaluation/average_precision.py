"""COCO's average precision of masks and boxes, as pycocotools computes it.

Each pair of image and phrase is an image of its own and there are no categories: precision over
all pairs at each recall, averaged over overlaps of 0.50, 0.55 .. 0.95. It knows no threshold, so
predictions of low scores count; and the false alarms on pairs without objects lower it only through
their rank.
"""

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

from sam3_jax.datasets.annotations import Pair
from sam3_jax.evaluation.predictions import Prediction

# Places of these figures in pycocotools' `stats`.
_STATS = {
  "ap": 0,
  "ap_50": 1,
  "ap_75": 2,
  "ap_small": 3,
  "ap_medium": 4,
  "ap_large": 5,
  "ar_100": 8,
}


def average_precision(
  pairs: Sequence[Pair], found: Mapping[int, Sequence[Prediction]]
) -> dict[str, float | None]:
  """Average precision and recall in per cent; crowds are ignored as COCO does.

  Args:
    pairs: the truth.
    found: predictions by pair; the best 100 of a pair count.

  Returns:
    `ap`, `ap_50`, `ap_75`; `ap_small`, `ap_medium`, `ap_large` of objects under 32 x 32, up to
    96 x 96 and over it; `ar_100`, the recall. And the same of boxes, `box_ap` and so on. None where
    there is no object to be found.
  """
  from pycocotools.cocoeval import COCOeval

  evaluator: Any = COCOeval
  figures: dict[str, float | None] = {}
  with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
    truth = _index([(pair.id, one) for pair in pairs for one in pair.objects], pairs)
    results = _index([(pair.id, one) for pair in pairs for one in found.get(pair.id, ())], pairs)
    for kind, prefix in (("segm", ""), ("bbox", "box_")):
      work = evaluator(truth, results, kind)
      work.params.useCats = 0
      work.evaluate()
      work.accumulate()
      work.summarize()
      for name, place in _STATS.items():
        value = float(work.stats[place])
        figures[prefix + name] = None if value < 0 else 100 * value
  return figures


def _index(objects: Sequence[tuple[int, Any]], pairs: Sequence[Pair]) -> Any:
  """Objects or predictions as pycocotools holds them."""
  from pycocotools import mask
  from pycocotools.coco import COCO

  index: Any = COCO()
  index.dataset = {
    "images": [{"id": p.id, "height": p.height, "width": p.width} for p in pairs],
    "categories": [{"id": 1}],
    "annotations": [
      {
        "id": i,  # not 0, which stands for "none" in its tables of matches
        "image_id": pair,
        "category_id": 1,
        "bbox": list(one.box),
        "segmentation": one.rle,
        "area": float(mask.area(one.rle)),
        "iscrowd": int(getattr(one, "crowd", False)),
        "score": getattr(one, "score", 1.0),
      }
      for i, (pair, one) in enumerate(objects, start=1)
    ],
  }
  index.createIndex()
  return index
