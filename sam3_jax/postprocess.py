"""From every query's prediction to instances of the source picture.

Follows Meta's `Sam3Processor`: a strict threshold on the score, boxes scaled to the picture and not
clipped, no suppression of overlaps, mask *logits* resized (not probabilities, as in transformers)
and cut at zero. Masks stay on the decoder's grid until asked for, one by one: a picture of
20,000 x 15,000 with 200 instances would otherwise need 60 GB.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, overload

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from sam3_jax.ranges import check_number
from sam3_jax.rle import decode, encode
from sam3_jax.types import Detections, VisualMasks

_FILLED = 10.0  # the logit of a filled hole: SAM 2's
_STRIP = 2**16  # values of a resized mask in work at a time: two such arrays fit the cache


def instances(
  detections: Detections, threshold: float | Sequence[float] = 0.5
) -> "list[Instances]":
  """The instances that score above `threshold`, for each prompt, best first (ties by query).

  Copies scores and boxes from the device, then the masks of what was kept, and no others.

  Args:
    detections: of `decode`; on a device or as NumPy arrays.
    threshold: in [0, 1]; one for all prompts, or one for each.

  Raises:
    ValueError: a threshold outside [0, 1], too few or too many of them, or a source picture
      without a size.
  """
  scores, boxes, ids, sizes = jax.device_get(
    (detections.scores, detections.boxes, detections.ids, detections.sizes)
  )
  thresholds = _thresholds(threshold, len(scores))
  for prompt, (height, width) in enumerate(sizes):
    if min(height, width) < 1:
      raise ValueError(
        f"the source picture of prompt {prompt} is {height} x {width} (height x width): "
        "boxes and masks need its size in pixels."
      )
  kept = []
  for row, limit in zip(scores, thresholds, strict=True):
    order = np.argsort(-row, kind="stable")
    kept.append(order[row[order] > limit])
  logits = kept_masks(detections.mask_logits, kept)
  return [
    Instances(
      ids=ids[p, queries],
      scores=scores[p, queries].astype(np.float32),
      boxes=boxes[p, queries].astype(np.float32)
      * np.array([width, height, width, height], np.float32),
      masks=Masks(logits[p], (height, width)),
    )
    for p, (queries, (height, width)) in enumerate(zip(kept, sizes, strict=True))
  ]


def visual_masks(found: VisualMasks, hole_area: int = 0) -> "list[Masks]":
  """What visual prompts point at, over the source picture: K masks a prompt, as `found` has them.

  Copies the masks of all prompts from the device.

  Args:
    found: of `decode_visual`; on a device or as NumPy arrays.
    hole_area: holes of at most so many cells of the decoder's grid are filled, before resizing.
      Meta's predictor fills up to 256 where its kernel for that runs, on a GPU; 0 fills none.

  Raises:
    ValueError: `hole_area` is no number from 0, or a source picture has no size.
  """
  check_number("hole_area", hole_area, 0, remedy="It is in cells of the grid; 0 fills none.")
  logits, sizes = jax.device_get((found.mask_logits, found.sizes))
  if hole_area:
    logits = [np.stack([fill_holes(mask, hole_area) for mask in masks]) for masks in logits]
  return [
    Masks(masks, (height, width)) for masks, (height, width) in zip(logits, sizes, strict=True)
  ]


def visual_instances(found: VisualMasks, first_id: int = 1) -> "list[Instances]":
  """Each visual prompt's best mask as an instance: scored by its IoU as the model guesses it, boxed
  by its pixels. A prompt whose best mask is empty has none.

  Args:
    found: of `decode_visual`; on a device or as NumPy arrays.
    first_id: identity of the first prompt's instance; the next one's is one more.
  """
  logits, iou, sizes = jax.device_get((found.mask_logits, found.iou, found.sizes))
  rows = []
  for i, (height, width) in enumerate(sizes.tolist()):
    k = int(iou[i].argmax())
    masks = Masks(logits[i, k : k + 1], (height, width))
    box = np.array([box_of(masks[0])], np.float32)
    scores = np.asarray(iou[i, k : k + 1], np.float32)
    one = Instances(np.array([first_id + i]), scores, box, masks)
    rows.append(one[box[:, 2] > 0])
  return rows


def box_of(mask: Bool[np.ndarray, "h w"]) -> tuple[int, int, int, int]:
  """The box around a mask's pixels, xyxy; zeros around none."""
  rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
  if not len(rows):
    return 0, 0, 0, 0
  return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def fill_holes(grid: Float[np.ndarray, "Hm Wm"], area: int) -> Float[np.ndarray, "Hm Wm"]:
  """Logits in which connected cells outside the mask (by sides or corners) are inside it, if they
  are at most `area` cells."""
  from scipy import ndimage  # not at the top: it is slow to import

  found: Any = ndimage.label(grid <= 0, structure=np.ones((3, 3)))
  labels = found[0]
  sizes = np.bincount(labels.ravel())
  sizes[0] = area + 1  # the mask itself
  return np.where((sizes <= area)[labels], np.asarray(_FILLED, grid.dtype), grid)


