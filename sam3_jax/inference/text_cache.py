"""Caches encoded phrases on the host: a dataset has few distinct phrases."""

from collections.abc import Sequence

import jax
import numpy as np

from sam3_jax.inference.predictor import TEXT_BATCHES, Sam3
from sam3_jax.inputs.concept import ConceptFile
from sam3_jax.inputs.prompts import Prompt
from sam3_jax.types import TextEmbedding

CAPACITY = 4096  # phrases: 130 MB for the released model


class TextCache:
  """The encoded phrases of prompts; `cache[prompts]` has one row per prompt."""

  def __init__(self, model: Sam3):
    self._model = model
    self._rows: dict[str, TextEmbedding] = {}

  def add(self, prompts: Sequence[Prompt | ConceptFile]) -> None:
    """Encodes new phrases, in full batches. Beyond the capacity, drops all other phrases first."""
    phrases, size = dict.fromkeys(prompt.phrase for prompt in prompts), TEXT_BATCHES[0]
    new = [phrase for phrase in phrases if phrase not in self._rows]
    if new and len(self._rows) + len(new) > CAPACITY:
      self._rows, new = {}, list(phrases)
    for start in range(0, len(new), size):
      batch = new[start : start + size]
      text = self._model.encode_text(batch + batch[-1:] * (size - len(batch)))
      rows = jax.device_get(text)
      self._rows |= {phrase: rows[i : i + 1] for i, phrase in enumerate(batch)}

  def __getitem__(self, prompts: Sequence[Prompt | ConceptFile]) -> TextEmbedding:
    rows = [self._rows[prompt.phrase] for prompt in prompts]
    return jax.tree.map(lambda *parts: np.concatenate(parts), *rows)
