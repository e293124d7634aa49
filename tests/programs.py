"""Traces every program of the package from shapes, without compiling or running it."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import training_model
from jax.extend.core import jaxprs_in_params

from sam3_jax.config import Config, LiteTextConfig, StemConfig
from sam3_jax.inference import sharding
from sam3_jax.inference.programs import Programs
from sam3_jax.model import sam3
from sam3_jax.model.visual import head
from sam3_jax.training import state, step
from sam3_jax.training.lora import LoraConfig, adapt
from sam3_jax.training.losses import LossConfig
from sam3_jax.training.optimizer import OptimizerConfig, make_optimizer, make_schedule
from sam3_jax.training.sharding import make_mesh
from sam3_jax.training.visual import VisualConfig
from sam3_jax.types import Points, Prompts, TextEmbedding, VisualPrompts

LITE = LiteTextConfig(
  width=16, heads=2, mlp_width=32, layers=1, context=8, vocabulary=49408, mixers=True
)
STEM = (StemConfig(stride=4, width=16, blocks=1), StemConfig(stride=2, width=32, blocks=1))
# Together they have every part that a checkpoint can have.
CONFIGS = {
  "toy": training_model.CONFIG,
  "parts": dataclasses.replace(
    training_model.CONFIG,
    text=LITE,
    trunk=dataclasses.replace(training_model.CONFIG.trunk, stem=STEM),
    concept_points=True,
  ),
}
IMAGES, PROMPTS, BOXES = 2, 3, 2
LORA = LoraConfig(rank=2, kernels=r"trunk/groups/windowed/attn/query/kernel")
# Trained parameters: for concept prompts, and for visual prompts.
FIRST = (
  ("trunk/patch_embed/kernel", "text/token_embedding/embedding"),
  ("visual/neck/level0/up1/kernel", "visual/prompt/label_embedding"),
)


def shape(dtype: Any, *sizes: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(sizes, dtype)


def inference(config: Config, dtype: Any) -> Iterator[tuple[str, Any]]:
  """Name and `jax.stages.Traced` of each program of `Sam3` and of the batch engine."""
  programs = Programs(config, dtype)
  shapes = sam3.parameter_shapes(config) | {"visual": head.parameter_shapes(config)}
  assert {x.dtype.name for x in jax.tree.leaves(shapes)} == {"float32"}
  params = jax.tree.map(lambda x: shape(dtype, *x.shape), shapes)
  side, cells = config.image_size, config.mask_size

  encode = programs.encode.trace(
    params, shape("uint8", IMAGES, side, side, 3), shape("int32", IMAGES, 2)
  )
  yield "encode image", encode
  embedding, features = encode.out_info

  tokens = shape("int32", PROMPTS, config.text.context)
  text = programs.encode_text.trace(params, tokens)
  yield "encode text", text
  rows, flags = shape("int32", PROMPTS), shape("bool", PROMPTS, BOXES)
  points = Points(shape("float32", PROMPTS, BOXES, 2), flags, flags)
  prompts = Prompts(
    rows, rows, text.out_info,
    shape("float32", PROMPTS, BOXES, 4), flags, flags, points if config.concept_points else None,
  )  # fmt: skip
  if config is not training_model.CONFIG:  # this configuration only adds parts to `detect`
    yield "detect", programs.prompts.detect.trace(params, embedding, prompts, 4)
    return
  score = programs.prompts.score.trace(params, embedding, prompts, 4)
  yield "score", score
  yield "mask", programs.prompts.mask.trace(params, embedding, score.out_info)

  encode = programs.encode_visual.trace(params, features)
  yield "encode visual", encode
  asked = VisualPrompts(
    rows, shape("float32", PROMPTS, 3, 2), shape("int32", PROMPTS, 3),
    shape("float32", PROMPTS, cells, cells), shape("bool", PROMPTS),
  )  # fmt: skip
  yield "decode visual", programs.decode_visual.trace(params, encode.out_info, asked, True)
  doubt = shape("bool", PROMPTS)
  traced = programs.decode_best.trace(params, encode.out_info, asked, doubt)
  yield "answer visual", traced


def sharded(config: Config, dtype: Any) -> Iterator[tuple[str, Any]]:
  """As `inference`, for the programs of a mesh whose devices split the work on a prompt."""
  mesh = sharding.make_mesh(jax.devices()[:2], model=2)
  programs = Programs(config, dtype, mesh)
  make = functools.partial(jax.tree.map, lambda x: shape(dtype, *x.shape))
  params, side = make(sam3.parameter_shapes(config)), config.image_size
  encode, _ = jax.eval_shape(
    Programs(config, dtype).encode, params,
    shape("uint8", 1, side, side, 3), shape("int32", 1, 2),
  )  # fmt: skip
  text = TextEmbedding(
    shape(dtype, 1, config.text.context, config.width), shape("bool", 1, config.text.context)
  )
  rows, flags = shape("int32", 1), shape("bool", 1, BOXES)
  prompts = Prompts(rows, rows, text, shape("float32", 1, BOXES, 4), flags, flags)
  yield "detect on a mesh", programs.split_prompts.detect.trace(params, encode, prompts, 4)


def training(objective: str, dtype: Any) -> Any:
  """`jax.stages.Traced` of a training step. Trains only a few parameters of the first layers, as
  each takes time."""
  batch = jax.tree.map(lambda x: shape(x.dtype, *np.shape(x)), training_model.batch(0, images=2))
  parts = training_model.parameters() | training_model.visual_parameters()
  parts = {path: shape("float32", *x.shape) for path, x in parts.items()}
  trained = {path: parts[path] for path in FIRST[objective == "visual"]}
  if objective != "visual":
    trained |= jax.eval_shape(lambda: adapt(parts, LORA, jax.random.key(0)))
  frozen = {path: x for path, x in parts.items() if path not in trained}
  what = step.StepSettings(
    model=training_model.CONFIG,
    losses=LossConfig(cell_weight=1.0),
    visual=VisualConfig(prompts_per_image=2, rounds=2),
    objective=objective,
    dtype=dtype,
    mask_prompts=1 if objective == "detection" else None,
    ema_decay=0.9,
  )
  mesh, settings = make_mesh(jax.devices()[:1]), OptimizerConfig()
  optimizer = make_optimizer(settings, trained, training_model.CONFIG.trunk, 5)
  create = functools.partial(state.create, optimizer=optimizer, ema=True)
  now = jax.eval_shape(lambda trained: create(trained, key=jax.random.key(0)), trained)
  run = step.make_step(what, optimizer, make_schedule(settings, 5), mesh, now, frozen)
  return run.trace(now, frozen, batch)


def equations(jaxpr: Any) -> Iterator[Any]:
  """All equations of a jaxpr, including those of loops, branches and calls."""
  for equation in jaxpr.eqns:
    yield equation
    for inner in jaxprs_in_params(equation.params):
      yield from equations(inner)
