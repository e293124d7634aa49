"""Images and prompts in, instances out: the sharded programs, fed in batches of one shape.

A batch has the same number of slots for images on each device. Prompts are decoded in rounds,
each device answering about its own images; a slot without an image, and a place in a round
without a prompt, are computed and thrown away. So three programs are compiled whatever comes in
(a fourth for prompts of more than eight boxes), and an image's results do not depend on whether
its neighbours could be read.

No buffer is donated, as none could be used again: XLA lets a result take the place of an argument
of its size, and at the released model's shapes no argument of encoding (pixels, the trunk's map) or
decoding (embedding, packed prompts) has the size of a result, but for 32 bytes of image sizes.

Visual prompts have rounds of their own, those of each of the three `POINT_SIZES` apart: one program
for each that there is, and one for the second neck, which batches without them do not run.
"""

import functools
import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int, UInt8

from sam3_jax.batch.prompt_schema import AnyPrompt, concepts, pointing
from sam3_jax.inference import sharding
from sam3_jax.inference.predictor import Sam3, prompts_at_once
from sam3_jax.inference.text_cache import REMEMBERED, Phrases
from sam3_jax.inputs.prompts import Prompt, pack
from sam3_jax.inputs.visual_prompts import POINT_SIZES, VisualPrompt, pack_visual, padded_slots
from sam3_jax.model.sam3 import Detector
from sam3_jax.model.visual.head import VisualHead
from sam3_jax.outputs.instances import Instances, instances, visual_instances
from sam3_jax.types import Detections, VisualEmbedding, VisualMasks

# Masks that leave the device for each prompt of a round: as many as the one with the most has,
# rounded up to one of these.
FETCHED = (1, 4, 16, 64)
_CONCEPTS = 0  # the kind of prompts that are not visual
_Place = tuple[int, int] | None  # of a round: slot and number of the prompt, if there is one


class Slot(NamedTuple):
  """An image as the model takes it, its source's height and width, and what is asked about it."""

  pixels: UInt8[np.ndarray, "Hi Wi 3"]
  size: tuple[int, int]
  prompts: Sequence[AnyPrompt]


@struct.dataclass
class _Found:
  """What of `Detections` is wanted."""

  scores: Float[Array, "P K"]
  boxes: Float[Array, "P K 4"]
  ids: Int[Array, "P K"]
  mask_logits: Float[Array, "P K Hm Wm"]


def _wanted(found: Detections) -> _Found:
  return _Found(found.scores, found.boxes, found.ids, found.mask_logits)


@functools.partial(jax.jit, static_argnames="count")
def _first(masks: Array, count: int) -> Array:
  return masks[:, :count]


class Engine:
  """A model that works on batches of one shape.

  Attributes:
    rows: images a batch.
  """

  def __init__(
    self,
    model: Sam3,
    *,
    threshold: float,
    images: int = 4,
    prompts: int | None = None,
    most: int = 100,
    visual: bool = False,
  ):
    """Compiles nothing yet.

    Args:
      model: on a mesh (`parallel.make_mesh`) with whole parameters.
      threshold: instances score above it.
      images: slots for images on each device.
      prompts: of a round, on each device; None for as many as are best there.
      most: instances of a prompt, the best.
      visual: whether there are visual prompts, too. The numbers of all others stay as they are;
        the trunk's map (21 MB an image at the released size) outlives its program.
    """
    if model.mesh is None:
      raise ValueError("the model needs a mesh: Sam3.from_checkpoint(path, mesh=make_mesh()).")
    self.rows = images * model.mesh.size
    self._model, self._threshold = model, threshold
    self._images, self._prompts = images, prompts or prompts_at_once()[0]
    self._most = min(most, model.config.queries)
    self._cut = sharding.by_rows(model.mesh)
    self._phrases, self._compiling = Phrases(model), True
    detector = Detector(model.config, model.dtype)
    self._encode = sharding.image_encoder(
      detector,
      model.mesh,
      keep=lambda embedding, features: (embedding, features if visual else None),
    )
    self._detect = sharding.prompt_decoder(detector, model.mesh, keep=_wanted)
    head = VisualHead(model.config, model.dtype)
    self._head = model.visual_params() if visual else None
    self._encode_visual = sharding.visual_encoder(head, model.mesh)
    self._answer = sharding.visual_answerer(head, model.mesh)

  def learn(self, prompts: Iterable[Prompt]) -> None:
    """Encodes phrases before they are asked for, as many as are remembered: while batches are in
    work, a phrase that is new has to wait for them."""
    first: dict[str, Prompt] = {}
    for prompt in prompts:
      first.setdefault(prompt.phrase, prompt)
      if len(first) == REMEMBERED:
        break
    self._phrases.learn(list(first.values()))

  def start(self, slots: Sequence[Slot | None]) -> "Work":
    """Sets the devices to work on a batch and returns at once.

    Args:
      slots: at most `rows`; None for an image that is not there.
    """
    side = self._model.config.image_size
    pixels = np.zeros((self.rows, side, side, 3), np.uint8)
    sizes = np.ones((self.rows, 2), np.int32)
    for i, slot in enumerate(slots):
      if slot is not None:
        pixels[i], sizes[i] = slot.pixels, slot.size
    asked = [[] if slot is None else list(slot.prompts) for slot in slots]
    self._phrases.learn([prompt for prompts in asked for prompt in concepts(prompts)])
    start = time.perf_counter()
    if not any(asked):
      return Work([], [0] * len(slots), sizes, self._threshold, start)
    pixels, placed = jax.device_put((pixels, sizes), self._cut)
    embedding, features = self._encode(self._model.params, pixels, placed)
    rounds = [
      self._decode(embedding, places, asked, sizes) for places in self._places(asked, _CONCEPTS)
    ]
    if any(map(pointing, asked)):
      seen = self._encode_visual(self._head, features)
      rounds += [
        self._point(seen, places, asked, sizes)
        for points in POINT_SIZES
        for places in self._places(asked, points)
      ]
    if self._compiling:  # that is no work of the devices
      start, self._compiling = time.perf_counter(), False
    return Work(rounds, [len(prompts) for prompts in asked], sizes, self._threshold, start)

  def _places(self, asked: Sequence[Sequence[AnyPrompt]], kind: int) -> list[list[_Place]]:
    """For each round of prompts of a kind, each place's slot and number of the prompt: of the
    images of its device."""
    devices = [
      [(slot, number) for slot in range(first, min(first + self._images, len(asked)))
       for number, prompt in enumerate(asked[slot]) if _kind(prompt) == kind]
      for first in range(0, self.rows, self._images)
    ]  # fmt: skip
    rounds = range(0, max(map(len, devices)), self._prompts)
    return [
      [
        queue[place] if place < len(queue) else None
        for queue in devices
        for place in range(first, first + self._prompts)
      ]
      for first in rounds
    ]

  def _decode(
    self,
    embedding: Any,
    places: Sequence[_Place],
    asked: Sequence[Sequence[Any]],
    sizes: np.ndarray,
  ) -> "_Round":
    slot, number = next(place for place in places if place is not None)
    filling = Prompt(text=asked[slot][number].phrase)
    prompts = [filling if place is None else asked[place[0]][place[1]] for place in places]
    slots = np.array([0 if place is None else place[0] for place in places])
    numbers = np.array([0 if place is None else place[1] for place in places], np.int32)
    first_ids = 1 + self._model.config.queries * numbers
    packed = pack(
      prompts,
      sizes[slots],
      image=(slots % self._images).astype(np.int32),
      first_id=first_ids,
      text=self._phrases[prompts],
    )
    packed = jax.device_put(packed, self._cut)
    found = self._detect(self._model.params, embedding, packed, self._most)
    return _Round(found, places, first_ids)

  def _point(
    self,
    seen: VisualEmbedding,
    places: Sequence[_Place],
    asked: Sequence[Sequence[Any]],
    sizes: np.ndarray,
  ) -> "_Round":
    filling = next(place for place in places if place is not None)
    rows = [place or filling for place in places]
    prompts: list[VisualPrompt] = [asked[slot][number] for slot, number in rows]
    slots, numbers = np.array(rows, np.int32).T
    packed = pack_visual(prompts, sizes[slots], slots % self._images)
    doubt = np.array([prompt.is_ambiguous for prompt in prompts])
    packed, doubt = jax.device_put((packed, doubt), self._cut)
    found = self._answer(self._head, seen, packed, doubt)
    about: dict[str, Any] = {"image_index": slots, "sizes": sizes[slots]}
    return _Round(VisualMasks(*found, **about), places, 1 + self._model.config.queries * numbers)


