"""Segments images window by window, in the place of `Engine`, for jobs with a tiling."""

import time
from collections.abc import Iterable, Sequence

from sam3_jax.batch.engine import Slot
from sam3_jax.batch.prompt_schema import concept_prompts
from sam3_jax.inference.predictor import Sam3
from sam3_jax.inputs.concept import ConceptFile
from sam3_jax.inputs.prompts import Prompt
from sam3_jax.inputs.tiling import Tiling
from sam3_jax.outputs.instances import Instances


class TiledEngine:
  """A model that segments one image at a time, in windows.

  Attributes:
    batch_size: images per batch: 1.
  """

  batch_size = 1

  def __init__(self, model: Sam3, tiling: Tiling, *, threshold: float, max_detections: int):
    """
    Args:
      model: with or without a mesh, over which the windows are divided.
      tiling: the windows.
      threshold: minimum score of an instance, exclusive.
      max_detections: maximum number of instances for each prompt; the best are kept.
    """
    self._model, self._tiling = model, tiling
    self._threshold, self._max_detections = threshold, max_detections

  def encode_phrases(self, prompts: Iterable[Prompt | ConceptFile]) -> None:
    """Does nothing: phrases are encoded once per image, which has many windows."""

  def start(self, slots: Sequence[Slot | None]) -> "PendingImage":
    """Prepares the work on one image, whose pixels are those of the source.

    Args:
      slots: one; None for a missing image.
    """
    return PendingImage(self, slots)

  def segment(self, slot: Slot) -> list[Instances]:
    """The instances of each prompt of an image."""
    prompts = [
      one.concept if isinstance(one, ConceptFile) else one for one in concept_prompts(slot.prompts)
    ]
    return self._model.segment_tiled(
      slot.pixels, prompts,
      tile=self._tiling.tile, overlap=self._tiling.overlap, threshold=self._threshold,
      max_detections=self._max_detections, max_pixels=slot.pixels.size,
    )  # fmt: skip


class PendingImage:
  """An image that is segmented when its instances are asked for.

  Attributes:
    started, ready: times by `time.perf_counter`; both are set by `instances`.
  """

  def __init__(self, engine: TiledEngine, slots: Sequence[Slot | None]):
    self._engine, self._slots = engine, list(slots)
    self.started = self.ready = time.perf_counter()

  def instances(self) -> list[list[Instances]]:
    """The instances of each prompt of each slot."""
    self.started = time.perf_counter()
    found = [[] if slot is None else self._engine.segment(slot) for slot in self._slots]
    self._slots.clear()  # frees the pixels
    self.ready = time.perf_counter()
    return found
