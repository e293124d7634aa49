"""Dense pretraining: losses against loops, padding, batches without objects, gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training_model

from sam3_jax.inputs.preprocess import normalize
from sam3_jax.model.sam3 import Detector
from sam3_jax.training import dense_pretraining
from sam3_jax.training.dense_pretraining import TERMS, DenseConfig, dense_loss
from sam3_jax.training.mask_losses import cell_loss
from sam3_jax.utils.param_tree import flatten, nest

DETECTOR = Detector(training_model.CONFIG, jnp.float32, True)


def loss(parameters, batch, key=0):
  variables = {"params": nest(parameters)}
  rngs = {"dropout": jax.random.key(1)}
  images, tokens = normalize(batch.images), batch.tokens.reshape(-1, batch.tokens.shape[-1])
  maps = DETECTOR.apply(variables, images, batch.sizes, method=Detector.map_image, rngs=rngs)
  text = DETECTOR.apply(variables, tokens, method=Detector.encode_text, rngs=rngs)
  config = DenseConfig(mask_weight=7.0)
  return dense_loss(variables["params"], DETECTOR, maps, text, batch, jax.random.key(key), config)


@functools.cache
def gradients():
  value = jax.jit(jax.value_and_grad(loss, has_aux=True))
  return lambda batch: value(training_model.parameters(), batch)


@pytest.mark.slow
def test_total_is_the_weighted_sum_of_its_terms():
  (total, terms), _ = gradients()(training_model.batch(0))
  weights = {
    "coarse": 1.0, "middle": 0.5, "fine": 0.5,
    "class": 2.0, "box": 5.0, "giou": 2.0, "mask": 7.0, "dice": 2.0, "semantic_dice": 0.5,
  }  # fmt: skip
  assert set(terms) == {*weights, "accuracy", "iou"}
  assert set(TERMS) == set(weights)
  np.testing.assert_allclose(total, sum(weights[name] * terms[name] for name in weights), rtol=1e-6)


@pytest.mark.slow
def test_parameters_with_a_gradient():
  _, gradient = gradients()(training_model.batch(0))
  still = {path for path, value in flatten(gradient).items() if not np.any(value)}
  learn = ("decoder/norm/", "decoder/box_head/")
  for path in gradient:
    idle = path.startswith(("geometry/", "decoder/")) and not path.startswith(learn)
    key_bias = path.endswith("attn/key/bias")  # a softmax does not depend on it
    assert (path in still) == idle or key_bias, path


@pytest.mark.slow
def test_padding_changes_nothing():
  batch = training_model.batch(0)
  (total, terms), _ = gradients()(batch)
  padded = batch.replace(
    targets=batch.targets.replace(
      boxes=np.where(batch.targets.valid[..., None], batch.targets.boxes, 0.9),
      masks=np.where(batch.targets.valid[..., None, None], batch.targets.masks, 255).astype(
        batch.targets.masks.dtype
      ),
    )
  )
  (other, others), _ = gradients()(padded)
  np.testing.assert_array_equal(total, other)
  jax.tree.map(np.testing.assert_array_equal, terms, others)


@pytest.mark.slow
def test_batch_without_objects_is_finite():
  batch = training_model.batch(0)
  empty = batch.replace(
    targets=batch.targets.replace(valid=np.zeros_like(batch.targets.valid)),
    prompt_valid=np.zeros_like(batch.prompt_valid),
  )
  (total, terms), gradient = gradients()(empty)
  assert np.isfinite(total)
  assert terms["box"] == terms["mask"] == terms["dice"] == 0
  assert all(np.isfinite(value).all() for value in gradient.values())


def test_distribution_of_a_cell():
  covered = jnp.array([[0.0, 1.0, 0.5, 1.0], [0.0, 0.0, 0.25, 1.0]]).reshape(1, 2, 1, 4)
  shares = dense_pretraining._with_none(covered)[0, :, 0]
  np.testing.assert_allclose(shares[:, 0], [1, 0, 0])
  np.testing.assert_allclose(shares[:, 1], [0, 1, 0], atol=1e-6)
  np.testing.assert_allclose(shares[:, 2], [0.5, 1 / 3, 1 / 6], atol=1e-6)
  np.testing.assert_allclose(shares[:, 3], [0, 0.5, 0.5], atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("right", [True, False])
def test_boxes_of_the_objects_that_cover_the_cells(right):
  boxes = jnp.array([[[0.25, 0.5, 0.5, 1.0], [0.75, 0.5, 0.5, 1.0]]])
  in_cells = jnp.array([[[1.0, 0.3, 0.0], [0.0, 0.2, 0.9]]])  # two cells on objects, one on none
  found = jnp.stack([boxes[:, 0], boxes[:, 0] * 0 + 0.1, boxes[:, 1]], axis=1)
  found = found if right else found[:, ::-1]
  terms = dense_pretraining._box_terms(found, in_cells, boxes, DenseConfig().min_coverage)
  np.testing.assert_allclose(terms["box"], 0 if right else 0.5, atol=1e-6)
  np.testing.assert_allclose(terms["iou"], 1 if right else 0, atol=1e-6)
  np.testing.assert_allclose(terms["giou"], 0 if right else 1, atol=1e-6)


def test_cell_loss_equals_a_loop():
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(2, 4)).astype(np.float32)
  covered = rng.uniform(size=(2, 4, 4)).astype(np.float32)
  for row in range(2):
    total = 0.0
    for cell in range(4):
      y, x = 2 * (cell // 2), 2 * (cell % 2)
      wanted = covered[row, y : y + 2, x : x + 2].mean()
      p = 1 / (1 + np.exp(-logits[row, cell]))
      bce = -(wanted * np.log(p) + (1 - wanted) * np.log(1 - p))
      total += bce * (abs(p - wanted) + 0.1) * (1 + 4 * wanted)
    np.testing.assert_allclose(cell_loss(logits, covered)[row], total / 4, rtol=1e-6)
