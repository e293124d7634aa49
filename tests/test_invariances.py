"""Padding, order and batch size must not change results of the tiny model."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_model import CONFIG, parameters
from support import QUICK, assert_close, random_images, random_prompts, random_tokens, run

from sam3_jax.model.geometry import GeometryEncoder
from sam3_jax.types import Points

# Measured 9.2e-7 at worst, and 0 where the order of the sums stays.
ROUNDING = 9e-6
SLOTS, IMAGE, BOXES = 4, [1, 0, 1, 0], [0, 1, 2, 4]


@pytest.fixture(scope="module")
def base():
  """Two images, and four prompts with 0, 1, 2 and 4 boxes."""
  rng = np.random.default_rng(0)
  images, sizes = random_images(rng, 2), np.array([[300, 400], [500, 200]], np.int32)
  tokens = random_tokens(rng, [3, 4, 10, 32])
  embedding = run("encode_image", images, sizes)
  prompts = random_prompts(rng, run("encode_text", tokens), IMAGE, BOXES, SLOTS)
  predictions = run("detect_all_layers", embedding, prompts)
  return types.SimpleNamespace(**locals())


def rows(predictions, index):
  """These prompts' predictions."""
  layered = {"logits", "boxes", "presence_logit"}
  return {
    name: value[:, index] if name in layered else value[index]
    for name, value in vars(predictions).items()
  }


def outputs(predictions):
  return rows(predictions, slice(None))


@pytest.mark.slow
def test_results_depend_on_the_inputs(base):
  """Otherwise the tests below would show nothing."""
  assert (
    np.unique(np.round(base.predictions.presence_logit, 4)).size
    == base.predictions.presence_logit.size
  )
  swapped = base.prompts.replace(positive=~base.prompts.positive)
  other = run("detect_all_layers", base.embedding, swapped)
  moved = np.abs(other.logits - base.predictions.logits).max(axis=(0, 2))
  assert moved[0] == 0  # it has no boxes
  assert moved[1:].min() > 1e-3


@pytest.mark.slow
def test_batch_of_images_equals_single_images(base):
  for i in range(2):
    alone = run("encode_image", base.images[i : i + 1], base.sizes[i : i + 1])
    assert_close(alone, base.embedding[i : i + 1], rel=4e-6)  # measured 4.4e-7


@pytest.mark.slow
@pytest.mark.parametrize("row", [0, 3])
def test_single_prompt_without_padding(base, row):
  """With the embedding of its image only: no other prompt, image or padding."""
  image, boxes = IMAGE[row], BOXES[row]
  prompt = base.prompts[row : row + 1]
  prompt = prompt.replace(
    image=np.zeros(1, np.int32),
    boxes=prompt.boxes[:, :boxes],
    positive=prompt.positive[:, :boxes],
    valid=prompt.valid[:, :boxes],
  )
  alone = run("detect_all_layers", base.embedding[image : image + 1], prompt)
  assert_close(outputs(alone), rows(base.predictions, slice(row, row + 1)), rel=ROUNDING)


def test_permuting_prompts_permutes_results(base):
  order = np.array([2, 0, 3, 1])
  permuted = run("detect_all_layers", base.embedding, base.prompts[order])
  assert_close(outputs(permuted), rows(base.predictions, order), rel=ROUNDING)


def test_permuting_images_changes_nothing(base):
  flipped = base.prompts.replace(image=1 - base.prompts.image)
  got = run("detect_all_layers", base.embedding[::-1], flipped)
  assert_close(outputs(got), outputs(base.predictions), rel=ROUNDING)


def test_order_and_padding_of_boxes(base):
  """Boxes in any slots, and any numbers in padded slots, even a box far outside."""
  rng = np.random.default_rng(1)
  prompts = base.prompts
  order = rng.permuted(np.tile(np.arange(SLOTS), (4, 1)), axis=1)
  assert (np.sort(order) != order).any()
  valid = np.take_along_axis(prompts.valid, order, axis=1)
  boxes = np.take_along_axis(prompts.boxes, order[..., None], axis=1)
  labels = np.take_along_axis(prompts.positive, order, axis=1)
  free = rng.uniform(-9, 9, boxes.shape).astype(np.float32)
  moved = prompts.replace(
    boxes=np.where(valid[..., None], boxes, free),
    positive=np.where(valid, labels, ~labels),
    valid=valid,
  )
  got = run("detect_all_layers", base.embedding, moved)
  assert_close(outputs(got), outputs(base.predictions), rel=ROUNDING)


def test_padding_of_phrases(base):
  text = base.prompts.text
  noise = np.random.default_rng(2).normal(0, 50, text.features.shape).astype(np.float32)
  features = np.where(text.valid[..., None], text.features, noise)
  assert (features != text.features).any()
  prompts = base.prompts.replace(text=text.replace(features=features))
  got = run("detect_all_layers", base.embedding, prompts)
  assert_close(outputs(got), outputs(base.predictions), rel=ROUNDING)


def test_tokens_see_only_earlier_tokens(base):
  short = run("encode_text", base.tokens[:, :10])
  whole = base.prompts.text
  assert_close(short.features, whole.features[:, :10], rel=4e-6)  # measured 4.4e-7
  np.testing.assert_array_equal(short.valid, whole.valid[:, :10])
  np.testing.assert_array_equal(whole.valid, base.tokens != 0)


def test_padding_of_points(base):
  """Two points and boxes, then the same with padding between them."""
  rng = np.random.default_rng(3)
  xy = rng.uniform(0, 1, (4, 2, 2)).astype(np.float32)
  points = Points(xy, rng.random((4, 2)) < 0.5, np.ones((4, 2), bool))
  padded = Points(
    xy=np.insert(points.xy, 1, 9.0, axis=1),
    positive=np.insert(points.positive, 1, True, axis=1),
    valid=np.insert(points.valid, 1, False, axis=1),
  )

  @functools.partial(jax.jit, compiler_options=QUICK)
  def encode(points):
    image = jnp.asarray(base.embedding.coarse[base.prompts.image])
    prompts = jax.tree.map(jnp.asarray, base.prompts).replace(points=points)
    return GeometryEncoder(CONFIG).apply({"params": parameters()["geometry"]}, image, prompts)

  want, valid = jax.device_get(encode(points))
  got, padded_valid = jax.device_get(encode(padded))
  assert padded_valid[:, 1].tolist() == [False] * 4
  assert_close(got[padded_valid], want[valid], rel=3.6e-6)  # measured 3.6e-7
