"""`detect` against `predict`: the same numbers, chosen and arranged."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_model import CONFIG, parameters
from scipy.special import expit
from support import assert_close, random_images, random_prompts, random_tokens, run, shapes

# Measured 3.3e-7 at worst, and 0 where `detect` only picks rows.
ROUNDING = 3e-6


@pytest.fixture(scope="module")
def results():
  rng = np.random.default_rng(0)
  sizes = np.array([[300, 400], [500, 200]], np.int32)
  embedding = run("encode_image", random_images(rng, 2), sizes)
  text = run("encode_text", random_tokens(rng, [3, 4, 10, 32]))
  prompts = random_prompts(rng, text, [1, 0, 1, 0], [0, 1, 2, 4], 4)
  predictions = run("detect_all_layers", embedding, prompts)
  detections = run("detect", embedding, prompts)
  return types.SimpleNamespace(**locals())


@pytest.mark.slow
def test_all_queries_in_their_order(results):
  detections, predictions = results.detections, results.predictions
  scores = expit(predictions.logits[-1]) * expit(predictions.presence_logit[-1])[:, None]
  assert_close(detections.scores, scores, rel=ROUNDING)
  center, extent = np.split(np.float64(predictions.boxes[-1]), 2, axis=-1)
  corners = np.concatenate([center - extent / 2, center + extent / 2], axis=-1)
  assert_close(detections.boxes, corners, rel=2.8e-7)  # measured 2.8e-8
  assert_close(detections.mask_logits, predictions.mask_logits, rel=ROUNDING)
  assert_close(detections.semantic_logits, predictions.semantic_logits, rel=ROUNDING)
  assert_close(detections.presence_logit, predictions.presence_logit[-1], rel=ROUNDING)


@pytest.mark.slow
def test_what_each_row_is_about(results):
  detections = results.detections
  assert detections.image_index.tolist() == [1, 0, 1, 0]
  assert detections.sizes.tolist() == [[500, 200], [300, 400], [500, 200], [300, 400]]
  # `first_id` counts by the number of queries here, so the identities run through.
  assert detections.ids.tolist() == np.arange(40).reshape(4, 10).tolist()
  first = results.prompts.replace(first_id=jnp.array([7, 100, 0, 5], jnp.int32))
  again = run("detect", results.embedding, first)
  assert again.ids.tolist() == (np.arange(10) + np.array([[7], [100], [0], [5]])).tolist()


@pytest.mark.slow
def test_the_best_queries_in_descending_order(results):
  whole = results.detections
  best = run("detect", results.embedding, results.prompts, max_detections=3)
  order = np.argsort(-whole.scores, axis=1, kind="stable")[:, :3]
  assert (order != np.arange(3)).any()
  for name in ("scores", "boxes", "mask_logits", "ids"):
    every = getattr(whole, name)
    index = order.reshape(4, 3, *[1] * (every.ndim - 2))
    assert_close(getattr(best, name), np.take_along_axis(np.asarray(every), index, 1), rel=ROUNDING)
  for name in ("presence_logit", "semantic_logits", "image_index", "sizes"):
    assert_close(getattr(best, name), getattr(whole, name), rel=ROUNDING)


def test_more_than_there_are_is_all(results):
  best = shapes("detect", results.embedding, results.prompts, max_detections=999)
  assert best.scores.shape == (4, CONFIG.queries)


def test_ties_go_by_query_number(results):
  """A scoring that ignores the queries gives all of a prompt's the same score."""
  blind = jax.tree.map(jnp.zeros_like, parameters()["scoring"]["query_project"])
  params = parameters() | {"scoring": parameters()["scoring"] | {"query_project": blind}}
  best = run("detect", results.embedding, results.prompts, params=params, max_detections=3)
  assert (best.scores == best.scores[:, :1]).all()
  assert best.ids.tolist() == [[0, 1, 2], [10, 11, 12], [20, 21, 22], [30, 31, 32]]