def _kind(prompt: AnyPrompt) -> int:
  """Prompts of a kind share rounds; visual ones by the points that they are padded to, which then
  no neighbour changes."""
  return padded_slots(prompt.slots) if isinstance(prompt, VisualPrompt) else _CONCEPTS


class _Round(NamedTuple):
  """What was found, a row a place, and the identity of the first that each prompt may find."""

  found: _Found | VisualMasks
  places: Sequence[_Place]
  first_ids: np.ndarray


class Work:
  """A batch that the devices are working on.

  Attributes:
    started, ready: when, by `time.perf_counter`; `ready` is set by `instances`.
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
    """Until the devices are done."""
    for one in self._rounds:
      jax.block_until_ready(one.found)
    self.ready = time.perf_counter()

  def instances(self) -> list[list[Instances]]:
    """What was found for each prompt of each slot; waits for the devices."""
    results: list[list[Any]] = [[None] * count for count in self._counts]
    for found, places, first_ids in self._rounds:
      jax.block_until_ready(found)
      self.ready = time.perf_counter()
      if isinstance(found, VisualMasks):
        rows = _pointed(found, places, first_ids)
      else:
        fetched = _fetched(found, self._threshold, [place is not None for place in places])
        sizes = np.array([(1, 1) if place is None else self._sizes[place[0]] for place in places])
        rows = _instances(fetched, sizes, self._threshold)
      for place, one in zip(places, rows, strict=True):
        if place is not None:
          results[place[0]][place[1]] = one
    self._rounds.clear()  # so that the devices have their memory back
    return results


def _fetched(found: _Found, threshold: float, used: Sequence[bool]) -> _Found:
  """The part of a round that scores above the threshold, and a little more, as NumPy arrays."""
  scores, boxes, ids = jax.device_get((found.scores, found.boxes, found.ids))
  above = (scores > np.float32(threshold)) & np.asarray(used)[:, None]
  most = int(above.sum(axis=1).max())
  cut = min(next((n for n in FETCHED if n >= most), scores.shape[1]), scores.shape[1])
  masks: Any = np.asarray(_first(found.mask_logits, cut))
  return _Found(scores[:, :cut], boxes[:, :cut], ids[:, :cut], masks)


def _pointed(
  found: VisualMasks, places: Sequence[_Place], ids: np.ndarray
) -> list[Instances | None]:
  found = jax.device_get(found)
  return [
    place and visual_instances(found[row : row + 1], first_id=int(ids[row]))[0]
    for row, place in enumerate(places)
  ]


def _instances(found: _Found, sizes: np.ndarray, threshold: float) -> list[Instances]:
  rows: dict[str, Any] = {**vars(found), "sizes": sizes}
  others: dict[str, Any] = dict.fromkeys(("presence", "semantic_logits", "image_index"))
  return instances(Detections(**rows, **others), threshold)
