"""Segments large images window by window, for `Sam3.segment_tiled`."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int, UInt8

from sam3_jax.config import Config
from sam3_jax.inference.seams import Part, is_cut, merge
from sam3_jax.inputs.concept import Concept
from sam3_jax.inputs.preprocess import MAX_PIXELS, ImageSource, resize
from sam3_jax.inputs.prompts import (
  ConceptPrompt,
  Prompt,
  as_concept_prompts,
  check_boxes,
)
from sam3_jax.inputs.tiling import OVERLAP, Tiling, Window
from sam3_jax.inputs.window_reader import WindowReader
from sam3_jax.inputs.windows import open_windows
from sam3_jax.outputs.column_runs import ColumnRuns, union
from sam3_jax.outputs.detections import Detections
from sam3_jax.outputs.instances import Instances
from sam3_jax.outputs.masks import Masks, RunMasks
from sam3_jax.types import ImageEmbedding, TextEmbedding
from sam3_jax.utils.validation import check_flag, check_number

WINDOWS = 4  # encoded at a time on each device, as many as `encode` takes in a batch
DECODED = 16  # prompts, of all windows, decoded at a time: 1 GB of masks of the released model
BLOCK = 1024  # pixels: side of the blocks in which masks are compared with the data
EDGE_CELLS = 1.5  # a mask this close to a side of its window, in cells of the mask, is cut


class WindowModel(Protocol):
  """The methods and attributes of `Sam3` that `segment_tiled` uses."""

  config: Config
  mesh: Mesh | None

  def encode_resized(
    self, pixels: UInt8[np.ndarray, "B Hi Wi 3"], sizes: Int[np.ndarray, "B 2"]
  ) -> ImageEmbedding: ...

  def encode_text(self, prompts: Sequence[ConceptPrompt]) -> TextEmbedding: ...

  def concept(
    self,
    embedding: ImageEmbedding,
    prompts: Sequence[Prompt],
    image_index: Sequence[int] | None = None,
  ) -> Concept: ...

  def decode(
    self,
    embedding: ImageEmbedding,
    prompts: Sequence[ConceptPrompt],
    image_index: Sequence[int] | None = None,
    *,
    text: TextEmbedding | None = None,
    max_detections: int | None = None,
    min_score: float = 0.0,
  ) -> Detections: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Request:
  """The arguments of `segment_tiled`; see there."""

  prompts: Sequence[ConceptPrompt]
  tiling: Tiling
  threshold: float
  max_detections: int | None
  whole: bool
  batch: int
  progress: Callable[[float], object]


class TiledModel:
  """The method of `Sam3` for large images."""

  def segment_tiled(
    self: WindowModel,
    source: ImageSource | WindowReader,
    prompts: str | ConceptPrompt | Sequence[str | ConceptPrompt],
    *,
    tile: int,
    overlap: float = OVERLAP,
    threshold: float = 0.5,
    max_detections: int | None = None,
    whole: bool = True,
    max_pixels: int = MAX_PIXELS,
    progress: Callable[[float], object] = lambda fraction: None,
  ) -> list[Instances]:
    """Segments a large image in overlapping windows, each of which is resized to the model's input.

    Masks of the same object in several windows become one instance, as `inference.seams` describes.
    Unlike `decode`, it drops instances that are mostly covered by a better one. Memory grows with
    the windows of a batch and with the outlines of the masks; see `inputs.windows` for the image.

    Args:
      source: path, bytes, PIL image, or an array, which may be on disk (`np.memmap`); see
        `preprocess.read_image`.
      prompts: phrases, `Prompt`s with exemplar boxes in pixels of the image, and `Concept`s. A box
        is encoded in a window around it, and asked of all windows as by `concept`.
      tile: side of a window in pixels, at least 32. The size of the model's input
        (`config.image_size`) shows objects at their own size.
      overlap: the least fraction of `tile` that neighbors share, in [0, 0.75]. Objects of up to
        `overlap * tile` pixels are whole in at least one window.
      threshold: minimum score of an instance, exclusive.
      max_detections: keeps at most N instances of each prompt, the best.
      whole: also decodes the whole image at once, for objects that are larger than a window.
      max_pixels: refuses larger images.
      progress: called with the fraction of the windows that are done.

    Returns:
      The instances of each prompt in pixels of the image, best first. Masks are lazy: `masks[i]` is
      a bitmap of the whole image, `masks.rle(i)` never is. An image of a single window has the
      masks of `decode`.

    Raises:
      FileNotFoundError, ValueError, TypeError: as `preprocess.read_image` and `decode`.
      ValueError: an option out of its range.
    """
    request = _Request(
      prompts=as_concept_prompts(prompts),
      tiling=Tiling(tile, overlap),
      threshold=threshold,
      max_detections=max_detections,
      whole=check_flag("whole", whole),
      batch=WINDOWS * (1 if self.mesh is None else self.mesh.size),
      progress=progress,
    )
    check_number("threshold", threshold, 0, 1, remedy="Leave it out for 0.5.")
    with open_windows(source, max_pixels=max_pixels) as reader:
      return _segment(self, reader, request)


def _segment(model: WindowModel, reader: WindowReader, request: _Request) -> list[Instances]:
  windows = request.tiling.windows(*reader.size)
  used = [i for i, window in enumerate(windows) if _has_data(reader, window)]
  decoder = _Decoder(model, reader, request)
  parts: list[list[Part]] = [[] for _ in request.prompts]
  for first in range(0, len(used), request.batch):
    request.progress(first / len(used))
    chosen = used[first : first + request.batch]
    found = decoder.decode([windows[i] for i in chosen])
    for i, by_prompt in zip(chosen, found, strict=True):
      for own, instances in zip(parts, by_prompt, strict=True):
        own += _parts(instances, windows[i], reader.size, i, EDGE_CELLS * _cell(instances))
  request.progress(1.0)
  coarse: list[list[Part]] = [[] for _ in request.prompts]
  if len(windows) == 1:
    return _as_instances([_cut_to_data(own, reader) for own in parts], reader.size)
  if request.whole and used:
    [found] = decoder.decode([Window(0, 0, *reader.size[::-1])])
    coarse = [_large(instances, request.tiling, reader.size) for instances in found]
  merged = [
    _cut_to_data(merge(own, windows, large), reader)[: request.max_detections]
    for own, large in zip(parts, coarse, strict=True)
  ]
  return _as_instances(merged, reader.size)


class _Decoder:
  """Decodes all prompts of a request in windows."""

  def __init__(self, model: WindowModel, reader: WindowReader, request: _Request):
    self._model, self._reader, self._request = model, reader, request
    self._text = model.encode_text(request.prompts)  # refuses long phrases before any window
    self._prompts = [
      self._concept(prompt) if isinstance(prompt, Prompt) and prompt.boxes else prompt
      for prompt in request.prompts
    ]

  def decode(self, windows: Sequence[Window]) -> list[list[Instances]]:
    """The instances of each window and each prompt, in pixels of the window."""
    request, count = self._request, len(self._prompts)
    embedding, instances = self._encode(windows), []
    pairs = np.indices((len(windows), count)).reshape(2, -1)
    for first in range(0, pairs.shape[1], DECODED):
      rows, prompts = pairs[:, first : first + DECODED]
      found = self._model.decode(
        embedding,
        [self._prompts[i] for i in prompts],
        rows.tolist(),
        text=self._text[prompts],
        max_detections=request.max_detections,
        min_score=request.threshold,
      )
      instances += found.instances(request.threshold)
    return [instances[i : i + count] for i in range(0, len(instances), count)]

  def _concept(self, prompt: Prompt) -> Concept:
    """The exemplars of a prompt, each encoded in a window around it."""
    check_boxes(prompt, *self._reader.size)
    windows = [self._request.tiling.around(box, *self._reader.size) for box in prompt.boxes]
    parts = [
      Prompt(prompt.text, [np.subtract(box, (*window[:2], *window[:2]))], [label])
      for box, label, window in zip(prompt.boxes, prompt.box_labels, windows, strict=True)
    ]
    rows = range(0, len(parts), self._request.batch)
    encoded = [
      self._model.concept(self._encode(windows[i:j]), parts[i:j], list(range(len(parts[i:j]))))
      for i, j in ((i, i + self._request.batch) for i in rows)
    ]
    return Concept.join(encoded)

  def _encode(self, windows: Sequence[Window]) -> ImageEmbedding:
    side = self._model.config.image_size
    pixels = np.stack([self._square(window, side) for window in windows])
    return self._model.encode_resized(
      pixels, np.array([window.size for window in windows], np.int32)
    )

  def _square(self, window: Window, side: int) -> UInt8[np.ndarray, "side side 3"]:
    if window.size == self._reader.size:
      rows: Any = self._reader  # is read in strips
      return resize(rows, side)
    return resize(self._reader.read(window), side)


def _parts(
  instances: Instances, window: Window, size: tuple[int, int], index: int | None, margin: float
) -> list[Part]:
  """The parts of objects that a window of an image of `size` shows."""
  corner, parts = (window.x0, window.y0), []
  masks = instances.masks
  if not isinstance(masks, Masks):
    raise TypeError(f"masks of windows must be Masks; got {type(masks)}.")
  boxes = instances.boxes + np.tile(np.array(corner, np.float32), 2)
  for i, (score, box) in enumerate(zip(instances.scores, boxes.tolist(), strict=True)):
    runs = masks.runs(i, size, corner)
    if runs.area:
      parts.append(Part(runs, float(score), tuple(box), index, is_cut(runs, window, margin)))
  return parts


def _large(instances: Instances, tiling: Tiling, size: tuple[int, int]) -> list[Part]:
  """The objects of the whole image that no window is sure to show whole."""
  whole = Window(0, 0, size[1], size[0])
  parts = _parts(instances, whole, size, None, 0.0)
  least = tiling.tile * tiling.overlap
  return [part for part in parts if max(Window(*part.runs.box).size) > least]


def _cell(instances: Instances) -> float:
  """The longer side of a cell of the masks, in pixels."""
  masks = instances.masks
  grid = masks.logits.shape[1:] if isinstance(masks, Masks) else (1, 1)
  return max(side / cells for side, cells in zip(masks.size, grid, strict=True))


def _has_data(reader: WindowReader, window: Window) -> bool:
  valid = reader.valid(window)
  return valid is None or bool(valid.any())


def _cut_to_data(parts: Sequence[Part], reader: WindowReader) -> list[Part]:
  """The parts without the pixels that have no data; drops those without any other pixel."""
  if reader.complete:
    return list(parts)
  found = []
  for part in parts:
    blocks = [part.runs.crop((0, 0, 0, 0))]
    for block in Tiling(BLOCK, 0).within(part.runs.box):
      valid = reader.valid(block)
      if valid is None:
        blocks.append(part.runs.crop(block))
      else:
        mask = part.runs.to_mask(block) & valid
        blocks.append(ColumnRuns.of_mask(mask, reader.size, block[:2]))
    runs = union(blocks)
    if runs.area:
      found.append(dataclasses.replace(part, runs=runs))
  return found


def _as_instances(merged: Sequence[Sequence[Part]], size: tuple[int, int]) -> list[Instances]:
  """The results of each prompt; ids count from 1 over all prompts."""
  found, first = [], 1
  for parts in merged:
    found.append(
      Instances(
        ids=np.arange(first, first + len(parts)),
        scores=np.array([part.score for part in parts], np.float32),
        boxes=np.array([part.box for part in parts], np.float32).reshape(-1, 4),
        masks=RunMasks([part.runs for part in parts], size),
      )
    )
    first += len(parts)
  return found
