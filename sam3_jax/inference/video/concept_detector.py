"""Detections of concepts on a frame, in two parts: the second waits for the device."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from sam3_jax.inference.video.concept_objects import FrameDetections
from sam3_jax.inference.video.tracker import Tracker
from sam3_jax.inputs.prompts import ConceptPrompt
from sam3_jax.outputs.instances import kept_masks
from sam3_jax.types import ImageEmbedding, TextEmbedding, VisualEmbedding

TOGETHER = 8  # phrases that are detected at a time, as masks take 66 MB each at the released size


class FrameEmbedding(NamedTuple):
  """A frame as the detector and the tracker read it."""

  concepts: ImageEmbedding
  visual: VisualEmbedding


class ConceptDetector:
  """Detects concept prompts on the frames of a session.

  Attributes:
    model: a `Sam3`.
    tracker: of the session.
    size: height and width of the frames.
  """

  def __init__(self, model: Any, tracker: Tracker, size: tuple[int, int]):
    self.model, self.tracker, self.size = model, tracker, size
    self._texts: dict[tuple[str, ...], TextEmbedding] = {}

  def encode(self, pixels: Any) -> FrameEmbedding:
    """Encodes a frame of the model's input size: uint8, or normalized float32."""
    model = self.model
    pixels = jax.device_put(np.asarray(pixels)[None], model.device)
    sizes = jax.device_put(np.array([self.size], np.int32), model.device)
    concepts, visual = self.tracker.programs.encode_both(model.params, pixels, sizes)
    return FrameEmbedding(dataclasses.replace(concepts, origin=model.origin), visual)

  def detect(self, embedding: ImageEmbedding, prompts: Sequence[ConceptPrompt | None]) -> Any:
    """Starts to detect; returns detections of the prompts that are not None."""
    given = [prompt for prompt in prompts if prompt is not None]
    if not given:
      return None
    phrases = tuple(prompt.phrase for prompt in given)
    if phrases not in self._texts:  # once in a session
      self._texts[phrases] = self.model.encode_text(given)
    return self.model.decode(embedding, given, text=self._texts[phrases])

  def kept(self, prompts: Sequence[ConceptPrompt | None], detected: Any) -> list[FrameDetections]:
    """The detections of each prompt with high scores, after non-maximum suppression."""
    side, rules = self.tracker.state.config.mask_size, self.tracker.state.rules
    none = FrameDetections(
      np.zeros(0, np.float32), np.zeros((0, 4), np.float32), np.zeros((0, side, side), np.float32)
    )
    if detected is None:
      return [none for _ in prompts]
    scores, boxes = jax.device_get((detected.scores, detected.boxes))
    # The range that Meta's code leaves after it took the logit of the score.
    scores = np.clip(scores.astype(np.float32), 0.001, 0.999)
    rows = [np.flatnonzero(row > rules.score_threshold_detection) for row in scores]
    masks = iter(kept_masks(detected.mask_logits, rows))
    found = iter(zip(scores, boxes.astype(np.float32), rows, strict=True))
    kept = []
    for prompt in prompts:
      if prompt is None:
        kept.append(none)
        continue
      score, box, row = next(found)
      logits = next(masks).astype(np.float32)
      kept.append(FrameDetections(score[row], box[row], logits).kept(rules))
    return kept
