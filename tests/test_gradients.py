"""Gradients of the model: all parameters, stopped gradients as in Meta's code, dropout."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_model import CONFIG, parameters
from support import (
  QUICK,
  assert_close,
  normal,
  random_images,
  random_prompts,
  random_tokens,
  run,
  shapes,
)

from sam3_jax.model.layers import Block
from sam3_jax.model.sam3 import Detector
from sam3_jax.types import Points
from sam3_jax.utils.param_tree import flatten

KEY = jax.random.key(0)  # unused without training
STACKS = ("groups", "layers", "blocks")


@pytest.fixture(scope="module")
def data():
  """Two images, each with a prompt that has boxes and points of both labels."""
  rng = np.random.default_rng(0)
  images, sizes = random_images(rng, 2), np.array([[300, 400], [500, 200]], np.int32)
  tokens = random_tokens(rng, [3, 10])
  prompts = random_prompts(rng, run("encode_text", tokens), [1, 0], [1, 2], 2)
  points = Points(jnp.full((2, 1, 2), 0.4), jnp.array([[True], [False]]), jnp.ones((2, 1), bool))
  labels = jnp.array([[True, False], [False, True]])
  return (
    jnp.asarray(images),
    jnp.asarray(sizes),
    jnp.asarray(tokens),
    prompts.replace(points=points, positive=labels),
  )


def predictions_and_gradients(*args):
  """From pixels and token ids; the gradients are those of the sum of the predictions times
  `weights`, a pytree like them."""
  return jax.device_get(_predictions_and_gradients(*args))


@functools.partial(jax.jit, static_argnames="train", compiler_options=QUICK)
def _predictions_and_gradients(params, data, weights, key, train):
  images, sizes, tokens, prompts = data
  detector = Detector(CONFIG, train=train)

  def total(params):
    def part(number, *args, method):
      rngs = {"dropout": jax.random.fold_in(key, number)} if train else None
      return detector.apply({"params": params}, *args, method=method, rngs=rngs)

    embedding = part(0, images, sizes, method="encode_image")
    text = part(1, tokens, method="encode_text")
    predictions = part(2, embedding, prompts.replace(text=text), method="detect_all_layers")
    products = jax.tree.map(lambda x, weight: (x * weight).sum(), predictions, weights)
    return sum(jax.tree.leaves(products)), predictions

  (_, predictions), gradients = jax.value_and_grad(total, has_aux=True)(params)
  return predictions, gradients


@pytest.fixture(scope="module")
def weights(data):
  """Different weights for all numbers of the predictions."""
  predictions = shapes("detect_all_layers", shapes("encode_image", *data[:2]), data[3])
  rng = np.random.default_rng(1)
  return jax.tree.map(lambda x: np.float32(rng.standard_normal(x.shape) / x.size**0.5), predictions)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.slow
def test_every_parameter_has_a_gradient(data, weights, train):
  _, gradients = predictions_and_gradients(parameters(), data, weights, KEY, train)
  assert flatten(gradients).keys() == flatten(parameters()).keys()
  silent = []
  for path, gradient in flatten(gradients).items():
    assert np.isfinite(gradient).all(), path
    windowed, stacked = "/windowed/" in path, any(f"/{x}/" in path for x in STACKS)
    layers = np.abs(gradient).reshape(*gradient.shape[: windowed + stacked], -1).max(axis=-1)
    if not (layers > 1e-9).all():
      silent.append(path)
  # The bias of keys adds the same to all logits of a softmax, which does not see it; unless they
  # are rotated by position, as the trunk's are.
  assert [path for path in silent if not path.endswith("key/bias")] == []
  assert not any(path.startswith("trunk") for path in silent)


@pytest.mark.slow
@pytest.mark.parametrize("layer", range(CONFIG.decoder_layers))
def test_gradients_of_boxes_stop_between_layers(data, weights, layer):
  """Meta's one stop is between a layer's boxes and what the next layer takes from them: a box is
  the head's output added to that of the layer before, in logit space, and no more of them.

  The head's last bias is in each of these outputs once, and reaches nothing else.
  """
  predictions, _ = predictions_and_gradients(parameters(), data, weights, KEY, False)
  boxes = predictions.boxes[layer]
  assert 2e-3 < boxes.min() <= boxes.max() < 1 - 2e-3  # inside the clamps
  chosen = np.asarray(normal(2, *boxes.shape))
  only = jax.tree.map(np.zeros_like, weights)
  only.boxes[layer] = chosen / (boxes * (1 - boxes))
  _, gradients = predictions_and_gradients(parameters(), data, only, KEY, False)

  decoder = gradients["decoder"]
  times = 1 if layer == 0 else 2
  assert_close(decoder["box_head"]["fc3"]["bias"], times * chosen.sum((0, 1)), rel=5e-7)  # 5.6e-8
  for path, gradient in flatten(decoder["layers"]).items():
    if path.endswith("kernel"):
      reached = np.abs(gradient).reshape(CONFIG.decoder_layers, -1).max(axis=1) > 0
      assert reached.tolist() == [i <= layer for i in range(CONFIG.decoder_layers)], path
  for name in ("reference_points", "query_embedding"):
    assert np.abs(decoder[name]).min() > 0
  for part in (decoder["presence_head"], gradients["scoring"], gradients["masks"]):
    assert not any(x.any() for x in jax.tree.leaves(part))


@pytest.mark.slow
def test_dropout_in_training_only(data, weights):
  def predict(seed, train):
    key = jax.random.key(seed)
    return predictions_and_gradients(parameters(), data, weights, key, train)[0]

  assert_close(predict(0, False), predict(1, False), rel=0)
  assert_close(predict(0, True), predict(0, True), rel=0)
  for other in (predict(1, True), predict(0, False)):
    for one, two in zip(jax.tree.leaves(predict(0, True)), jax.tree.leaves(other), strict=True):
      assert np.abs(one - two).max() > 1e-2


def test_training_requires_a_key(data):
  with pytest.raises(Exception, match='needs PRNG for "dropout"'):
    shapes("encode_image", *data[:2], train=True)


def test_text_encoder_has_no_dropout(data):
  want = run("encode_text", data[2])
  got = run("encode_text", data[2], key=jax.random.key(0), train=True)
  assert_close(got.features, want.features, rel=0)


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.0, 0.4, 1.0])
def test_drop_path(rate):
  """A sample drops its branch at this rate; otherwise the branch is divided by 1 - rate."""
  rows, x = 200, normal(0, 1, 3, 8)
  block, noisy = Block(2, 16), Block(2, 16, train=True)
  params = jax.jit(block.init)(jax.random.key(0), x)["params"]
  params["mlp"]["fc2"] = jax.tree.map(jnp.zeros_like, params["mlp"]["fc2"])  # one branch only
  branch = jax.jit(block.apply)({"params": params}, x)[0] - x
  many = jnp.broadcast_to(x, (rows, 3, 8))
  got, _ = jax.jit(noisy.apply)({"params": params}, many, rate, rngs={"dropout": KEY})
  kept = jnp.abs(got - many).max(axis=(1, 2)) > 0
  assert abs(kept.mean() - (1 - rate)) < 0.1
  if rate < 1:
    want = kept[:, None, None] * branch / (1 - rate)
    assert_close(got - many, want, rel=2e-6)  # measured 2.2e-7
