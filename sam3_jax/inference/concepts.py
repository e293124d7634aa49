"""Decodes concept prompts (phrases and exemplars) in batches, for `Sam3.decode`; encodes exemplars
for use with other images, for `Sam3.concept`."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from sam3_jax.inference.batch_sharding import BatchSharding
from sam3_jax.inference.batching import batches, drop_repeats, ordinals, take
from sam3_jax.inference.output_buffer import OutputBuffer
from sam3_jax.inference.programs import Programs
from sam3_jax.inputs.concept import Concept, check_exemplars, single_phrase
from sam3_jax.inputs.prompts import (
  ConceptPrompt,
  Prompt,
  check_boxes,
  exemplar_slots,
  pack,
  pack_boxes,
)
from sam3_jax.outputs.detections import Detections
from sam3_jax.types import ImageEmbedding, Prompts, TextEmbedding
from sam3_jax.utils.validation import is_number, is_whole


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConceptRequest:
  """Prompts of one call of `Sam3.decode`, checked.

  Attributes:
    embedding: the images.
    prompts: the prompts; concepts as `own_concept` returns them.
    images: the image of each prompt.
    sizes: height and width of the source image of each prompt.
    max_detections, min_score: as in `Sam3.decode`.
  """

  embedding: ImageEmbedding
  prompts: Sequence[ConceptPrompt]
  images: Int[np.ndarray, " P"]
  sizes: Int[np.ndarray, "P 2"]
  max_detections: int | None
  min_score: float

  def __post_init__(self):
    for prompt, size in zip(self.prompts, self.sizes, strict=True):
      if isinstance(prompt, Prompt):
        check_boxes(prompt, *size.tolist())
    most, least = self.max_detections, self.min_score
    if most is not None and not (is_whole(most) and most > 0):
      raise ValueError(f"max_detections must be 1, 2, .. or None for all; got {most!r}.")
    if not (is_number(least) and 0 <= least <= 1):
      raise ValueError(f"min_score must be in [0, 1]; got {least!r}. Use 0 for all masks.")

  def buffer(self, programs: Programs, memory_budget: float, device: Any) -> OutputBuffer:
    """A buffer for the detections of all prompts.

    Raises:
      ValueError: the host has too little memory for all masks.
    """
    queries, count = programs.config.queries, len(self.prompts)
    kept, grid = min(self.max_detections or queries, queries), self.embedding.fine.shape[1:3]
    names = [field.name for field in dataclasses.fields(Detections)]
    names.remove("mask_min_score")
    dtype: Any = programs.dtype
    masks = {
      "mask_logits": jax.ShapeDtypeStruct((count, kept, *grid), dtype),
      "semantic_logits": jax.ShapeDtypeStruct((count, *grid), dtype),
    }
    buffer = OutputBuffer(names, masks, memory_budget, device)
    if not self.min_score:
      buffer.reserve(count)
    return buffer


@dataclasses.dataclass(frozen=True)
class ConceptDecoder:
  """Runs the programs for concept prompts.

  Attributes:
    programs: of the model.
    params: of the model.
    sharding: of the batches.
    batch_sizes: prompts of one image in a batch on each device, in descending order.
  """

  programs: Programs
  params: Any
  sharding: BatchSharding
  batch_sizes: tuple[int, ...]

  def decode(
    self,
    request: ConceptRequest,
    text: TextEmbedding,
    text_rows: Int[np.ndarray, " P"],
    buffer: OutputBuffer,
  ) -> Detections:
    """The detections of a request, one row per prompt.

    Args:
      request: the prompts.
      text: encoded phrases.
      text_rows: the row of `text` of each prompt.
      buffer: from `request.buffer`.

    Raises:
      ValueError: the host has too little memory for the masks.
    """
    images, min_score = request.images, request.min_score
    first_ids = 1 + self.programs.config.queries * ordinals(images)
    image_index = self.sharding.replicate(images.astype(np.int32))
    mask_min_score = np.full(len(images), min_score, np.float32)
    whole = None
    for batch in self._batches(request):
      inputs = self._inputs(request, text, text_rows, first_ids, batch)
      for part, rows in self._run(*inputs, request.max_detections, min_score):
        part, rows = drop_repeats(part, batch[rows])
        if isinstance(part, Detections):
          mask_min_score[rows] = 0  # these have masks
          whole = part if buffer.is_whole(rows) else None
        if whole is None:
          buffer.put(part, rows)
    arrays = buffer.arrays | {"image_index": image_index}
    detections = Detections(**arrays) if whole is None else whole
    limits = self.sharding.replicate(mask_min_score) if min_score else None
    return dataclasses.replace(detections, image_index=image_index, mask_min_score=limits)

  def _batches(self, request: ConceptRequest) -> Iterator[np.ndarray]:
    """Batches of prompts that share a program: prompts, then concepts by their exemplars."""
    slots = np.array([exemplar_slots(prompt) for prompt in request.prompts])
    for size in np.unique(slots):
      rows = np.flatnonzero(slots == size)
      for batch in self.sharding.prompt_batches(request.images[rows], self.batch_sizes):
        yield rows[batch]

  def _inputs(
    self,
    request: ConceptRequest,
    text: TextEmbedding,
    text_rows: Int[np.ndarray, " P"],
    first_ids: Int[np.ndarray, " P"],
    batch: np.ndarray,
  ) -> tuple[ImageEmbedding, Prompts]:
    """The images and the packed prompts of a batch, on their devices."""
    images, image = np.unique(request.images[batch], return_inverse=True)
    if len(images) > 1 or self.sharding.mesh:  # a row per prompt: the size of the batch, no new one
      images, image = request.images[batch], self.sharding.local_rows(len(batch))
    packed = pack(
      [request.prompts[i] for i in batch],
      request.sizes[batch],
      image=image.astype(np.int32),
      first_id=first_ids[batch],
      text=take(text, text_rows[batch]),
    )
    embedding, prompts = self.sharding.put((take(request.embedding, images), packed))
    return embedding, prompts

  def _run(
    self,
    embedding: ImageEmbedding,
    prompts: Prompts,
    max_detections: int | None,
    min_score: float,
  ) -> Iterator[tuple[Any, np.ndarray]]:
    """Yields results of a batch, and their rows: the detections, or first the scores of all rows,
    then the detections of those with a score above `min_score`."""
    count = len(prompts)
    split = self.sharding.is_split(count)
    programs = self.programs.split_prompts if split else self.programs.prompts
    if not min_score:
      yield programs.detect(self.params, embedding, prompts, max_detections), np.arange(count)
      return
    scored = programs.score(self.params, embedding, prompts, max_detections)
    yield scored, np.arange(count)
    above = np.flatnonzero(_best(scored.scores) > min_score)
    for rows in batches(above, self.batch_sizes, self.sharding.shards(count)):
      part, images = take(scored, rows), embedding
      if len(embedding) > 1:
        images = take(embedding, rows)
        part = dataclasses.replace(part, image_index=self.sharding.local_rows(len(rows)))
      yield programs.mask(self.params, *self.sharding.put((images, part))), rows


def _best(scores: Any) -> Float[np.ndarray, " P"]:
  return np.asarray(scores).max(axis=1)


def encode_concept(
  programs: Programs,
  params: Any,
  sharding: BatchSharding,
  embedding: ImageEmbedding,
  prompts: Sequence[Prompt],
  images: Int[np.ndarray, " P"],
) -> Concept:
  """The exemplars of all prompts as one concept.

  Args:
    programs, params, sharding: of the model.
    embedding: the images.
    prompts: the prompts.
    images: the image of each prompt.

  Raises:
    ValueError: as in `Sam3.concept`.
  """
  sizes = np.asarray(embedding.sizes)[images]
  for prompt, size in zip(prompts, sizes, strict=True):
    if not prompt.boxes:
      raise ValueError(
        f"a concept needs exemplar boxes, and the prompt {prompt.phrase!r:.60} has none; add "
        "boxes=[...], or pass the phrase to decode."
      )
    check_boxes(prompt, *size.tolist())
  check_exemplars(sum(len(prompt.boxes) for prompt in prompts))
  text = single_phrase(prompts)
  boxes, positive, valid = pack_boxes(prompts, sizes)
  coarse = sharding.commit(embedding.coarse)
  tokens: Any = np.zeros((*valid.shape, coarse.shape[-1]), coarse.dtype)
  for batch in batches(np.arange(len(prompts)), (1,), sharding.devices):
    inputs = sharding.put((coarse[images[batch]], boxes[batch], positive[batch]))
    tokens[batch] = jax.device_get(programs.encode_exemplars(params, *inputs))
  labels: Any = positive
  return Concept(tokens[valid], labels[valid], text)
