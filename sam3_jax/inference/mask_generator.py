"""Segments everything in an image: a grid of point prompts, filtering, non-maximum suppression.

The task and the names of the options are those of Segment Anything's automatic mask generator
(Kirillov et al. 2023, arXiv:2304.02643, appendix B). There are two differences. The stability of a
mask is measured on the decoder's grid instead of in the image, so that masks that fail it are never
resized. The boxes for suppression are measured on that grid, too.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from sam3_jax.inputs.preprocess import MAX_PIXELS, ImageSource, read_image
from sam3_jax.inputs.visual_prompts import ComputedPrompt, VisualPrompt
from sam3_jax.ops.masks import mask_to_box
from sam3_jax.outputs.instances import Instances, kept_masks
from sam3_jax.outputs.masks import Masks, RleMasks
from sam3_jax.outputs.rle import encode
from sam3_jax.types import ImageEmbedding, VisualMasks
from sam3_jax.utils.validation import as_array, check_flag, check_numbers

MAX_POINTS_PER_SIDE = 1024  # more than the pixels of the released model's input (1008)
MAX_LAYERS = 8  # of crops, 87,381 in all
EDGE = 20.0  # pixels: a mask whose box is this near to an inner edge of its crop is cut off


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskGeneration:
  """Options of `generate_masks`.

  Attributes:
    points_per_side: point prompts per side of the grid, at most `MAX_POINTS_PER_SIDE`.
    points_per_batch: point prompts decoded in one call; memory grows with it.
    point_grids: replaces `points_per_side`: x, y of the points as fractions, one array for each
      layer of crops.
    multimask_output: three masks per point, else one.
    pred_iou_thresh: drops masks with a lower predicted IoU.
    stability_score_thresh: drops masks with a lower stability: the area at a threshold that is
      higher by `stability_score_offset`, divided by the area at one that is lower by it.
    stability_score_offset: offset of the two thresholds of the stability, in logits.
    box_nms_thresh: drops the worse of two masks whose boxes overlap with a higher IoU.
    crop_n_layers: number of layers of smaller crops to segment as well: 2 x 2 crops in the first,
      4 x 4 in the second.
    crop_nms_thresh: as `box_nms_thresh`, between crops; keeps the mask of the smaller crop.
    crop_overlap_ratio: fraction of the image's shorter side that the first layer's crops share.
    crop_n_points_downscale_factor: the n-th layer of crops uses `points_per_side` divided by the
      n-th power of this factor.
    min_mask_region_area: pixels; fills smaller holes and removes smaller islands.

  Raises:
    ValueError: a value out of range.
  """

  points_per_side: int = 32
  points_per_batch: int = 64
  point_grids: Sequence[Any] | None = None
  multimask_output: bool = True
  pred_iou_thresh: float = 0.8
  stability_score_thresh: float = 0.95
  stability_score_offset: float = 1.0
  box_nms_thresh: float = 0.7
  crop_n_layers: int = 0
  crop_nms_thresh: float = 0.7
  crop_overlap_ratio: float = 512 / 1500
  crop_n_points_downscale_factor: int = 1
  min_mask_region_area: float = 0

  def __post_init__(self):
    check = functools.partial(check_numbers, self, "")
    check(("points_per_side",), 1, MAX_POINTS_PER_SIDE, whole=True)
    check(("points_per_batch", "crop_n_points_downscale_factor"), 1, whole=True)
    check(("crop_n_layers",), 0, MAX_LAYERS, whole=True)
    check(("pred_iou_thresh", "stability_score_thresh"), 0, 1)
    check(("box_nms_thresh", "crop_nms_thresh", "crop_overlap_ratio"), 0, 1)
    check(("stability_score_offset", "min_mask_region_area"), 0)
    check_flag("multimask_output", self.multimask_output)
    if self.point_grids is not None:
      _check_grids(self.point_grids, self.crop_n_layers + 1)

  def grid(self, layer: int) -> Float[np.ndarray, "n 2"]:
    """The point prompts of a layer's crops: x, y as fractions."""
    if self.point_grids is not None:
      return np.asarray(self.point_grids[layer], np.float64)
    side = max(1, self.points_per_side // self.crop_n_points_downscale_factor**layer)
    centers = (np.arange(side) + 0.5) / side
    return np.stack(np.meshgrid(centers, centers), axis=-1).reshape(-1, 2)


def _check_grids(grids: Any, layers: int) -> None:
  count = len(grids) if isinstance(grids, Sequence | np.ndarray) else 0
  if count < layers:
    raise ValueError(f"point_grids must be an array for each layer, {layers}; got {grids!r:.60}.")
  for layer, grid in enumerate(grids):
    points = as_array(grid)
    shaped = points.dtype.kind in "fiu" and points.size and points.shape[1:] == (2,)
    if not shaped or not ((points >= 0) & (points <= 1)).all():  # NaN is not
      raise ValueError(
        f"point_grids[{layer}] must be [n, 2] of x, y in [0, 1]; "
        f"got {' '.join(repr(grid).split()):.60}."
      )


@dataclasses.dataclass(frozen=True)
class Segments(Instances):
  """All objects of an image, best first.

  Attributes:
    ids: 1, 2, ..
    scores: predicted IoU.
    boxes: of the masks: xyxy in pixels of the image.
    masks: over the image.
    stability: of the masks, in [0, 1].
    points: the point prompt of each: x, y in pixels of the image.
    crops: the crop of each: xyxy in pixels of the image.
  """

  stability: Float[np.ndarray, " n"]
  points: Float[np.ndarray, "n 2"]
  crops: Float[np.ndarray, "n 4"]


@dataclasses.dataclass
class _Candidates:
  """Masks that passed the filters, on the decoder's grid; the other fields in image pixels."""

  logits: Float[np.ndarray, "n Hm Wm"]
  scores: Float[np.ndarray, " n"]
  stability: Float[np.ndarray, " n"]
  boxes: Float[np.ndarray, "n 4"]
  points: Float[np.ndarray, "n 2"]
  crops: Float[np.ndarray, "n 4"]

  def take(self, index: Any) -> "_Candidates":
    return _Candidates(*(array[index] for array in vars(self).values()))


class VisualDecoder(Protocol):
  """The method of `Sam3` that `segment_embedding` uses."""

  def decode_visual(
    self, embedding: ImageEmbedding, prompts: Sequence[VisualPrompt], *, multimask: bool = True
  ) -> VisualMasks: ...


class VisualModel(VisualDecoder, Protocol):
  """The methods of `Sam3` that `generate_masks` uses."""

  def encode(
    self, images: ImageSource, *, visual: bool = False, max_pixels: int = MAX_PIXELS
  ) -> ImageEmbedding: ...


def generate_masks(
  model: VisualModel,
  image: ImageSource,
  options: MaskGeneration | None = None,
  *,
  max_pixels: int = MAX_PIXELS,
) -> Segments:
  """Segments everything in one image; see `Sam3.generate_masks`."""
  options = MaskGeneration() if options is None else options
  if not isinstance(options, MaskGeneration):
    raise TypeError(
      f"options must be a MaskGeneration, MaskGeneration(points_per_side=16); got {options!r:.60}."
    )
  source_image = read_image(image, max_pixels=max_pixels)
  height, width = source_image.shape[:2]
  found = _join(
    [
      _image_candidates(model, source_image, crop, options.grid(layer), options)
      for layer, crop in _crops(height, width, options)
    ]
  )
  if options.crop_n_layers and len(found.scores):
    areas = (found.crops[:, 2] - found.crops[:, 0]) * (found.crops[:, 3] - found.crops[:, 1])
    found = found.take(suppress(found.boxes, -areas, options.crop_nms_thresh))
  return _finish(found, (height, width), options)


def segment_embedding(
  model: VisualDecoder, embedding: ImageEmbedding, options: MaskGeneration
) -> Segments:
  """`generate_masks` for an image that is encoded already, without smaller crops.

  Args:
    model: decodes visual prompts.
    embedding: of one image, encoded with `visual=True`.
    options: with `crop_n_layers=0`, as other layers need the image.

  Raises:
    ValueError: other options, or as `Sam3.decode_visual`.
  """
  if options.crop_n_layers:
    raise ValueError(
      f"crop_n_layers is {options.crop_n_layers}, but smaller crops need the image: use 0, or "
      "generate_masks."
    )
  height, width = np.asarray(embedding.sizes)[0].tolist()
  whole = (0, 0, width, height)
  found = _crop_candidates(model, embedding, whole, (height, width), options.grid(0), options)
  return _finish(found, (height, width), options)


def suppress(
  boxes: Float[np.ndarray, "n 4"], scores: Float[np.ndarray, " n"], threshold: float
) -> np.ndarray:
  """Greedy non-maximum suppression: indices of the boxes (xyxy) to keep, best first.

  Drops a box whose IoU with a better kept box is above `threshold`; ties by index.
  """
  order = np.argsort(-scores, kind="stable")
  boxes = np.asarray(boxes, np.float64)[order]
  areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
  keep = np.ones(len(order), bool)
  for i, box in enumerate(boxes):
    if keep[i]:
      rest = boxes[i + 1 :]
      sides = np.minimum(rest[:, 2:], box[2:]) - np.maximum(rest[:, :2], box[:2])
      shared = np.prod(np.maximum(sides, 0), axis=1)
      keep[i + 1 :] &= shared <= threshold * (areas[i] + areas[i + 1 :] - shared)
  return order[keep]


def clean(mask: Bool[np.ndarray, "h w"], area: float) -> Bool[np.ndarray, "h w"]:
  """Fills holes, then removes islands, of fewer than `area` pixels, connected by sides or corners.

  If all islands are smaller, keeps the largest.
  """
  from scipy import ndimage  # not at the top: it is slow to import

  def regions(inside):
    found: Any = ndimage.label(inside, structure=np.ones((3, 3)))
    return found[0], np.bincount(found[0].ravel())[1:]

  labels, sizes = regions(~mask)
  mask = mask | np.concatenate([[False], sizes < area])[labels]
  labels, sizes = regions(mask)
  if not len(sizes):
    return mask
  keep = sizes >= area
  keep[sizes.argmax()] = True
  return np.concatenate([[False], keep])[labels]


def _crops(
  height: int, width: int, options: MaskGeneration
) -> Iterator[tuple[int, tuple[int, int, int, int]]]:
  """Yields layer and crop (xyxy): the whole image, then 2 x 2 overlapping crops, then 4 x 4."""
  yield 0, (0, 0, width, height)
  for layer in range(1, options.crop_n_layers + 1):
    count = 2**layer
    shared = int(options.crop_overlap_ratio * min(height, width) * 2 / count)
    spans = []
    for side in (width, height):
      length = math.ceil((shared * (count - 1) + side) / count)
      starts = [min((length - shared) * i, side - 1) for i in range(count)]
      spans.append([(start, min(start + length, side)) for start in starts])
    for y0, y1 in spans[1]:
      for x0, x1 in spans[0]:
        yield layer, (x0, y0, x1, y1)


def _image_candidates(
  model: VisualModel,
  image: np.ndarray,
  crop: tuple[int, int, int, int],
  grid: Float[np.ndarray, "n 2"],
  options: MaskGeneration,
) -> _Candidates:
  """Encodes one crop of an image, and finds its masks."""
  x0, y0, x1, y1 = crop
  embedding = model.encode(image[y0:y1, x0:x1], visual=True, max_pixels=image.size)
  size = image.shape[0], image.shape[1]
  return _crop_candidates(model, embedding, crop, size, grid, options)


def _crop_candidates(
  model: VisualDecoder,
  embedding: ImageEmbedding,
  crop: tuple[int, int, int, int],
  size: tuple[int, int],
  grid: Float[np.ndarray, "n 2"],
  options: MaskGeneration,
) -> _Candidates:
  """The masks of one encoded crop of an image of `size` (h, w), after suppression."""
  x0, y0, x1, y1 = crop
  corner, extent = np.array([x0, y0]), np.array([x1 - x0, y1 - y0])
  points, parts = grid * extent, []
  for start in range(0, len(points), options.points_per_batch):
    batch = points[start : start + options.points_per_batch]
    prompts = [ComputedPrompt(points=[point]) for point in batch]
    found = model.decode_visual(embedding, prompts, multimask=options.multimask_output)
    scores, (stability, cells) = jax.device_get(
      (found.iou, _measure(found.mask_logits, options.stability_score_offset))
    )
    good = (scores > options.pred_iou_thresh) & (stability >= options.stability_score_thresh)
    prompt, k = np.nonzero(good & (cells[..., 2] > 0))
    logits = kept_masks(found.mask_logits, [k[prompt == p] for p in range(len(batch))])
    stretch = np.tile(extent / found.mask_logits.shape[:1:-1], 2)
    parts.append(
      _Candidates(
        logits=np.concatenate(logits),
        scores=scores[prompt, k],
        stability=stability[prompt, k],
        boxes=cells[prompt, k] * stretch + np.tile(corner, 2),
        points=batch[prompt] + corner,
        crops=np.tile(np.array(crop, np.float64), (len(prompt), 1)),
      )
    )
  found = _join(parts)
  found = found.take(~_cut(found.boxes, crop, size))
  return found.take(suppress(found.boxes, found.scores, options.box_nms_thresh))


@jax.jit
def _measure(
  logits: Float[Array, "P K Hm Wm"], offset: Float[Array, ""]
) -> tuple[Float[Array, "P K"], Float[Array, "P K 4"]]:
  """Stability of masks, and their boxes, xyxy in cells; zeros for empty masks."""
  inner, outer = ((logits > x).sum((2, 3)) for x in (offset, -offset))
  stability = inner / jnp.maximum(outer, 1)
  ends = []
  for axis in (2, 3):  # x from the columns with any cell inside, y from the rows
    inside = (logits > 0).any(axis)
    last = inside.shape[-1] - inside[..., ::-1].argmax(-1)
    ends.append((inside.argmax(-1), jnp.where(inside.any(-1), last, 0)))
  (x0, x1), (y0, y1) = ends
  return stability, jnp.stack([x0, y0, x1, y1], axis=-1).astype(jnp.float32)


def _cut(
  boxes: Float[np.ndarray, "n 4"], crop: tuple[int, int, int, int], size: tuple[int, int]
) -> Bool[np.ndarray, " n"]:
  """Whether each box is at an edge of the crop that is not an edge of the image."""
  limits = np.array([0, 0, size[1], size[0]])
  near = np.abs(boxes - np.array(crop)) <= EDGE
  return np.any(near & (np.abs(boxes - limits) > EDGE), axis=1)


def _finish(found: _Candidates, size: tuple[int, int], options: MaskGeneration) -> Segments:
  """Resizes the masks to the image, cleans and boxes them, and drops new duplicates."""
  rles, boxes, unchanged = [], [], []
  for logits, crop in zip(found.logits, found.crops.astype(int), strict=True):
    x0, y0, x1, y1 = crop.tolist()
    mask = np.zeros(size, bool)
    mask[y0:y1, x0:x1] = Masks(logits[None], (y1 - y0, x1 - x0))[0]
    cleaned = clean(mask, options.min_mask_region_area) if options.min_mask_region_area else mask
    unchanged.append(np.array_equal(mask, cleaned))
    rles.append(encode(cleaned))
    boxes.append(mask_to_box(cleaned))
  found.boxes = np.array(boxes, np.float64).reshape(-1, 4)
  order = np.argsort(-found.scores, kind="stable")
  if options.min_mask_region_area:  # prefer masks that cleaning did not change
    preference = found.scores + 2 * np.array(unchanged, bool)
    kept = suppress(found.boxes, preference, options.box_nms_thresh)
    order = order[np.isin(order, kept)]
  order = order[found.boxes[order, 2] > 0]  # drop masks thinner than a pixel
  found = found.take(order)
  return Segments(
    ids=np.arange(1, len(order) + 1),
    scores=found.scores.astype(np.float32),
    boxes=found.boxes.astype(np.float32),
    masks=RleMasks([rles[i] for i in order], size),
    stability=found.stability.astype(np.float32),
    points=found.points.astype(np.float32),
    crops=found.crops.astype(np.float32),
  )


def _join(parts: Sequence[_Candidates]) -> _Candidates:
  return _Candidates(*(np.concatenate(arrays) for arrays in zip(*map(_arrays, parts), strict=True)))


def _arrays(part: _Candidates) -> list[np.ndarray]:
  return list(vars(part).values())
