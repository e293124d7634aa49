"""Encoded phrases, each computed once and kept on the host: a data set has few distinct ones."""

from collections.abc import Sequence

import jax
import numpy as np

from sam3_jax.inference.predictor import TEXT_BATCHES, Sam3
from sam3_jax.inputs.prompts import Prompt
from sam3_jax.types import TextEmbedding

REMEMBERED = 4096  # phrases whose encoding is kept: 130 MB for the released model


class Phrases:
  """The encodings of the phrases of prompts that were learned: `phrases[prompts]`, a row each."""

  def __init__(self, model: Sam3):
    self._model = model
    self._known: dict[str, TextEmbedding] = {}

  def learn(self, prompts: Sequence[Prompt]) -> None:
    """Encodes what is new, in full batches; forgets all else when there is too much."""
    wanted, size = dict.fromkeys(prompt.phrase for prompt in prompts), TEXT_BATCHES[0]
    new = [phrase for phrase in wanted if phrase not in self._known]
    if new and len(self._known) + len(new) > REMEMBERED:
      self._known, new = {}, list(wanted)
    for start in range(0, len(new), size):
      phrases = new[start : start + size]
      text = self._model.encode_text(phrases + phrases[-1:] * (size - len(phrases)))
      rows = jax.device_get(text)
      self._known |= {phrase: rows[i : i + 1] for i, phrase in enumerate(phrases)}

  def __getitem__(self, prompts: Sequence[Prompt]) -> TextEmbedding:
    rows = [self._known[prompt.phrase] for prompt in prompts]
    return jax.tree.map(lambda *parts: np.concatenate(parts), *rows)
