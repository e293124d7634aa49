"""Optimized computations equal their plain forms: work done once per image, fused or skipped."""

import functools

import flax.linen as nn
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
from work import gflop

from sam3_jax.config import RELEASED
from sam3_jax.model.decoder import Decoder
from sam3_jax.model.geometry import GeometryEncoder
from sam3_jax.model.layers import Attention, ContextLayer, Mlp, conv, gelu, stacked
from sam3_jax.model.masks import MergeConv, QueryProject
from sam3_jax.model.neck import Level, Linear
from sam3_jax.model.norms import LayerNorm
from sam3_jax.model.sam3 import Detector, parameter_shapes
from sam3_jax.model.scoring import Scoring
from sam3_jax.model.visual.head import VisualHead
from sam3_jax.model.visual.head import parameter_shapes as visual_shapes
from sam3_jax.types import ImageEmbedding, Prompts
from sam3_jax.utils.param_tree import flatten


class PlainFusion(nn.Module):
  """All layers, run for each prompt."""

  @nn.compact
  def __call__(self, image, position, prompt, valid):
    layers = stacked(ContextLayer, CONFIG.fusion_layers)
    layers = layers(CONFIG.width, CONFIG.heads, CONFIG.mlp_width, name="layers")
    return layers(image, position, None, prompt, prompt, valid)[0]


class PlainMasks(nn.Module):
  """Upsampled maps, 3 x 3 convolutions of their sums, and a projection of every cell."""

  @nn.compact
  def __call__(self, states, memory, levels, prompt, valid):
    width = CONFIG.width
    tokens = memory.reshape(len(memory), -1, width)
    normed = LayerNorm(name="prompt_norm")(tokens)
    attended = Attention(CONFIG.heads, name="prompt_attn")(normed, prompt, prompt, valid=valid)
    x = (tokens + attended).reshape(memory.shape)
    for i, level in enumerate(levels):
      x = conv(width, 3, jnp.float32, f"conv{i}")(level + x.repeat(2, axis=1).repeat(2, axis=2))
      x = nn.relu(nn.GroupNorm(8, epsilon=1e-5, use_fast_variance=False, name=f"norm{i}")(x))
    instance = conv(width, 1, jnp.float32, "instance_project")(x)
    queries = Mlp((width,) * 3, name="mask_embed")(states)
    semantic = conv(1, 1, jnp.float32, "semantic_project")(x)
    return jnp.einsum("pkd,phwd->pkhw", queries, instance), semantic[..., 0]


class Plain(Detector):
  """The detector without work shared between prompts."""

  def setup(self):
    self.geometry, self.decoder = GeometryEncoder(CONFIG), Decoder(CONFIG)
    self.scoring, self.fusion, self.masks = Scoring(CONFIG), PlainFusion(), PlainMasks()

  def prepare(self, maps):
    return ImageEmbedding(maps.fine, maps.middle, maps.coarse, maps.coarse, maps.sizes)


UNSEEN = ("key/bias", "x/fc2/bias", "y/fc2/bias")  # softmax cancels them: gradients are rounding
PARTS = ("geometry", "fusion", "decoder", "scoring", "masks")


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def predictions_and_gradients(kind, params, maps, prompts, weights):
  """Decodes; also returns the gradients of the sum of the predictions times `weights`."""

  def total(params):
    apply = functools.partial(kind(CONFIG).apply, {"params": params})
    found = apply(apply(maps, method="prepare"), prompts, method="detect_all_layers")
    products = jax.tree.map(lambda x, weight: (x * weight).sum(), found, weights)
    return sum(jax.tree.leaves(products)), found

  (_, found), gradients = jax.value_and_grad(total, has_aux=True)(params)
  return found, gradients


@pytest.mark.slow
@pytest.mark.parametrize("index", [[0], [1, 0, 1]], ids=str)
def test_decoding_equals_the_plain_form(index):
  """Predictions and gradients, for one image and for two."""
  rng, images = np.random.default_rng(0), max(index) + 1
  maps = run("map_image", random_images(rng, images), np.full((images, 2), 99, np.int32))
  text = run("encode_text", random_tokens(rng, [3, 9, 5][: len(index)]))
  prompts = random_prompts(rng, text, index, [1, 2, 0][: len(index)], 2)
  params = {part: parameters()[part] for part in PARTS}
  embedding = Plain(CONFIG).prepare(maps)
  found = shapes("detect_all_layers", embedding, prompts)
  weights = jax.tree.map(lambda x: np.float32(rng.standard_normal(x.shape) / x.size**0.5), found)
  (got, got_gradients), (want, gradients) = (
    jax.device_get(predictions_and_gradients(kind, params, maps, prompts, weights))
    for kind in (Detector, Plain)
  )
  for name, value in vars(want).items():
    assert_close(getattr(got, name), value, rel=7e-6, what=name)  # measured 7.5e-7
  got_gradients = flatten(got_gradients)
  for path, gradient in flatten(gradients).items():
    if not path.endswith(UNSEEN):
      # Measured 2.6e-6, and 4.6e-3 where 1 of 294,912 ReLUs is on the other side of zero.
      assert_close(got_gradients[path], gradient, rel=4e-2, what=path)


