"""Phrases are encoded once, in full batches, and dropped when there are too many."""

import numpy as np
import pytest

from sam3_jax import Prompt
from sam3_jax.inference import text_cache
from sam3_jax.inference.predictor import TEXT_BATCHES
from sam3_jax.inference.text_cache import TextCache
from sam3_jax.types import TextEmbedding


class Model:
  """Encodes a phrase as its length, and records the phrases."""

  def __init__(self):
    self.encoded = []

  def encode_text(self, phrases):
    assert len(phrases) == TEXT_BATCHES[0]
    self.encoded += list(dict.fromkeys(phrases))
    lengths = np.array([len(phrase) for phrase in phrases], np.float32)
    return TextEmbedding(lengths[:, None, None], np.ones((len(phrases), 1), bool))


def prompts(*phrases):
  return [Prompt(phrase) for phrase in phrases]


def test_each_phrase_once():
  model = Model()
  cache = TextCache(model)
  cache.add(prompts("a", "bb", "a"))
  cache.add([*prompts("bb", "ccc"), Prompt(boxes=[[0, 0, 1, 1]])])
  assert model.encoded == ["a", "bb", "ccc", "visual"]
  rows = cache[[*prompts("ccc", "a", "ccc"), Prompt(boxes=[[0, 0, 2, 2]])]]
  assert rows.features[:, 0, 0].tolist() == [3, 1, 3, 6]
  assert rows.valid.shape == (4, 1)


def test_more_than_a_batch():
  model = Model()
  cache, many = TextCache(model), prompts(*("x" * n for n in range(1, 40)))
  cache.add(many)
  assert len(model.encoded) == 39
  assert cache[many].features[:, 0, 0].tolist() == list(range(1, 40))


def test_dropping_phrases(monkeypatch):
  """Only when a new phrase comes, and never the phrases of the same call."""
  monkeypatch.setattr(text_cache, "CAPACITY", 3)
  model = Model()
  cache = TextCache(model)
  cache.add(prompts("a", "b", "c"))
  cache.add(prompts("a", "b", "c"))
  assert model.encoded == ["a", "b", "c"]
  cache.add(prompts("c", "d"))
  assert model.encoded == ["a", "b", "c", "c", "d"]
  with pytest.raises(KeyError):
    cache[prompts("a")]
  cache.add(prompts("a", "b", "c", "d", "e"))  # more than the capacity: all are kept for now
  assert len(cache[prompts("a", "b", "c", "d", "e")]) == 5
