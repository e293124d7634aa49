"""Phrases are encoded once, in full batches, and forgotten when there are too many."""

import numpy as np
import pytest

from sam3_jax import Prompt
from sam3_jax.inference import text_cache
from sam3_jax.inference.predictor import TEXT_BATCHES
from sam3_jax.inference.text_cache import Phrases
from sam3_jax.types import TextEmbedding


class Model:
  """Encodes a phrase as its length, and notes what it was asked."""

  def __init__(self):
    self.asked = []

  def encode_text(self, given):
    assert len(given) == TEXT_BATCHES[0]
    self.asked += list(dict.fromkeys(given))
    lengths = np.array([len(phrase) for phrase in given], np.float32)
    return TextEmbedding(lengths[:, None, None], np.ones((len(given), 1), bool))


def prompts(*given):
  return [Prompt(one) for one in given]


def test_each_once():
  model = Model()
  known = Phrases(model)
  known.learn(prompts("a", "bb", "a"))
  known.learn([*prompts("bb", "ccc"), Prompt(boxes=[[0, 0, 1, 1]])])
  assert model.asked == ["a", "bb", "ccc", "visual"]
  rows = known[[*prompts("ccc", "a", "ccc"), Prompt(boxes=[[0, 0, 2, 2]])]]
  assert rows.features[:, 0, 0].tolist() == [3, 1, 3, 6]
  assert rows.valid.shape == (4, 1)


def test_more_than_a_batch():
  model = Model()
  known, many = Phrases(model), prompts(*("x" * n for n in range(1, 40)))
  known.learn(many)
  assert len(model.asked) == 39
  assert known[many].features[:, 0, 0].tolist() == list(range(1, 40))


def test_forgetting(monkeypatch):
  """Only when something new comes, and never what is needed now."""
  monkeypatch.setattr(text_cache, "REMEMBERED", 3)
  model = Model()
  known = Phrases(model)
  known.learn(prompts("a", "b", "c"))
  known.learn(prompts("a", "b", "c"))
  assert model.asked == ["a", "b", "c"]
  known.learn(prompts("c", "d"))
  assert model.asked == ["a", "b", "c", "c", "d"]
  with pytest.raises(KeyError):
    known[prompts("a")]
  known.learn(prompts("a", "b", "c", "d", "e"))  # more than are remembered: all of them, for now
  assert len(known[prompts("a", "b", "c", "d", "e")]) == 5
