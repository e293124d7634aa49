"""What the engine's thread computes: batches of images, concept prompts and visual prompts, and
steps of videos."""

import collections
import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, UInt8

from sam3_jax.checkpoint.bundle import VISUAL
from sam3_jax.inference.batching import join
from sam3_jax.inference.predictor import IMAGE_BATCHES, Sam3, prompts_at_once
from sam3_jax.inference.visual import VISUAL_BATCHES
from sam3_jax.inputs.prompts import Prompt
from sam3_jax.inputs.visual_prompts import VisualPrompt, padded_slots
from sam3_jax.outputs.instances import Instances
from sam3_jax.types import ImageEmbedding, TextEmbedding

CALL = "call"  # key of steps of videos
_PHRASES = 1024  # encoded phrases that are kept, 32 kB each for the released model


class Image(NamedTuple):
  """An image to encode: pixels of the model's size, and the height and width of its source."""

  pixels: UInt8[np.ndarray, "Hi Wi 3"]
  size: tuple[int, int]


class Concept(NamedTuple):
  """A concept prompt to decode, and the threshold of its instances."""

  embedding: ImageEmbedding
  prompt: Prompt
  threshold: float


class Visual(NamedTuple):
  """A visual prompt to decode."""

  embedding: ImageEmbedding
  prompt: VisualPrompt
  multimask: bool


class Call(NamedTuple):
  """A step of a video, computed alone: its value is what the function returns."""

  function: Callable[[], Any]


class VisualOutput(NamedTuple):
  """The masks of one visual prompt, on the decoder's grid, and their estimated IoU."""

  logits: Float[np.ndarray, "K Hm Wm"]
  iou: Float[np.ndarray, " K"]
  object_logit: Float[np.ndarray, ""]


@dataclasses.dataclass(frozen=True)
class Unit:
  """One image, prompt or step. Units of equal keys may be in the same batch."""

  value: Image | Concept | Visual | Call

  @property
  def key(self) -> Hashable:
    if isinstance(self.value, Visual):
      prompt = self.value.prompt
      return "visual", self.value.multimask, padded_slots(prompt.slots), prompt.mask is not None
    if isinstance(self.value, Call):
      return CALL
    return "image" if isinstance(self.value, Image) else "concept"


class DeviceWork:
  """Computes batches; not for several threads at a time."""

  def __init__(self, model: Sam3, max_batch: int | None = None):
    """
    Args:
      model: used by the engine's thread only, once that is started.
      max_batch: concept prompts of a batch; None for the fastest number on this platform.
    """
    self.model = model
    self._is_cpu = model.platform == "cpu"
    self._sizes = prompts_at_once(model.platform)
    self._max_batch = max_batch or self._sizes[0]
    self._visual = VISUAL in model.params
    self._phrases: collections.OrderedDict[str, TextEmbedding] = collections.OrderedDict()

  def limit(self, key: Hashable) -> int:
    """The largest number of units of a batch."""
    if key == CALL:
      return 1
    if key == "concept":
      return self._max_batch
    if key == "image":
      return 1 if self._is_cpu else IMAGE_BATCHES[0]
    return VISUAL_BATCHES[0]

  def joins_images(self, key: Hashable) -> bool:
    """Whether units of several images are computed in one batch.

    A CPU gains nothing from it.
    """
    return not self._is_cpu or (key == "concept" and self._max_batch > self._sizes[0])

  def compute(self, units: Sequence[Unit]) -> list[Any]:
    """The result of each unit: an `ImageEmbedding`, `Instances`, a `VisualOutput`, or a step's."""
    values: list[Any] = [unit.value for unit in units]
    if isinstance(values[0], Call):
      return [call.function() for call in values]
    if isinstance(values[0], Image):
      return self._encode(values)
    return self._decode(values) if isinstance(values[0], Concept) else self._decode_visual(values)

  def _encode(self, images: Sequence[Image]) -> list[ImageEmbedding]:
    pixels = np.stack([image.pixels for image in images])
    sizes = np.array([image.size for image in images], np.int32)
    embedding = self.model.encode_resized(pixels, sizes, visual=self._visual)
    embedding = jax.block_until_ready(embedding)
    if len(images) == 1:
      return [embedding]
    return [embedding[i : i + 1] for i in range(len(images))]

  def _decode(self, concepts: Sequence[Concept]) -> list[Instances]:
    padded = [*concepts]
    size = next(size for size in reversed(self._sizes) if size >= min(len(padded), self._sizes[0]))
    padded += padded[-1:] * (-len(padded) % size)  # so that few shapes are compiled
    embedding, index = _join_images([one.embedding for one in padded], visual=False)
    text = join([self._text(one.prompt.phrase) for one in padded])
    found = self.model.decode(embedding, [one.prompt for one in padded], index, text=text)
    return found.instances([one.threshold for one in padded])[: len(concepts)]

  def _decode_visual(self, prompts: Sequence[Visual]) -> list[VisualOutput]:
    embedding, index = _join_images([one.embedding for one in prompts])
    found = self.model.decode_visual(
      embedding, [one.prompt for one in prompts], index, multimask=prompts[0].multimask
    )
    logits, iou, object_logit = jax.device_get((found.mask_logits, found.iou, found.object_logit))
    return [VisualOutput(*row) for row in zip(logits, iou, object_logit, strict=True)]

  def _text(self, phrase: str) -> TextEmbedding:
    """An encoded phrase. Each is encoded alone, so that its numbers do not depend on others.

    `TextCache` always encodes 16 phrases, which takes a CPU several times as long.
    """
    if phrase in self._phrases:
      self._phrases.move_to_end(phrase)
    else:
      self._phrases[phrase] = self.model.encode_text([phrase])
      if len(self._phrases) > _PHRASES:
        self._phrases.popitem(last=False)
    return self._phrases[phrase]


def _join_images(
  embeddings: Sequence[ImageEmbedding], visual: bool = True
) -> tuple[ImageEmbedding, list[int]]:
  """The distinct embeddings as one, and the row of each; `visual=False` leaves that part out."""
  rows: dict[int, int] = {}
  index = [rows.setdefault(id(embedding), len(rows)) for embedding in embeddings]
  distinct = list({id(embedding): embedding for embedding in embeddings}.values())
  if not visual:
    distinct = [dataclasses.replace(embedding, visual=None) for embedding in distinct]
  return join(distinct), index