@dataclasses.dataclass(frozen=True)
class Instances:
  """The instances of one prompt, best first.

  Attributes:
    ids: unique in an image within one decode call, over all its prompts.
    scores: in (threshold, 1].
    boxes: xyxy in pixels of the source picture, x before y; not clipped to it.
    masks: over the source picture, resized when asked for.
  """

  ids: Int[np.ndarray, " n"]
  scores: Float[np.ndarray, " n"]
  boxes: Float[np.ndarray, "n 4"]
  masks: "Masks | RleMasks"

  def __len__(self) -> int:
    return len(self.ids)

  def __getitem__(self, index: slice | np.ndarray | Sequence[int]) -> "Instances":
    """Those that a slice, an array of positions or an array of bools selects."""
    if isinstance(index, int | np.integer):
      raise TypeError(f"use [{index}:{index + 1}], or .scores[{index}], .boxes[{index}] and so on.")
    return Instances(self.ids[index], self.scores[index], self.boxes[index], self.masks[index])

  def to_supervision(self, class_id: int = 0) -> Any:
    """As `supervision.Detections`, with all masks over the source picture at once.

    Args:
      class_id: of all of them: the prompt's number, say.

    Raises:
      ImportError: the package supervision is not installed.
    """
    try:
      import supervision  # pyright: ignore[reportMissingImports]
    except ImportError as error:
      raise ImportError("to_supervision needs supervision: pip install supervision.") from error
    return supervision.Detections(
      xyxy=self.boxes,
      mask=np.asarray(self.masks),
      confidence=self.scores,
      class_id=np.full(len(self), class_id),
      data={"identity": self.ids},
    )


