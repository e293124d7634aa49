"""Parameters and shapes of all configurations, by `eval_shape`."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_model import CONFIG, parameters

from sam3_jax.config import RELEASED, SIZES
from sam3_jax.model.sam3 import Detector, init, parameter_shapes
from sam3_jax.types import Prompts
from sam3_jax.utils.param_tree import flatten

# Parameters of the released checkpoint's parts in Meta's layout, without buffers (complex rotations
# and the tracker's random matrix), counted from the shapes of its 1465 tensors.
SOURCE = {
  "trunk": 446_237_696,
  "neck": 7_802_112,
  "text": 353_724_672,
  "geometry": 8_215_808,
  "fusion": 9_472_512,
  "decoder": 11_575_093,
  "scoring": 1_182_976,
  "masks": 2_298_881,
}
TRACKER = {"tracker": 11_743_362, "its neck": 7_802_112}
# Tensors that Meta's code never reads; our parts lack them.
UNREAD = {
  "trunk": 1024,  # the class token's row of the position table
  "neck": 1024 * 256 + 256 + 9 * 256 * 256 + 256,  # level 3
  "text": 1024 * 512,  # text_projection
  "masks": 9 * 256 * 256 + 256 + 2 * 256,  # the pixel decoder's third convolution and norm
}


shapes_of = functools.cache(parameter_shapes)


def count(tree):
  return sum(math.prod(shape) for shape in sizes(tree).values())


def sizes(tree):
  return {path: x.shape for path, x in flatten(tree).items()}


def test_the_source_has_860_million_parameters():
  assert sum(SOURCE.values()) + sum(TRACKER.values()) == 860_055_224


def test_released_parameter_counts():
  shapes = shapes_of(RELEASED)
  assert shapes.keys() == SOURCE.keys()
  for part, tree in shapes.items():
    assert count(tree) == SOURCE[part] - UNREAD.get(part, 0), part


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_parameters_of_every_trunk(size):
  width, mlp = SIZES[size].trunk.width, SIZES[size].trunk.mlp_width
  block = 4 * (width**2 + width) + 2 * width * mlp + mlp + width + 4 * width
  stem = 3 * 14**2 * width + 24**2 * width + 2 * width
  assert count(shapes_of(SIZES[size])["trunk"]) == stem + SIZES[size].trunk.blocks * block


@pytest.mark.parametrize("size", SIZES)
def test_only_trunk_and_neck_depend_on_the_size(size):
  for part in SOURCE.keys() - {"trunk", "neck"}:
    assert sizes(shapes_of(SIZES[size])[part]) == sizes(shapes_of(RELEASED)[part])


def test_no_point_tensors_without_concept_points():
  with_points = flatten(shapes_of(CONFIG))
  config = CONFIG.from_dict(CONFIG.to_dict() | {"concept_points": False})
  gone = with_points.keys() - flatten(parameter_shapes(config)).keys()
  assert gone == {
    f"geometry/point_{part}/{leaf}"
    for part in ("project", "pool_project", "position_project")
    for leaf in ("kernel", "bias")
  }


@pytest.mark.slow
def test_initial_parameters():
  parts = ("trunk", "scoring")  # compiling the others takes long
  make = jax.jit(lambda key: {part: init(CONFIG, key)[part] for part in parts})
  params, others = (flatten(jax.device_get(make(jax.random.key(seed)))) for seed in (0, 1))
  for path, x in params.items():
    assert x.dtype == jnp.float32
    assert np.isfinite(x).all(), path
    if path.endswith(("kernel", "embedding", "position", "token")):
      assert x.std() > 0, path
      assert (x != others[path]).mean() > 0.9, path


@pytest.mark.slow
@pytest.mark.parametrize(
  ("size", "dtype"), [*((size, jnp.float32) for size in SIZES), ("vit-large", jnp.bfloat16)]
)
def test_shapes_of_every_size(size, dtype):
  config, images, prompts = SIZES[size], 2, 3
  detector, params = Detector(config, dtype), shapes_of(config)

  def shape(*sizes, of=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, of)

  def trace(method, *args, **static):
    apply = functools.partial(detector.apply, method=method, **static)
    return jax.eval_shape(apply, {"params": params}, *args)

  def described(tree):
    arrays = {name: x for name, x in vars(tree).items() if name != "origin" and x is not None}
    return {name: (x.shape, x.dtype) for name, x in arrays.items()}

  pixels, sources = shape(images, 1008, 1008, 3), shape(images, 2, of=jnp.int32)
  embedding = trace("encode_image", pixels, sources)
  assert described(embedding) == {
    "fine": ((images, 288, 288, 256), dtype),
    "middle": ((images, 144, 144, 256), dtype),
    "coarse": ((images, 72, 72, 256), dtype),
    "attended": ((images, 72, 72, 256), dtype),
    "sizes": ((images, 2), jnp.int32),
  }
  text = trace("encode_text", shape(prompts, 32, of=jnp.int32))
  assert described(text) == {
    "features": ((prompts, 32, 256), dtype),
    "valid": ((prompts, 32), bool),
  }

  row, label = shape(prompts, of=jnp.int32), shape(prompts, 4, of=bool)
  some = Prompts(row, row, text, shape(prompts, 4, 4), label, label)
  assert described(trace("detect", embedding, some, max_detections=50)) == {
    "scores": ((prompts, 50), jnp.float32),
    "boxes": ((prompts, 50, 4), jnp.float32),
    "mask_logits": ((prompts, 50, 288, 288), dtype),
    "presence_logit": ((prompts,), jnp.float32),
    "semantic_logits": ((prompts, 288, 288), dtype),
    "image_index": ((prompts,), jnp.int32),
    "sizes": ((prompts, 2), jnp.int32),
    "ids": ((prompts, 50), jnp.int32),
  }
  assert described(trace("detect_all_layers", embedding, some)) == {
    "logits": ((6, prompts, 200), jnp.float32),
    "boxes": ((6, prompts, 200, 4), jnp.float32),
    "presence_logit": ((6, prompts), jnp.float32),
    "mask_logits": ((prompts, 200, 288, 288), dtype),
    "semantic_logits": ((prompts, 288, 288), dtype),
    "cell_logits": ((prompts, 72 * 72), jnp.float32),
  }


def test_parameter_paths():
  """Checkpoints, sharding rules and learning rates use them; golden_model.py lists them by hand."""
  assert sizes(shapes_of(CONFIG)) == sizes(parameters())
  assert shapes_of(RELEASED).keys() == parameters().keys()
  assert sizes(shapes_of(RELEASED)).keys() == sizes(parameters()).keys()
