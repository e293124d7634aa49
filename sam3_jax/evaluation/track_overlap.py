"""How much the true and the predicted objects of a video overlap, in each frame and in total."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from sam3_jax.outputs.rle import Box, Rle, areas, coco_api

Masks = Sequence[Rle | None]  # of an object, one for each frame
Boxes = Sequence[Box | None]


@dataclasses.dataclass(frozen=True)
class Overlap:
  """IoUs of G true with P predicted objects in T frames.

  Attributes:
    truths: in which frames each true object is visible.
    found: in which frames each predicted object is visible.
    iou: in each frame; 0 where one of both is not visible.
    tubes: of the whole tracks: the intersections of all frames over the unions of all frames.
  """

  truths: Bool[np.ndarray, "G T"]
  found: Bool[np.ndarray, "P T"]
  iou: Float[np.ndarray, "T G P"]
  tubes: Float[np.ndarray, "G P"]

  def select(self, truths: Sequence[int], found: Sequence[int]) -> "Overlap":
    """The overlap of some of the objects, by their indices."""
    rows, columns = np.array(truths, np.int64), np.array(found, np.int64)
    cells = np.ix_(rows, columns)
    iou = self.iou[:, cells[0], cells[1]]
    return Overlap(self.truths[rows], self.found[columns], iou, self.tubes[cells])


def overlap_masks(truths: Sequence[Masks], found: Sequence[Masks], frames: int) -> Overlap:
  """The overlap of masks of the same size."""
  seen, shown = _visible(truths, frames), _visible(found, frames)
  iou = np.zeros((frames, len(truths), len(found)))
  api = coco_api()
  for t in range(frames):
    rows, columns = np.flatnonzero(seen[:, t]), np.flatnonzero(shown[:, t])
    if len(rows) and len(columns):
      own, other = ([side[i][t] for i in index.tolist()]
                    for side, index in ((truths, rows), (found, columns)))  # fmt: skip
      iou[t][np.ix_(rows, columns)] = api.iou(own, other, [0] * len(other))
  own, other = _areas(truths, frames).T[:, :, None], _areas(found, frames).T[:, None]
  common = np.rint(iou * (own + other) / (1 + iou)).sum(axis=0)  # intersections are whole numbers
  union = own.sum(axis=0) + other.sum(axis=0) - common
  return Overlap(seen, shown, iou, common / np.maximum(union, 1))


def overlap_boxes(truths: Sequence[Boxes], found: Sequence[Boxes], frames: int) -> Overlap:
  """The overlap of boxes x, y, width, height.

  IoUs are computed in float32, as in Meta's evaluators: they are compared with thresholds, which
  they may equal.
  """
  seen, shown = _visible(truths, frames), _visible(found, frames)
  common, union = _box_overlap(_corners(truths, frames), _corners(found, frames))
  tubes = _ratio(common.sum(axis=0), union.sum(axis=0))
  return Overlap(seen, shown, _ratio(common, union), tubes.astype(np.float64))


def _visible(tracks: Sequence[Sequence[object]], frames: int) -> Bool[np.ndarray, "n T"]:
  rows = [[one is not None for one in track] for track in tracks]
  return np.array(rows, bool).reshape(len(tracks), frames)


def _areas(tracks: Sequence[Masks], frames: int) -> Int[np.ndarray, "n T"]:
  """Pixels of each mask, 0 where there is none."""
  found = np.zeros((len(tracks), frames), np.int64)
  rles = [rle for track in tracks for rle in track if rle is not None]
  pixels, _ = areas(rles, [tuple(rle["size"]) for rle in rles])
  found[_visible(tracks, frames)] = pixels
  return found


def _ratio(common: Float[np.ndarray, "..."], union: Float[np.ndarray, "..."]):
  return np.where(union > 0, common / np.where(union > 0, union, 1), np.float32(0))


def _corners(tracks: Sequence[Boxes], frames: int) -> Float[np.ndarray, "T n 4"]:
  """Boxes as x0, y0, x1, y1, zeros where there is none."""
  rows = [[(0, 0, 0, 0) if box is None else box for box in track] for track in tracks]
  boxes = np.array(rows, np.float32).reshape(len(tracks), frames, 4).transpose(1, 0, 2)
  boxes[..., 2:] += boxes[..., :2]
  return boxes


def _box_overlap(
  own: Float[np.ndarray, "T G 4"], other: Float[np.ndarray, "T P 4"]
) -> tuple[Float[np.ndarray, "T G P"], Float[np.ndarray, "T G P"]]:
  """Areas of the intersections and of the unions."""
  a, b = own[:, :, None], other[:, None]
  sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
  common = np.prod(np.maximum(sides, 0), axis=-1)
  union = np.prod(a[..., 2:] - a[..., :2], axis=-1) + np.prod(b[..., 2:] - b[..., :2], axis=-1)
  return common, union - common