class Masks:
  """Masks over the source picture, each made when it is asked for and not kept.

  `len(masks)`; `masks[i]` is bool [h, w]; `masks[a:b]` is again `Masks`; `masks.rle(i)` is COCO's
  run-length encoding; `np.asarray(masks)` is bool [n, h, w], all of them at once.

  Beside its result, a mask takes some 70 MB at 20,000 x 15,000. `rle` never has the whole mask in
  memory and takes the same, and what its runs take.

  Args:
    logits: before the sigmoid, on the decoder's grid.
    size: height and width of the source picture, in pixels.
  """

  def __init__(self, logits: Float[np.ndarray, "n Hm Wm"], size: tuple[int, int]):
    height, width = (int(side) for side in size)
    if min(height, width) < 1:
      raise ValueError(
        f"the source picture is {height} x {width} (height x width): masks need its size in pixels."
      )
    self.logits = logits
    self.size = height, width

  def __len__(self) -> int:
    return len(self.logits)

  def __repr__(self) -> str:
    return f"Masks({len(self)} of {self.size[0]} x {self.size[1]})"

  @overload
  def __getitem__(self, index: int | np.integer) -> Bool[np.ndarray, "h w"]: ...
  @overload
  def __getitem__(self, index: slice | np.ndarray | Sequence[int]) -> "Masks": ...
  def __getitem__(self, index):
    if not isinstance(index, int | np.integer):
      return Masks(self.logits[index], self.size)
    mask = np.zeros(self.size, bool)
    grid = self._grid(index)
    rows, columns = _reach(grid, self.size)
    for row, strip in _strips(grid, self.size, rows, columns):
      np.greater(strip, 0, out=mask[row : row + len(strip), columns])
    return mask

  def __array__(self, dtype=None, copy=None) -> Bool[np.ndarray, "n h w"]:
    if copy is False:
      raise ValueError("masks are made when asked for: np.asarray(masks, copy=False) cannot work.")
    masks = np.empty((len(self), *self.size), bool)
    for i in range(len(self)):
      masks[i] = self[i]
    return masks if dtype is None else masks.astype(dtype)

  def rle(self, index: int) -> dict:
    """COCO's compressed run lengths: {"size": [h, w], "counts": str}, as pycocotools writes them.

    Equal to `pycocotools.mask.encode(np.asfortranarray(masks[index]))`, "counts" decoded to str.
    """
    from pycocotools import mask as coco  # not at the top: it is slow to import

    height, width = self.size
    grid = self._grid(index)
    rows, columns = _reach(grid, self.size)
    # COCO's runs go down the columns: so make the transposed mask, and strips of whole columns.
    first, high = rows.start, rows.stop - rows.start
    changes = [np.zeros(0, np.int64)]
    for column, strip in _strips(grid.T, (width, height), columns, rows):
      # With a False before and after each column, a column's runs end in it.
      inside = np.zeros(len(strip) * (high + 1) + 1, bool)
      np.greater(strip, 0, out=inside[1:].reshape(-1, high + 1)[:, :high])
      right, down = np.divmod(np.flatnonzero(inside[1:] != inside[:-1]), high + 1)
      changes.append((column + right) * height + first + down)
    # A run that goes on in the next column ended and began at the same place: no change at all.
    change, times = np.unique(np.concatenate(changes), return_counts=True)
    runs = np.diff(change[times == 1], prepend=0, append=height * width)
    runs = runs[: len(runs) - (runs[-1] == 0)]
    encoded: Any = coco.frPyObjects(
      {"size": [height, width], "counts": runs.tolist()}, height, width
    )
    return {"size": [height, width], "counts": encoded["counts"].decode("ascii")}

  def at(self, size: tuple[int, int]) -> "Masks":
    """The same masks over a picture of another size."""
    return Masks(self.logits, size)

  def _grid(self, index: int | np.integer) -> Float[np.ndarray, "Hm Wm"]:
    if not -len(self) <= index < len(self):
      raise IndexError(f"there is no mask {index}: there are {len(self)}.")
    return np.asarray(self.logits[index], np.float32)


