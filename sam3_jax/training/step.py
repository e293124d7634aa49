"""One step of training, a pure function for jit: predictions, losses, gradients, new state.

The model is mapped over the devices' shares of a batch (`vmap`), so that no index, sort or loop in
it reaches over images of other devices and the partitioner has no reason to gather activations.
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

from sam3_jax.checkpoint.bundle import VISUAL
from sam3_jax.config import Config
from sam3_jax.inputs.preprocess import normalize
from sam3_jax.model.layers import PLAIN, Layering
from sam3_jax.model.sam3 import Detector
from sam3_jax.model.visual.head import VisualHead
from sam3_jax.training.batch import Batch, flat_prompts, flatten, standard_promotion
from sam3_jax.training.dense_pretraining import DenseConfig, dense_loss
from sam3_jax.training.losses import LossConfig, loss
from sam3_jax.training.sharding import AXES, by_rows, state_shardings
from sam3_jax.training.state import Flat, TrainState, model_parameters, move_average
from sam3_jax.training.visual import VisualConfig, visual_loss, visual_sums
from sam3_jax.types import DetectorOutput, ImageMaps, TextEmbedding

Metrics = dict[str, Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepSettings:
  """What a step is compiled for.

  Attributes:
    model: sizes.
    losses: weights, of detection.
    dense: weights, of the objective "dense".
    visual: what is asked, and weights, of the objective "visual".
    objective: "detection", "dense" for the pretraining of `dense`, or "visual" for the head for
      visual prompts.
    dtype: of the computation; parameters, their sums and their moments are float32.
    duplicate: train one-to-many queries beside the model's own.
    masked: masks are made for the first so many prompts of an image; None for all.
    accumulate: microbatches a step. The losses of each have their own normalisers (objects,
      prompts), and the microbatches count alike.
    average: decay of the parameters' exponential average; 0 for none.
    lora_scale: on low-rank products.
    frozen_parts: parts of the model without dropout and stochastic depth: those of which nothing is
      trained.
    layering: how layers run; `gather` is applied to all other parameters too.
  """

  model: Config
  losses: LossConfig
  dense: DenseConfig = dataclasses.field(default_factory=DenseConfig)
  visual: VisualConfig = dataclasses.field(default_factory=VisualConfig)
  objective: str = "detection"
  dtype: DTypeLike = jnp.float32
  duplicate: bool = True
  masked: int | None = None
  accumulate: int = 1
  average: float = 0.0
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
) -> Callable[[TrainState, Flat, Batch], tuple[TrainState, Metrics]]:
  """The jitted step: state, frozen parameters and a batch to the next state and scalars to log.

  The state is donated: it must not be used again. `metrics` has `loss`, its terms, `grad_norm`
  before clipping, and `learning_rate` before the factors of the parts.

  Args:
    settings: what the step does.
    optimizer: of `optimizer.make_optimizer`.
    schedule: of `optimizer.make_schedule`.
    mesh: of `sharding.make_mesh`; the batch must be a multiple of devices times microbatches.
    state, frozen: arrays, or shapes.
    compiler_options: of `jax.jit`.
  """
  shards = mesh.size

  def objective(trained: Flat, frozen: Flat, batch: Batch, key: Array):
    gather = settings.layering.gather
    parameters = model_parameters(trained, frozen, settings.lora_scale, gather)
    if settings.objective == "dense":
      maps, text = encode(parameters, batch, key, settings, shards)
      detector = Detector(settings.model, settings.dtype, True, settings.layering)
      key, asked = jax.random.fold_in(key, 1), (settings.dense, settings.masked)
      return dense_loss(parameters, detector, maps, text, batch, key, *asked)
    if settings.objective == "visual":
      return visual_loss(ask_visually(parameters, batch, key, settings, shards), settings.visual)
    predictions = predict(parameters, batch, key, settings, shards)
    flat = flatten(batch)
    images, queries = len(batch.images), settings.model.queries
    return loss(predictions, queries, flat.targets, flat.prompt_valid, settings.losses, images)

  gradient = jax.value_and_grad(objective, has_aux=True)

  @standard_promotion
  def step(state: TrainState, frozen: Flat, batch: Batch) -> tuple[TrainState, Metrics]:
    key = jax.random.fold_in(state.key, state.step)
    if settings.accumulate == 1:
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
    average = move_average(state.average, trained, state.step, settings.average)
    following = TrainState(state.step + 1, trained, moments, average, state.key)
    return following, metrics

  placed, kept = state_shardings(mesh, state), state_shardings(mesh, frozen)
  return jax.jit(
    step,
    in_shardings=(placed, kept, by_rows(mesh)),
    out_shardings=(placed, None),
    donate_argnums=0,
    compiler_options=compiler_options,
  )


def predict(
  parameters: Any, batch: Batch, key: Key[Array, ""], settings: StepSettings, shards: int = 1
) -> DetectorOutput:
  """Predictions for all prompts of a batch, image by image.

  Args:
    parameters: the model's tree.
    batch: of a multiple of `shards` images.
    key: of dropout; with more shards the numbers drawn are others.
    settings: see there.
    shards: shares of the batch that know nothing of each other.
  """
  detector = Detector(settings.model, settings.dtype, True, settings.layering)

  def share(batch: Batch, key: Array) -> DetectorOutput:
    encoding, decoding = jax.random.split(key)
    maps, text = _encode(parameters, batch, encoding, settings)
    apply: Any = functools.partial(
      detector.apply, {"params": parameters}, rngs={"dropout": decoding}
    )
    embedding, prompts = apply(maps, method=Detector.prepare), flat_prompts(batch, text)
    return apply(
      embedding, prompts, settings.duplicate, settings.masked, method=Detector.detect_all_layers
    )

  found = _by_share(share, batch, key, shards)
  if shards == 1:
    return found
  return DetectorOutput(
    *(_joined(x, 1) for x in (found.logits, found.boxes, found.presence_logit)),
    *(_joined(x, 0) for x in (found.mask_logits, found.semantic_logits, found.cell_logits)),
  )


def encode(
  parameters: Any, batch: Batch, key: Key[Array, ""], settings: StepSettings, shards: int = 1
) -> tuple[ImageMaps, TextEmbedding]:
  """Maps of a batch's images, and all its phrases encoded; arguments as of `predict`."""

  def share(batch: Batch, key: Array) -> tuple[ImageMaps, TextEmbedding]:
    return _encode(parameters, batch, key, settings)

  found = _by_share(share, batch, key, shards)
  return found if shards == 1 else jax.tree.map(lambda x: _joined(x, 0), found)


