"""Pictures and prompts in, instances out: the sharded programs, fed in batches of one shape.

A batch has the same number of slots for pictures on each device. Prompts are decoded in rounds,
each device answering about its own pictures; a slot without a picture, and a place in a round
without a prompt, are computed and thrown away. So three programs are compiled whatever comes in
(a fourth for prompts of more than eight boxes), and a picture's results do not depend on whether
its neighbours could be read.
"""

import functools
import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int, UInt8

from sam3_jax import parallel
from sam3_jax.inference import Sam3, prompts_at_once
from sam3_jax.model.sam3 import Detector
from sam3_jax.phrases import REMEMBERED, Phrases
from sam3_jax.postprocess import Instances, instances
from sam3_jax.prompts import Prompt, pack
from sam3_jax.types import Detections

# Masks that leave the device for each prompt of a round: as many as the one with the most has,
# rounded up to one of these.
FETCHED = (1, 4, 16, 64)


class Slot(NamedTuple):
  """A picture as the model takes it, its source's height and width, and what is asked about it."""

  pixels: UInt8[np.ndarray, "Hi Wi 3"]
  size: tuple[int, int]
  prompts: Sequence[Prompt]


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
    rows: pictures a batch.
  """

  def __init__(
    self,
    model: Sam3,
    *,
    threshold: float,
    images: int = 4,
    prompts: int | None = None,
    most: int = 100,
  ):
    """Compiles nothing yet.

    Args:
      model: on a mesh (`parallel.make_mesh`) with whole parameters.
      threshold: instances score above it.
      images: slots for pictures on each device.
      prompts: of a round, on each device; None for as many as are best there.
      most: instances of a prompt, the best.
    """
    if model.mesh is None:
      raise ValueError("the model needs a mesh: Sam3.from_checkpoint(path, mesh=make_mesh()).")
    self.rows = images * model.mesh.size
    self._model, self._threshold = model, threshold
    self._images, self._prompts = images, prompts or prompts_at_once()[0]
    self._most = min(most, model.config.queries)
    self._cut = parallel.by_rows(model.mesh)
    self._phrases, self._compiling = Phrases(model), True
    detector = Detector(model.config, model.dtype)
    self._encode = parallel.image_encoder(detector, model.mesh)
    self._detect = parallel.prompt_decoder(detector, model.mesh, keep=_wanted)

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
      slots: at most `rows`; None for a picture that is not there.
    """
    side = self._model.config.image_size
    pixels = np.zeros((self.rows, side, side, 3), np.uint8)
    sizes = np.ones((self.rows, 2), np.int32)
    for i, slot in enumerate(slots):
      if slot is not None:
        pixels[i], sizes[i] = slot.pixels, slot.size
    asked = [[] if slot is None else list(slot.prompts) for slot in slots]
    self._phrases.learn([prompt for prompts in asked for prompt in prompts])
    start = time.perf_counter()
    if not any(asked):
      return Work([], [0] * len(slots), sizes, self._threshold, start)
    pixels, placed = jax.device_put((pixels, sizes), self._cut)
    embedding = self._encode(self._model.params, pixels, placed)
    rounds = [
      _Round(self._decode(embedding, places, asked, sizes), places)
      for places in self._places([len(prompts) for prompts in asked])
    ]
    if self._compiling:  # that is no work of the devices
      start, self._compiling = time.perf_counter(), False
    return Work(rounds, [len(prompts) for prompts in asked], sizes, self._threshold, start)

  def _places(self, counts: Sequence[int]) -> list[list[tuple[int, int] | None]]:
    """For each round, each place's slot and number of the prompt: of the pictures of its device."""
    devices = [
      [(slot, number) for slot in range(first, min(first + self._images, len(counts)))
       for number in range(counts[slot])]
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
    places: Sequence[tuple[int, int] | None],
    asked: Sequence[Sequence[Prompt]],
    sizes: np.ndarray,
  ) -> _Found:
    slot, number = next(place for place in places if place is not None)
    filling = Prompt(text=asked[slot][number].phrase)
    prompts = [filling if place is None else asked[place[0]][place[1]] for place in places]
    slots = np.array([0 if place is None else place[0] for place in places])
    numbers = np.array([0 if place is None else place[1] for place in places], np.int32)
    packed = pack(
      prompts,
      sizes[slots],
      image=(slots % self._images).astype(np.int32),
      first_id=1 + self._model.config.queries * numbers,
      text=self._phrases[prompts],
    )
    packed = jax.device_put(packed, self._cut)
    return self._detect(self._model.params, embedding, packed, self._most)


class _Round(NamedTuple):
  found: _Found
  places: list[tuple[int, int] | None]


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
    for found, _ in self._rounds:
      jax.block_until_ready(found)
    self.ready = time.perf_counter()

  def instances(self) -> list[list[Instances]]:
    """What was found for each prompt of each slot; waits for the devices."""
    results: list[list[Any]] = [[None] * count for count in self._counts]
    for found, places in self._rounds:
      jax.block_until_ready(found)
      self.ready = time.perf_counter()
      rows = _fetched(found, self._threshold, [place is not None for place in places])
      sizes = np.array([(1, 1) if place is None else self._sizes[place[0]] for place in places])
      for place, one in zip(places, _instances(rows, sizes, self._threshold), strict=True):
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


def _instances(found: _Found, sizes: np.ndarray, threshold: float) -> list[Instances]:
  rows: dict[str, Any] = {**vars(found), "sizes": sizes}
  others: dict[str, Any] = dict.fromkeys(("presence", "semantic_logits", "image_index"))
  return instances(Detections(**rows, **others), threshold)
