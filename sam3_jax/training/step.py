"""One training step, as a pure function for `jit`: predictions, losses, gradients, new state.

The model is mapped (`vmap`) over the devices' shards of a batch, so no index, sort or loop in it
uses images of other devices, and the partitioner has no reason to gather activations.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from sam3_jax.checkpoint.parameters import VISUAL
from sam3_jax.config import Config
from sam3_jax.inference.video.functions import VideoFunctions
from sam3_jax.inputs.preprocess import normalize
from sam3_jax.model.layers import PLAIN, Layering
from sam3_jax.model.sam3 import Detector
from sam3_jax.model.video.tracker import video_config
from sam3_jax.model.visual.head import VisualHead
from sam3_jax.training.batch import Batch, flat_prompts, flatten, standard_promotion
from sam3_jax.training.dense_pretraining import DenseConfig, dense_loss
from sam3_jax.training.losses import LossConfig, loss
from sam3_jax.training.sharding import AXES, batch_sharding, state_shardings
from sam3_jax.training.state import Flat, TrainState, model_parameters, update_ema
from sam3_jax.training.tracking import TrackingConfig, tracking_loss, tracking_sums
from sam3_jax.training.video_examples import ClipBatch
from sam3_jax.training.visual import VisualConfig, visual_loss, visual_sums
from sam3_jax.types import DetectorOutput, ImageMaps, TextEmbedding

Metrics = dict[str, Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepSettings:
  """Static settings of a step.

  Attributes:
    model: sizes.
    losses: losses of the objective "detection".
    dense: losses and sampling of the objective "dense".
    visual: prompts and losses of the objective "visual".
    video: losses of the objective "video".
    objective: "detection", "dense" for dense pretraining, "visual" for the head for visual prompts,
      or "video" for the tracker.
    dtype: of the computation; parameters, gradients and moments are float32.
    one_to_many: train one-to-many queries in addition to the model's own.
    mask_prompts: number of prompts of an image with masks, the first ones; None for all.
    gradient_accumulation_steps: microbatches per step. The losses of each are normalized by its own
      objects and prompts, and microbatches have equal weights.
    ema_decay: decay of the parameters' moving average; 0 for none.
    lora_scale: factor on low-rank products.
    frozen_parts: parts of the model without dropout and stochastic depth, because none of their
      parameters is trained.
    layering: how layers run; `gather` is applied to all other parameters too.
  """

  model: Config
  losses: LossConfig
  dense: DenseConfig = dataclasses.field(default_factory=DenseConfig)
  visual: VisualConfig = dataclasses.field(default_factory=VisualConfig)
  video: TrackingConfig = dataclasses.field(default_factory=TrackingConfig)
  objective: str = "detection"
  dtype: DTypeLike = jnp.float32
  one_to_many: bool = True
  mask_prompts: int | None = None
  gradient_accumulation_steps: int = 1
  ema_decay: float = 0.0
  lora_scale: float = 1.0
  frozen_parts: tuple[str, ...] = ()
  layering: Layering = PLAIN


def make_step(
  settings: StepSettings,
  optimizer: optax.GradientTransformation,
  schedule: Callable[[Array], Array],
  mesh: Mesh,
  state: TrainState,
  frozen: Flat,
  compiler_options: dict[str, Any] | None = None,
) -> Callable[[TrainState, Flat, Batch | ClipBatch], tuple[TrainState, Metrics]]:
  """Returns the jitted step: state, frozen parameters and batch to the next state and metrics.

  The state is donated and must not be used again. The metrics are `loss`, its terms, `grad_norm`
  before clipping, and `learning_rate` before the multipliers.

  Args:
    settings: static settings.
    optimizer: from `optimizer.make_optimizer`.
    schedule: from `optimizer.make_schedule`.
    mesh: from `sharding.make_mesh`; devices times microbatches must divide the batch size.
    state, frozen: arrays, or shapes.
    compiler_options: for `jax.jit`.
  """
  objective = functools.partial(_objective, settings=settings, shards=mesh.size)
  gradient = jax.value_and_grad(objective, has_aux=True)

  @standard_promotion
  def step(state: TrainState, frozen: Flat, batch: Batch | ClipBatch) -> tuple[TrainState, Metrics]:
    key = jax.random.fold_in(state.key, state.step)
    if settings.gradient_accumulation_steps == 1:
      (total, terms), gradients = gradient(state.trained, frozen, batch, key)
    else:
      total, terms, gradients = _accumulated(gradient, state.trained, frozen, batch, key, settings)
    updates, moments = optimizer.update(gradients, state.optimizer, state.trained)
    trained: Any = optax.apply_updates(state.trained, updates)
    metrics = {
      "loss": total,
      **terms,
      "grad_norm": optax.tree.norm(gradients),
      "learning_rate": schedule(state.step),
    }
    ema = update_ema(state.ema, trained, state.step, settings.ema_decay)
    return TrainState(state.step + 1, trained, moments, ema, state.key), metrics

  shardings = state_shardings(mesh, state)
  return jax.jit(
    step,
    in_shardings=(shardings, state_shardings(mesh, frozen), batch_sharding(mesh)),
    out_shardings=(shardings, None),
    donate_argnums=0,
    compiler_options=compiler_options,
  )


def _objective(
  trained: Flat,
  frozen: Flat,
  batch: Batch | ClipBatch,
  key: Key[Array, ""],
  *,
  settings: StepSettings,
  shards: int,
) -> tuple[Float[Array, ""], Metrics]:
  """The total loss of the objective, and its terms."""
  gather = settings.layering.gather
  parameters = model_parameters(trained, frozen, settings.lora_scale, gather)
  if isinstance(batch, ClipBatch):
    sums = sum_tracking_losses(parameters, batch, key, settings, shards)
    return tracking_loss(sums, settings.video)
  if settings.objective == "dense":
    maps, text = encode(parameters, batch, key, settings, shards)
    detector = Detector(settings.model, settings.dtype, True, settings.layering)
    key, options = jax.random.fold_in(key, 1), (settings.dense, settings.mask_prompts)
    return dense_loss(parameters, detector, maps, text, batch, key, *options)
  if settings.objective == "visual":
    return visual_loss(sum_visual_losses(parameters, batch, key, settings, shards), settings.visual)
  predictions = predict(parameters, batch, key, settings, shards)
  flat = flatten(batch)
  images, queries = len(batch.images), settings.model.queries
  return loss(predictions, queries, flat.targets, flat.prompt_valid, settings.losses, images)


def predict(
  parameters: Any, batch: Batch, key: Key[Array, ""], settings: StepSettings, shards: int = 1
) -> DetectorOutput:
  """Predictions for all prompts of a batch, ordered by image.

  Args:
    parameters: the model's parameter tree.
    batch: its number of images is a multiple of `shards`.
    key: of dropout; the random numbers depend on `shards`.
    settings: static settings.
    shards: number of independent parts of the batch, one per device.
  """
  detector = Detector(settings.model, settings.dtype, True, settings.layering)

  def predict_shard(batch: Batch, key: Array) -> DetectorOutput:
    encoding, decoding = jax.random.split(key)
    maps, text = _encode(parameters, batch, encoding, settings)
    apply: Any = functools.partial(
      detector.apply, {"params": parameters}, rngs={"dropout": decoding}
    )
    embedding, prompts = apply(maps, method=Detector.prepare), flat_prompts(batch, text)
    options = settings.one_to_many, settings.mask_prompts
    return apply(embedding, prompts, *options, method=Detector.detect_all_layers)

  found = _map_shards(predict_shard, batch, key, shards)
  if shards == 1:
    return found
  return DetectorOutput(
    *(_join(x, 1) for x in (found.logits, found.boxes, found.presence_logit)),
    *(_join(x, 0) for x in (found.mask_logits, found.semantic_logits, found.cell_logits)),
  )


def encode(
  parameters: Any, batch: Batch, key: Key[Array, ""], settings: StepSettings, shards: int = 1
) -> tuple[ImageMaps, TextEmbedding]:
  """Encodes the images and phrases of a batch; arguments as for `predict`."""

  def encode_shard(batch: Batch, key: Array) -> tuple[ImageMaps, TextEmbedding]:
    return _encode(parameters, batch, key, settings)

  found = _map_shards(encode_shard, batch, key, shards)
  return found if shards == 1 else jax.tree.map(lambda x: _join(x, 0), found)


def sum_visual_losses(
  parameters: Any, batch: Batch, key: Key[Array, ""], settings: StepSettings, shards: int = 1
) -> Metrics:
  """`visual_sums` over a batch; arguments as for `predict`. The trunk runs without dropout."""
  detector = Detector(settings.model, settings.dtype)
  head = VisualHead(settings.model, settings.dtype)

  def sum_shard(batch: Batch, key: Array) -> Metrics:
    images = normalize(batch.images)
    features: Any = detector.apply({"params": parameters}, images, method=_trunk)
    own, remat = parameters[VISUAL], settings.layering.remat
    return visual_sums(own, head, features, batch.targets, key, settings.visual, remat)

  found = _map_shards(sum_shard, batch, key, shards)
  return found if shards == 1 else jax.tree.map(lambda x: x.sum(axis=0), found)


def sum_tracking_losses(
  parameters: Any, clips: ClipBatch, key: Key[Array, ""], settings: StepSettings, shards: int = 1
) -> Metrics:
  """`tracking_sums` over a batch; arguments as for `predict`."""
  functions, tracker = VideoFunctions(settings.model, settings.dtype), video_config(settings.model)

  def sum_shard(clips: ClipBatch, key: Array) -> Metrics:
    return tracking_sums(parameters, functions, tracker, clips, key, settings.layering.remat)

  found = _map_shards(sum_shard, clips, key, shards)
  return found if shards == 1 else jax.tree.map(lambda x: x.sum(axis=0), found)


def _trunk(detector: Detector, images: Float[Array, "B Hi Wi 3"]) -> Float[Array, "B H W C"]:
  return detector.trunk(images)


def _encode(parameters: Any, batch: Batch, key: Array, settings: StepSettings) -> Any:
  def apply(part: str, method: Callable[..., Any], *args: Any, key: Array) -> Any:
    train = part not in settings.frozen_parts
    detector = Detector(settings.model, settings.dtype, train, settings.layering)
    return detector.apply({"params": parameters}, *args, method=method, rngs={"dropout": key})

  keys = jax.random.split(key)
  images, tokens = normalize(batch.images), batch.tokens.reshape(-1, batch.tokens.shape[-1])
  maps = apply("trunk", Detector.map_image, images, batch.sizes, key=keys[0])
  return maps, apply("text", Detector.encode_text, tokens, key=keys[1])


def _map_shards(
  function: Callable[..., Any], batch: Batch | ClipBatch, key: Array, shards: int
) -> Any:
  """Maps a function over the shards of a batch; with several, results have a new first axis."""
  if shards == 1:
    return function(batch, key)
  parts = jax.tree.map(lambda x: x.reshape(shards, -1, *x.shape[1:]), batch)
  return jax.vmap(function, spmd_axis_name=AXES)(parts, jax.random.split(key, shards))


def _join(x: Array, axis: int) -> Array:
  """Concatenates the shards, which are along the first axis, along their `axis`."""
  x = jnp.moveaxis(x, 0, axis)
  return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _accumulated(
  gradient: Callable[..., Any],
  trained: Flat,
  frozen: Flat,
  batch: Batch | ClipBatch,
  key: Key[Array, ""],
  settings: StepSettings,
) -> tuple[Float[Array, ""], Metrics, Flat]:
  """Averages over microbatches, one after another.

  A microbatch takes every n-th image or clip, so each device has its part of each microbatch.
  """
  count = settings.gradient_accumulation_steps

  def split(x: Array) -> Array:
    return x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)

  def one(microbatch: tuple[Array, Batch | ClipBatch]) -> Any:
    number, batch = microbatch
    (total, terms), gradients = gradient(trained, frozen, batch, jax.random.fold_in(key, number))
    terms = {name: value.astype(jnp.float32) for name, value in terms.items()}  # some are counts
    return total, terms, gradients

  def add(sums: Any, microbatch: tuple[Array, Batch | ClipBatch]) -> tuple[Any, None]:
    return jax.tree.map(jnp.add, sums, one(microbatch)), None

  microbatches = jnp.arange(count), jax.tree.map(split, batch)
  shapes = jax.eval_shape(one, jax.tree.map(lambda x: x[0], microbatches))
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  sums, _ = jax.lax.scan(add, zeros, microbatches)
  return jax.tree.map(lambda x: x / count, sums)
