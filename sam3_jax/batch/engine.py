"""Sharded inference on batches of one shape: images and prompts in, instances out.

A batch has the same number of image slots on each device. Prompts are decoded in rounds, in which
each device decodes prompts of its own images. Empty slots, and positions of a round without a
prompt, are padding: they are computed and discarded. So three programs are compiled whatever the
inputs (a fourth for prompts with more than eight boxes), and the results of an image do not depend
on whether its neighbors could be read.

No buffer is donated, because XLA could not reuse any: a result can take the place of an argument of
the same size only, and at the shapes of the released model no argument of encoding (pixels, the
trunk's features) or decoding (embedding, packed prompts) has the size of a result, except 32 bytes
of image sizes.

Concepts and visual prompts are decoded in rounds of their own, one kind for each of the two
`BOX_SIZES` and the three `POINT_SIZES`. This needs one program for each size that occurs, and for
visual prompts one for the second neck. Batches without visual prompts do not run them.
"""

import dataclasses
import functools
import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, UInt8

from sam3_jax.batch.prompt_schema import AnyPrompt, concept_prompts, visual_prompts
from sam3_jax.inference import sharding
from sam3_jax.inference.predictor import Sam3, prompts_at_once
from sam3_jax.inference.provenance import own_concept
from sam3_jax.inference.text_cache import CAPACITY, TextCache
from sam3_jax.inputs.concept import BOX_SIZES, Concept, ConceptFile
from sam3_jax.inputs.prompts import Prompt, exemplar_slots, pack
from sam3_jax.inputs.visual_prompts import POINT_SIZES, VisualPrompt, pack_visual, padded_slots
from sam3_jax.outputs.instances import Instances, instances, visual_instances
from sam3_jax.types import Detections, VisualEmbedding, VisualMasks

# Masks copied to the host for each prompt of a round: the largest number of instances of a prompt,
# rounded up to one of these.
MASK_COUNTS = (1, 4, 16, 64)
_Kind = tuple[type, int]  # of prompts that a round can hold, and their padded size
_CONCEPT_KINDS: tuple[_Kind, ...] = ((Prompt, 0), *((Concept, size) for size in BOX_SIZES))
_Position = tuple[int, int] | None  # of a round: slot and index of the prompt; None for padding


class Slot(NamedTuple):
  """An image as the model takes it, the height and width of its source, and its prompts."""

  pixels: UInt8[np.ndarray, "Hi Wi 3"]
  size: tuple[int, int]
  prompts: Sequence[AnyPrompt]


def _wanted(found: Detections) -> Detections:
  """Drops the fields that batch inference does not use."""
  unused = ("presence_logit", "semantic_logits", "image_index", "sizes")
  nothing: dict[str, Any] = dict.fromkeys(unused)
  return dataclasses.replace(found, **nothing)


@functools.partial(jax.jit, static_argnames="count")
def _first(masks: Array, count: int) -> Array:
  return masks[:, :count]