@pytest.mark.slow
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 3), (5, 4)])
def test_merge_convolution_in_two_parts(height, width):
  """Against the products of each tap with the shifted sum."""
  kernel, bias = normal(0, 3, 3, 6, 6), normal(1, 6)
  level, x = normal(2, 2, 2 * height, 2 * width, 6), normal(3, 2, height, width, 6)
  module, variables = MergeConv(6), {"params": {"kernel": kernel, "bias": bias}}
  got = module.apply(variables, level) + module.apply(variables, x, method="doubled")
  merged = np.float64(level) + np.float64(x).repeat(2, axis=1).repeat(2, axis=2)
  merged = np.pad(merged, ((0, 0), (1, 1), (1, 1), (0, 0)))
  want = np.float64(bias) + sum(
    merged[:, i : i + 2 * height, j : j + 2 * width] @ np.float64(kernel[i, j])
    for i in range(3)
    for j in range(3)
  )
  assert_close(got, want, rel=5e-6)


def test_projection_folded_into_the_queries():
  queries, image = normal(0, 2, 3, 8), normal(1, 2, 4, 5, 8)
  kernel, bias = normal(2, 1, 1, 8, 8), normal(3, 8)
  variables = {"params": {"kernel": kernel, "bias": bias}}
  folded, offset = QueryProject(8).apply(variables, queries)
  got = jnp.einsum("pkd,phwd->pkhw", folded, image) + offset[..., None, None]
  instance = np.float64(image) @ np.float64(kernel[0, 0]) + np.float64(bias)
  assert_close(got, np.einsum("pkd,phwd->pkhw", np.float64(queries), instance), rel=5e-6)


@pytest.mark.slow
@pytest.mark.parametrize("doublings", [0, 1, 2])
def test_neck_level_fused_with_the_next_layer(doublings):
  """Values and gradients, against the separate layers."""
  level, image, width = Level(doublings, 6), normal(0, 2, 3, 4, 8), normal(1, 1, 1, 6, 2)
  after, weights = Linear(width, normal(2, 2)), normal(3, 2, 3 << doublings, 4 << doublings, 2)
  params = level.init(jax.random.key(0), image)["params"]

  def plain(params, after):
    x = image
    for i in range(1, doublings + 1):
      up = params[f"up{i}"]
      cells = jnp.einsum("bhwc,ijcd->bhiwjd", x, up["kernel"]) + up["bias"]
      x = cells.reshape(len(x), 2 * x.shape[1], 2 * x.shape[2], -1)
      x = gelu(x) if i < doublings else x
    x = conv(6, 1, jnp.float32, None).apply({"params": params["project"]}, x)
    x = conv(6, 3, jnp.float32, None).apply({"params": params["smooth"]}, x)
    return x @ after.kernel[0, 0] + after.bias

  def fused(params, after):
    return level.apply({"params": params}, image, after)

  assert_close(fused(params, after), plain(params, after), rel=2e-6)  # measured 8.3e-8, 2.7e-7
  got, want = (
    jax.grad(lambda *given, form=form: (form(*given) * weights).sum(), argnums=(0, 1))(
      params, after
    )
    for form in (fused, plain)
  )
  jax.tree.map(lambda x, y: assert_close(x, y, rel=2e-6), got, want)


@pytest.fixture(scope="module")
def released():
  """GFLOP of each step of the released model: of an image, and of a prompt that keeps 50."""

  def shape(*sizes, of=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, of)

  def step(method, **static):
    return functools.partial(Detector(RELEASED).apply, method=method, **static)

  params = {"params": parameter_shapes(RELEASED)}
  pixels, sizes = shape(1, 1008, 1008, 3), shape(1, 2, of=jnp.int32)
  maps = jax.eval_shape(step("map_image"), params, pixels, sizes)
  embedding = jax.eval_shape(step("prepare"), params, maps)
  text = jax.eval_shape(step("encode_text"), params, shape(1, 32, of=jnp.int32))
  row, label = shape(1, of=jnp.int32), shape(1, 8, of=bool)
  prompts = Prompts(row, row, text, shape(1, 8, 4), label, label)
  return {
    "map_image": gflop(step("map_image"), params, pixels, sizes),
    "prepare": gflop(step("prepare"), params, maps),
    "detect": gflop(step("detect", max_detections=50), params, embedding, prompts),
    "visual": gflop(
      functools.partial(VisualHead(RELEASED).apply, method="encode"),
      {"params": visual_shapes(RELEASED)},
      shape(1, 72, 72, 1024),
    ),
  }


@pytest.mark.slow
def test_gflop_of_the_released_model(released):
  """The plain form takes 5611 per image, 218 for its second neck, and 418 per prompt, without the
  neck level and the convolution that are not read."""
  assert released["map_image"] == pytest.approx(5585.4, abs=0.1)
  assert released["visual"] == pytest.approx(83.0, abs=0.1)
  convolutions = 2 * 9 * 256**2 * (144**2 + 288**2) / 1e9
  attention = 2 * (4 * 5184 * 256**2 + 2 * 5184**2 * 256) / 1e9
  assert released["prepare"] == pytest.approx(convolutions + attention, abs=0.1)
  assert released["detect"] == pytest.approx(310.0, abs=0.1)


def test_trunk_without_scan_equals_nested_scans():
  """`capture` selects the nested scans, as training does."""
  images = random_images(np.random.default_rng(0), 2)
  sizes = np.full((2, 2), 99, np.int32)
  (want, _), got = run("map_image", images, sizes, capture=True), run("map_image", images, sizes)
  for name, value in vars(want).items():
    assert_close(getattr(got, name), value, rel=0, what=name)
