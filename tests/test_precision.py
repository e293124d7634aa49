"""The model of the goldens with bfloat16 parameters and computation, against float32."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_model import parameters
from support import assert_close, difference, random_images, random_prompts, random_tokens, run

WIDE, NARROW = jnp.float32, jnp.bfloat16


@pytest.fixture(scope="module")
def both():
  """Results in float32 and in bfloat16."""
  rng = np.random.default_rng(0)
  sizes = np.array([[300, 400], [500, 200]], np.int32)
  images, tokens, results = random_images(rng, 2), random_tokens(rng, [3, 4, 10, 32]), []
  for dtype in (WIDE, NARROW):
    params = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), parameters())
    embedding = run("encode_image", images, sizes, params=params, dtype=dtype)
    text = run("encode_text", tokens, params=params, dtype=dtype)
    prompts = random_prompts(np.random.default_rng(1), text, [1, 0, 1, 0], [0, 1, 2, 4], 4)
    predictions = run("detect_all_layers", embedding, prompts, params=params, dtype=dtype)
    results.append(types.SimpleNamespace(embedding=embedding, text=text, predictions=predictions))
  return results


# Largest difference relative to the largest magnitude, measured on a CPU; 3 times as much is
# allowed.
MEASURED = {
  "embedding": {
    "fine": 1.2e-2,
    "middle": 1.1e-2,
    "coarse": 9.7e-3,
    "attended": 1.1e-2,
    "sizes": 0,
  },
  "text": {"features": 1.1e-2, "valid": 0},
  "predictions": {
    "logits": 2.8e-2,
    "boxes": 3.9e-3,
    "presence_logit": 1.8e-2,
    "mask_logits": 3.2e-2,
    "semantic_logits": 1.6e-2,
    "cell_logits": 2.8e-2,
  },
}


@pytest.mark.slow
def test_dtypes_of_results(both):
  for dtype, results in zip((WIDE, NARROW), both, strict=True):
    embedding, predictions = results.embedding, results.predictions
    low = [embedding.fine, embedding.middle, embedding.coarse, embedding.attended]
    low += [results.text.features, predictions.mask_logits, predictions.semantic_logits]
    assert {x.dtype for x in low} == {jnp.dtype(dtype)}
    high = [predictions.logits, predictions.boxes, predictions.presence_logit]
    assert {x.dtype for x in high} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("stage", MEASURED)
@pytest.mark.slow
def test_bfloat16_is_close_to_float32(both, stage):
  want, got = (vars(getattr(results, stage)) for results in both)
  assert want.keys() - {"visual", "origin", "tokens"} == MEASURED[stage].keys() - {"tokens"}
  for name, measured in MEASURED[stage].items():
    assert_close(got[name], want[name], rel=3 * measured, what=name)
    assert measured == 0 or difference(got[name], want[name]) > 1e-4  # computed in bfloat16 indeed


@pytest.mark.slow
def test_masks_agree(both):
  want, got = (np.asarray(results.predictions.mask_logits, np.float32) > 0 for results in both)
  iou = (want & got).sum((2, 3)) / (want | got).sum((2, 3))
  assert iou.min() > 0.94  # measured 0.979 at worst