class Engine:
  """A model that works on batches of one shape.

  Attributes:
    batch_size: images per batch, on all devices together.
  """

  def __init__(
    self,
    model: Sam3,
    *,
    threshold: float,
    images: int = 4,
    prompts: int | None = None,
    max_detections: int = 100,
    visual: bool = False,
  ):
    """Compiles nothing yet.

    Args:
      model: on a mesh (`sharding.make_mesh`), with parameters that are not sharded.
      threshold: minimum score of an instance, exclusive.
      images: image slots per device.
      prompts: prompts per round and device; None for the fastest number on this platform.
      max_detections: maximum number of instances for each prompt; the best are kept.
      visual: whether to prepare for visual prompts. The numbers of other prompts do not change;
        the trunk's features (21 MB per image for the released model) stay in memory longer.
    """
    if model.mesh is None:
      raise ValueError("the model needs a mesh: Sam3.from_checkpoint(path, mesh=make_mesh()).")
    self.batch_size = images * model.mesh.size
    self._model, self._threshold = model, threshold
    self._images, self._prompts = images, prompts or prompts_at_once(model.platform)[0]
    self._max_detections = min(max_detections, model.config.queries)
    self._cut = sharding.by_rows(model.mesh)
    self._concepts: dict[ConceptFile, Concept] = {}
    self._phrases, self._compiling = TextCache(model), True  # the first batch compiles
    programs = model.programs.selecting(
      image=lambda embedding, features: (embedding, features if visual else None),
      detections=_wanted,
    )
    self._encode, self._detect = programs.encode, programs.prompts.detect
    self._head = model.visual_params() if visual else None
    self._encode_visual, self._answer = programs.encode_visual, programs.decode_best

  def encode_phrases(self, prompts: Iterable[Prompt | ConceptFile]) -> None:
    """Encodes phrases in advance, as many as the cache holds: a new phrase would have to wait for
    the batches that the devices are working on."""
    first: dict[str, Prompt | ConceptFile] = {}
    for prompt in prompts:
      first.setdefault(prompt.phrase, prompt)
      if len(first) == CAPACITY:
        break
    self._phrases.add(list(first.values()))

  def start(self, slots: Sequence[Slot | None]) -> "PendingBatch":
    """Dispatches a batch to the devices and returns at once.

    Args:
      slots: at most `batch_size`; None for a missing image.
    """
    side = self._model.config.image_size
    pixels = np.zeros((self.batch_size, side, side, 3), np.uint8)
    sizes = np.ones((self.batch_size, 2), np.int32)
    for i, slot in enumerate(slots):
      if slot is not None:
        pixels[i], sizes[i] = slot.pixels, slot.size
    prompts = [[] if slot is None else list(slot.prompts) for slot in slots]
    self._phrases.add([prompt for group in prompts for prompt in concept_prompts(group)])
    start = time.perf_counter()
    if not any(prompts):
      return PendingBatch([], [0] * len(slots), sizes, self._threshold, start)
    pixels, device_sizes = jax.device_put((pixels, sizes), self._cut)
    embedding, features = self._encode(self._model.params, pixels, device_sizes)
    rounds = [
      self._decode(embedding, positions, prompts, sizes)
      for kind in _CONCEPT_KINDS
      for positions in self._rounds(prompts, kind)
    ]
    if any(map(visual_prompts, prompts)):
      visual_embedding = self._encode_visual(self._head, features)
      rounds += [
        self._decode_visual(visual_embedding, positions, prompts, sizes)
        for points in POINT_SIZES
        for positions in self._rounds(prompts, (VisualPrompt, points))
      ]
    if self._compiling:  # compilation does not count as work of the devices
      start, self._compiling = time.perf_counter(), False
    return PendingBatch(rounds, [len(group) for group in prompts], sizes, self._threshold, start)

  def _rounds(self, prompts: Sequence[Sequence[AnyPrompt]], kind: _Kind) -> list[list[_Position]]:
    """The rounds for prompts of a kind: for each position, a prompt of an image on its device."""
    queues = [
      [(slot, index) for slot in range(first, min(first + self._images, len(prompts)))
       for index, prompt in enumerate(prompts[slot]) if _kind(prompt) == kind]
      for first in range(0, self.batch_size, self._images)
    ]  # fmt: skip
    starts = range(0, max(map(len, queues)), self._prompts)
    return [
      [
        queue[i] if i < len(queue) else None
        for queue in queues
        for i in range(first, first + self._prompts)
      ]
      for first in starts
    ]

  def _decode(
    self,
    embedding: Any,
    positions: Sequence[_Position],
    prompts: Sequence[Sequence[Any]],
    sizes: np.ndarray,
  ) -> "_Round":
    slot, index = next(position for position in positions if position is not None)
    padding = prompts[slot][index]
    if isinstance(padding, Prompt):
      padding = Prompt(text=padding.phrase)
    chosen = [padding if p is None else prompts[p[0]][p[1]] for p in positions]
    slots = np.array([0 if p is None else p[0] for p in positions])
    indices = np.array([0 if p is None else p[1] for p in positions], np.int32)
    first_ids = 1 + self._model.config.queries * indices
    packed = pack(
      [self._concept(one) if isinstance(one, ConceptFile) else one for one in chosen],
      sizes[slots],
      image=(slots % self._images).astype(np.int32),
      first_id=first_ids,
      text=self._phrases[chosen],
    )
    packed = jax.device_put(packed, self._cut)
    found = self._detect(self._model.params, embedding, packed, self._max_detections)
    return _Round(found, positions, first_ids)

  def _concept(self, file: ConceptFile) -> Concept:
    """A concept as the programs take it."""
    if file not in self._concepts:
      model = self._model
      self._concepts[file] = own_concept(file.concept, model.origin, model.config, model.dtype)
    return self._concepts[file]

  def _decode_visual(
    self,
    embedding: VisualEmbedding,
    positions: Sequence[_Position],
    prompts: Sequence[Sequence[Any]],
    sizes: np.ndarray,
  ) -> "_Round":
    padding = next(position for position in positions if position is not None)
    filled = [position or padding for position in positions]
    chosen: list[VisualPrompt] = [prompts[slot][index] for slot, index in filled]
    slots, indices = np.array(filled, np.int32).T
    packed = pack_visual(chosen, sizes[slots], slots % self._images)
    doubt = np.array([prompt.is_ambiguous for prompt in chosen])
    packed, doubt = jax.device_put((packed, doubt), self._cut)
    found = self._answer(self._head, embedding, packed, doubt)
    about: dict[str, Any] = {"image_index": slots, "sizes": sizes[slots]}
    first_ids = 1 + self._model.config.queries * indices
    return _Round(VisualMasks(*found, **about), positions, first_ids)