class RleMasks:
  """Masks kept as run lengths of whole pixels; to be used as `Masks`.

  Args:
    rles: COCO's compressed run lengths, all of one size.
    size: height and width of the picture; the masks are stretched to it, nearest pixel by nearest.
  """

  def __init__(self, rles: Sequence[dict], size: tuple[int, int]):
    self.rles = list(rles)
    self.size = int(size[0]), int(size[1])

  def __len__(self) -> int:
    return len(self.rles)

  def __repr__(self) -> str:
    return f"RleMasks({len(self)} of {self.size[0]} x {self.size[1]})"

  @overload
  def __getitem__(self, index: int | np.integer) -> Bool[np.ndarray, "h w"]: ...
  @overload
  def __getitem__(self, index: slice | np.ndarray | Sequence[int]) -> "RleMasks": ...
  def __getitem__(self, index):
    if not isinstance(index, int | np.integer):
      rows = np.arange(len(self))[index]
      return RleMasks([self.rles[row] for row in rows], self.size)
    if not -len(self) <= index < len(self):
      raise IndexError(f"there is no mask {index}: there are {len(self)}.")
    mask = decode(self.rles[index]).astype(bool)
    for axis, (source, side) in enumerate(zip(mask.shape, self.size, strict=True)):
      if source != side:
        mask = mask.take(np.arange(side) * source // side, axis=axis)
    return mask

  def __array__(self, dtype=None, copy=None) -> Bool[np.ndarray, "n h w"]:
    if copy is False:
      raise ValueError("masks are made when asked for: np.asarray(masks, copy=False) cannot work.")
    masks = np.zeros((len(self), *self.size), bool)
    for i in range(len(self)):
      masks[i] = self[i]
    return masks if dtype is None else masks.astype(dtype)

  def rle(self, index: int) -> dict:
    """COCO's compressed run lengths: {"size": [h, w], "counts": str}."""
    mask = self[index]
    return self.rles[index] if tuple(self.rles[index]["size"]) == self.size else encode(mask)

  def at(self, size: tuple[int, int]) -> "RleMasks":
    """The same masks over a picture of another size."""
    return RleMasks(self.rles, size)


def interpolate(
  grid: Float[np.ndarray, "Hm Wm"], size: tuple[int, int]
) -> Float[np.ndarray, "h w"]:
  """Bilinear resize in float32 to `size`, height and width, as PyTorch's `F.interpolate` does it.

  That is with `align_corners=False` and without antialias, whatever the scale.
  """
  grid = np.asarray(grid, np.float32)
  strips = [strip for _, strip in _strips(grid, size, slice(0, size[0]), slice(0, size[1]))]
  return np.concatenate(strips)


def _strips(
  grid: Float[np.ndarray, "Hm Wm"], size: tuple[int, int], rows: slice, columns: slice
) -> Iterator[tuple[int, Float[np.ndarray, "n w"]]]:
  """Parts of the resized grid, from the top: (row, its values and those below, in `columns`)."""
  if rows.start == rows.stop or columns.start == columns.stop:
    return
  lower, upper, weight = _taps(grid.shape[1], size[1], columns)
  across = grid[:, lower] * (1 - weight)
  across += grid[:, upper] * weight
  lower, upper, weight = _taps(grid.shape[0], size[0], rows)
  weight = weight[:, None]
  step = max(1, _STRIP // len(across[0]))
  for start in range(0, len(lower), step):
    part = slice(start, start + step)
    strip = across[lower[part]]
    strip *= 1 - weight[part]
    below = across[upper[part]]
    below *= weight[part]
    strip += below
    yield rows.start + start, strip


def _taps(source: int, result: int, part: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """The two cells that each result lies between, and the second's weight; as PyTorch, float32."""
  scale = np.float32(source) / np.float32(result)
  # PyTorch rounds once here, after a fused multiply-add: hence the detour over float64.
  index = np.arange(part.start, part.stop)
  position = (scale.astype(np.float64) * (index + 0.5) - 0.5).astype(np.float32)
  position = np.maximum(position, 0)
  lower = np.minimum(position.astype(np.int64), source - 1)
  weight = np.clip(position - lower.astype(np.float32), 0, 1)
  return lower, np.minimum(lower + 1, source - 1), weight


def _reach(grid: Float[np.ndarray, "Hm Wm"], size: tuple[int, int]) -> tuple[slice, slice]:
  """The rows and columns outside which the mask is False: all cells around are at most 0."""
  inside = grid > 0
  slices = []
  for axis in (0, 1):
    cells = np.flatnonzero(inside.any(axis=1 - axis))
    if not len(cells):
      return slice(0, 0), slice(0, 0)
    lower, upper, _ = _taps(grid.shape[axis], size[axis], slice(0, size[axis]))
    start = np.searchsorted(upper, cells[0], side="left")
    slices.append(slice(int(start), int(np.searchsorted(lower, cells[-1], side="right"))))
  return slices[0], slices[1]


def _thresholds(threshold: float | Sequence[float], prompts: int) -> Float[np.ndarray, " P"]:
  values = np.asarray(threshold, np.float64)
  if values.ndim > 1 or (values.ndim == 1 and len(values) != prompts):
    raise ValueError(
      f"there are {prompts} prompts and thresholds of shape {list(values.shape)}: "
      "give one for all, or one for each."
    )
  for value in values.ravel():
    if not 0 <= value <= 1:
      raise ValueError(f"threshold is {value:g}, but scores are in [0, 1]: give one in that range.")
  # In float32, as the scores are: a score of float32(0.3) is not above 0.3.
  return np.broadcast_to(values.astype(np.float32), (prompts,))


@jax.jit
def _mask(mask_logits, prompt, query):
  return mask_logits[prompt, query]


def kept_masks(mask_logits, kept: list[np.ndarray]) -> list[Float[np.ndarray, "n Hm Wm"]]:
  """Each prompt's masks of the kept queries: one compilation, and only those cross over."""
  if not isinstance(mask_logits, np.ndarray):
    rows = [[_mask(mask_logits, p, q) for q in queries] for p, queries in enumerate(kept)]
    rows = jax.device_get(rows)
  else:
    rows = [[mask_logits[p, q] for q in queries] for p, queries in enumerate(kept)]
  shape = (-1, *mask_logits.shape[2:])
  return [np.asarray(row, mask_logits.dtype).reshape(shape) for row in rows]
