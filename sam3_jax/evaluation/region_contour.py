"""Region similarity J and contour accuracy F of an object's masks in a video, as in DAVIS 2017.

The definitions are those of Perazzi et al. 2016, "A Benchmark Dataset and Evaluation Methodology
for Video Object Segmentation", and Pont-Tuset et al. 2017, arXiv:1704.00675. J is the IoU of two
masks. F is the harmonic mean of precision and recall of their boundaries, where boundary pixels
match within 0.8 % of the image's diagonal. A score is the mean over the frames of an object, then
over objects.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from sam3_jax.ops.masks import mask_to_box

Mask = Bool[np.ndarray, "h w"]

BOUND = 0.008  # of the image's diagonal
RECALL = 0.5  # frames above it count for the recall
_QUARTERS = 4  # parts of a video for the decay


class Scores(NamedTuple):
  """J and F of an object in each of several frames, in [0, 1]."""

  region: Float[np.ndarray, " t"]
  contour: Float[np.ndarray, " t"]

  @property
  def mean(self) -> float:
    """J&F: the mean of both means."""
    return float((self.region.mean() + self.contour.mean()) / 2)


def region(mask: Mask, truth: Mask) -> float:
  """J: the IoU; 1 if both masks are empty."""
  union = int((mask | truth).sum())
  return float((mask & truth).sum() / union) if union else 1.0


def contour(mask: Mask, truth: Mask, bound: float = BOUND) -> float:
  """F: how well the boundaries agree; 1 if both masks have none, 0 if one of them has.

  Args:
    mask: the predicted mask.
    truth: the annotated one, of the same size.
    bound: tolerance as a fraction of the diagonal, which is rounded up to whole pixels; or in
      pixels, from 1.
  """
  radius = bound if bound >= 1 else math.ceil(bound * math.hypot(*truth.shape))
  own, wanted = boundary(mask), boundary(truth)
  # A full image has no boundary either, so this compares boundaries, not masks.
  if not own.any() or not wanted.any():
    return float(own.any() == wanted.any())
  x0, y0, x1, y1 = mask_to_box(own | wanted)
  own, wanted = own[y0:y1, x0:x1], wanted[y0:y1, x0:x1]
  precision = (own & _dilated(wanted, radius)).sum() / own.sum()
  recall = (wanted & _dilated(own, radius)).sum() / wanted.sum()
  total = precision + recall
  return float(2 * precision * recall / total) if total else 0.0


def boundary(mask: Mask) -> Mask:
  """The pixels that differ from the right, the lower or the lower right neighbor.

  So the boundary is shifted by half a pixel to the upper left, and the border of the image is no
  boundary. Pixels beyond the image equal the nearest pixel inside.
  """
  grown = np.pad(mask, ((0, 1), (0, 1)), "edge")
  return (mask != grown[:-1, 1:]) | (mask != grown[1:, :-1]) | (mask != grown[1:, 1:])


def scores(masks: Iterable[Mask], truths: Iterable[Mask]) -> Scores:
  """J and F of an object in each frame; masks and truths have the same number of frames."""
  pairs = [
    (region(mask, truth), contour(mask, truth)) for mask, truth in zip(masks, truths, strict=True)
  ]
  values = np.array(pairs, np.float64).reshape(-1, 2)
  return Scores(values[:, 0], values[:, 1])


def summary(objects: Sequence[Scores]) -> dict[str, float]:
  """The figures of a dataset, in percent.

  Args:
    objects: J and F of each object, at least one, each with at least one frame. In DAVIS's
      semi-supervised task they leave out the first and the last frame of a video.

  Returns:
    `jf`, the mean of `j` and `f`, which are means over objects of the means over frames; `j_recall`
    and `f_recall`, the fraction of frames above 0.5; `j_decay` and `f_decay`, the mean of the first
    quarter of the frames minus that of the last.
  """
  figures: dict[str, float] = {}
  for name, curves in (
    ("j", [one.region for one in objects]),
    ("f", [one.contour for one in objects]),
  ):
    figures[name] = float(np.mean([curve.mean() for curve in curves]))
    figures[f"{name}_recall"] = float(np.mean([(curve > RECALL).mean() for curve in curves]))
    figures[f"{name}_decay"] = float(np.mean([decay(curve) for curve in curves]))
  figures = {"jf": (figures["j"] + figures["f"]) / 2} | figures
  return {name: 100 * value for name, value in figures.items()}


def decay(curve: Float[np.ndarray, " t"]) -> float:
  """The mean of the first quarter of the frames minus that of the last; quarters share ends."""
  # DAVIS counts from 1 and adds 1e-10, so that halves are rounded up.
  ends = np.round(np.linspace(1, len(curve), _QUARTERS + 1) + 1e-10).astype(int) - 1
  return float(curve[: ends[1] + 1].mean() - curve[ends[-2] :].mean())


def _dilated(mask: Mask, radius: float) -> Mask:
  """Dilates by a disk: pixels whose distance to the mask is at most the radius."""
  from scipy import ndimage  # imported here because it is slow to import

  distances: Any = ndimage.distance_transform_edt(~mask)
  return distances <= radius