def _kind(prompt: AnyPrompt) -> _Kind:
  """The kind of rounds in which a prompt is decoded. It includes the padded number of the points of
  a visual prompt and of the exemplars of a concept, so that results do not depend on the other
  prompts."""
  match prompt:
    case VisualPrompt():
      return VisualPrompt, padded_slots(prompt.slots)
    case ConceptFile():
      return Concept, exemplar_slots(prompt.concept)
    case _:
      return Prompt, 0


class _Round(NamedTuple):
  """The output of a round, and for each position the first instance id."""

  found: Detections | VisualMasks
  positions: Sequence[_Position]
  first_ids: np.ndarray


class PendingBatch:
  """A batch that the devices are working on.

  Attributes:
    started, ready: times by `time.perf_counter`; `ready` is set by `instances` and `wait`.
  """

  def __init__(
    self,
    rounds: Sequence[_Round],
    counts: Sequence[int],
    sizes: np.ndarray,
    threshold: float,
    started: float,
  ):
    self._rounds, self._counts, self._sizes = list(rounds), counts, sizes
    self._threshold = threshold
    self.started = self.ready = started

  def wait(self) -> None:
    """Waits for the devices."""
    for item in self._rounds:
      jax.block_until_ready(item.found)
    self.ready = time.perf_counter()

  def instances(self) -> list[list[Instances]]:
    """Waits for the devices; returns the instances of each prompt of each slot."""
    results: list[list[Any]] = [[None] * count for count in self._counts]
    for found, positions, first_ids in self._rounds:
      jax.block_until_ready(found)
      self.ready = time.perf_counter()
      if isinstance(found, VisualMasks):
        decoded = _visual_instances(found, positions, first_ids)
      else:
        fetched = _fetch(found, self._threshold, [position is not None for position in positions])
        sizes = [(1, 1) if position is None else self._sizes[position[0]] for position in positions]
        decoded = _instances(fetched, np.array(sizes), self._threshold)
      for position, result in zip(positions, decoded, strict=True):
        if position is not None:
          results[position[0]][position[1]] = result
    self._rounds.clear()  # frees the memory of the devices
    return results


def _fetch(found: Detections, threshold: float, used: Sequence[bool]) -> Detections:
  """The detections of a round that score above the threshold, and a few more, as NumPy arrays."""
  scores, boxes, ids = jax.device_get((found.scores, found.boxes, found.ids))
  above = (scores > np.float32(threshold)) & np.asarray(used)[:, None]
  most = int(above.sum(axis=1).max())
  count = min(next((n for n in MASK_COUNTS if n >= most), scores.shape[1]), scores.shape[1])
  masks: Any = np.asarray(_first(found.mask_logits, count))
  fields: dict[str, Any] = {"scores": scores, "boxes": boxes, "ids": ids}
  fields = {name: values[:, :count] for name, values in fields.items()}
  return dataclasses.replace(found, mask_logits=masks, **fields)


def _visual_instances(
  found: VisualMasks, positions: Sequence[_Position], first_ids: np.ndarray
) -> list[Instances | None]:
  found = jax.device_get(found)
  return [
    position and visual_instances(found[row : row + 1], first_id=int(first_ids[row]))[0]
    for row, position in enumerate(positions)
  ]


def _instances(found: Detections, sizes: np.ndarray, threshold: float) -> list[Instances]:
  batch_sizes: Any = sizes
  return instances(dataclasses.replace(found, sizes=batch_sizes), threshold)