def ask_visually(
  parameters: Any, batch: Batch, key: Key[Array, ""], settings: StepSettings, shards: int = 1
) -> Metrics:
  """Sums of `visual_sums` over a batch; arguments as of `predict`. The trunk runs once an image,
  without noise."""
  detector = Detector(settings.model, settings.dtype)
  head = VisualHead(settings.model, settings.dtype)

  def share(batch: Batch, key: Array) -> Metrics:
    images = normalize(batch.images)
    features: Any = detector.apply({"params": parameters}, images, method=_trunk)
    own, remat = parameters[VISUAL], settings.layering.remat
    return visual_sums(own, head, features, batch.targets, key, settings.visual, remat)

  found = _by_share(share, batch, key, shards)
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


def _by_share(share: Callable[..., Any], batch: Batch, key: Array, shards: int) -> Any:
  """What `share` makes of each device's images, along a new first axis if there are several."""
  if shards == 1:
    return share(batch, key)
  shares = jax.tree.map(lambda x: x.reshape(shards, -1, *x.shape[1:]), batch)
  return jax.vmap(share, spmd_axis_name=AXES)(shares, jax.random.split(key, shards))


def _joined(x: Array, axis: int) -> Array:
  """The shares' rows, which are along `axis` of each, one after another."""
  x = jnp.moveaxis(x, 0, axis)
  return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _accumulated(
  gradient: Callable[..., Any],
  trained: Flat,
  frozen: Flat,
  batch: Batch,
  key: Key[Array, ""],
  settings: StepSettings,
) -> tuple[Float[Array, ""], Metrics, Flat]:
  """Means over microbatches, one after another. A microbatch takes every n-th image, so that each
  device finds its share among its own."""
  count = settings.accumulate

  def cut(x: Array) -> Array:
    return x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)

  def one(part: tuple[Array, Batch]) -> Any:
    number, batch = part
    (total, terms), gradients = gradient(trained, frozen, batch, jax.random.fold_in(key, number))
    terms = {name: value.astype(jnp.float32) for name, value in terms.items()}  # some are counts
    return total, terms, gradients

  def add(sums: Any, part: tuple[Array, Batch]) -> tuple[Any, None]:
    return jax.tree.map(jnp.add, sums, one(part)), None

  parts = jnp.arange(count), jax.tree.map(cut, batch)
  shapes = jax.eval_shape(one, jax.tree.map(lambda x: x[0], parts))
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  sums, _ = jax.lax.scan(add, zeros, parts)
  return jax.tree.map(lambda x: x / count, sums)
