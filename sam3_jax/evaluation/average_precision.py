"""COCO's average precision of masks and boxes, as pycocotools computes it.

Each pair of image and phrase is treated as an image, without categories: the precision over all
pairs at each recall, averaged over IoU thresholds of 0.50, 0.55 .. 0.95. There is no score
threshold, so predictions with low scores count, and false positives on pairs without objects lower
the result only through their rank.
"""

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

from sam3_jax.datasets.annotations import Pair
from sam3_jax.evaluation.predictions import EvalPrediction

# Indices of these metrics in pycocotools' `stats`.
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
  pairs: Sequence[Pair], found: Mapping[int, Sequence[EvalPrediction]]
) -> dict[str, float | None]:
  """Average precision and recall in percent; crowds are ignored as in COCO.

  Args:
    pairs: the ground truth.
    found: predictions by pair id; the best 100 of a pair count.

  Returns:
    `ap`, `ap_50`, `ap_75`; `ap_small`, `ap_medium`, `ap_large` for objects under 32 x 32, up to
    96 x 96 and above; `ar_100`, the recall. The same for boxes, as `box_ap` etc. None if there are
    no objects.
  """
  from pycocotools.cocoeval import COCOeval

  evaluator: Any = COCOeval
  metrics: dict[str, float | None] = {}
  with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
    truth = _index([(pair.id, one) for pair in pairs for one in pair.objects], pairs)
    results = _index([(pair.id, one) for pair in pairs for one in found.get(pair.id, ())], pairs)
    for kind, prefix in (("segm", ""), ("bbox", "box_")):
      work = evaluator(truth, results, kind)
      work.params.useCats = 0
      work.evaluate()
      work.accumulate()
      work.summarize()
      for name, index in _STATS.items():
        value = float(work.stats[index])
        metrics[prefix + name] = None if value < 0 else 100 * value
  return metrics


def _index(objects: Sequence[tuple[int, Any]], pairs: Sequence[Pair]) -> Any:
  """A COCO index of objects or predictions, each with the id of its pair."""
  from pycocotools import mask
  from pycocotools.coco import COCO

  index: Any = COCO()
  index.dataset = {
    "images": [{"id": p.id, "height": p.height, "width": p.width} for p in pairs],
    "categories": [{"id": 1}],
    "annotations": [
      {
        "id": i,  # not 0, which means "no match" in pycocotools
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
