"""The model being trained, on its devices: steps, evaluations, and bundles of its parameters."""

import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.typing import DTypeLike

from sam3_jax.checkpoint.bundle import save
from sam3_jax.checkpoint.parameters import VIDEO, VISUAL, check_dtype
from sam3_jax.config import Config
from sam3_jax.inference.predictor import Sam3, default_dtype
from sam3_jax.inputs.tokenizer import Tokenizer
from sam3_jax.model.layers import Layering
from sam3_jax.training import lora, state
from sam3_jax.training.batch import Batch
from sam3_jax.training.config import TrainConfig
from sam3_jax.training.optimizer import make_optimizer, make_schedule
from sam3_jax.training.run_directory import is_writer, replace_directory
from sam3_jax.training.sharding import (
  gatherer,
  make_mesh,
  put_batch,
  put_state,
  replicated,
  state_shardings,
)
from sam3_jax.training.start import Start
from sam3_jax.training.step import StepSettings, make_step
from sam3_jax.training.video_examples import ClipBatch

# By objective: the part of the model that it trains, and what that is.
TRAINED_PARTS = {"visual": (VISUAL, "the head for visual prompts"), "video": (VIDEO, "the tracker")}
ENCODERS = ("trunk", "text")  # parts without dropout while none of their parameters is trained

Evaluate = Callable[[Sam3], Mapping[str, Any]]


class Trainer:
  """The model being trained.

  Attributes:
    state: the training state, on the devices.
    frozen: the frozen parameters, on the devices.
  """

  def __init__(self, config: TrainConfig, start: Start):
    """Puts the parameters on the devices, and makes the step.

    Raises:
      ValueError: the devices cannot divide a batch, or nothing matches the trainable parameters.
    """
    self._config, self._start = config, start
    self._mesh = make_mesh(fsdp=config.fsdp)
    platform = self._mesh.devices.flat[0].platform
    dtype = default_dtype(platform) if config.dtype == "auto" else config.dtype
    _check_batch(config, self._mesh.size)
    initial, _ = jax.random.split(jax.random.key(config.seed))
    trained, frozen = state.split(
      start.parameters, config.trainable_pattern, allow_none=config.lora.rank > 0
    )
    trained |= lora.adapt(start.parameters, config.lora, initial)
    if config.objective in TRAINED_PARTS:
      _check_part(trained, *TRAINED_PARTS[config.objective])
    optimizer = make_optimizer(config.optimizer, trained, start.model.trunk, config.steps)
    self.frozen = put_state(self._mesh, frozen)

    def begin(trained: state.Flat) -> state.TrainState:
      _, dropout = jax.random.split(jax.random.key(config.seed))
      return state.create(trained, optimizer, dropout, ema=config.ema_decay > 0)

    # Jitted, because the full state may not fit on one device.
    shardings = state_shardings(self._mesh, jax.eval_shape(begin, trained))
    self.state = jax.jit(begin, out_shardings=shardings)(put_state(self._mesh, trained))
    computed = check_dtype(dtype)
    layering = Layering(config.remat == "full", gatherer(self._mesh, computed))
    settings = _step_settings(config, start.model, computed, layering, trained)
    schedule = make_schedule(config.optimizer, config.steps)
    self._step = make_step(settings, optimizer, schedule, self._mesh, self.state, self.frozen)
    self._merge = jax.jit(
      functools.partial(state.model_parameters, lora_scale=config.lora.scale),
      out_shardings=replicated(self._mesh),
    )
    self._model: Sam3 | None = None
    self._dtype = dtype

  def step(self, batch: Batch | ClipBatch) -> dict[str, jax.Array]:
    """Trains on a batch, asynchronously; returns the metrics."""
    self.state, metrics = self._step(self.state, self.frozen, put_batch(self._mesh, batch))
    return metrics

  def evaluate(self, evaluate: Evaluate) -> Mapping[str, Any]:
    """Evaluates the current model on this process's first device; its programs are compiled
    once."""
    if self._model is None:
      start, context = self._start, self._start.model.text.context
      tokenizer = Tokenizer(start.tokenizer, context=context)
      self._model = Sam3(start.model, {}, tokenizer, info=start.info, dtype=self._dtype)
    merged = self._merge(state.averaged(self.state), self.frozen)
    self._model.params = jax.tree.map(lambda x: x.addressable_data(0), merged)
    # Embeddings do not outlive the evaluation, so a digest of all parameters is not needed.
    self._model.identity = f"step {int(self.state.step.addressable_data(0))} of this training"
    metrics = evaluate(self._model)
    self._model.params = {}  # frees the copy
    return metrics

  def write(self, path: Path, name: str, done: int, metrics: Mapping[str, float]) -> None:
    """Writes a bundle of the current model, replacing another one. Returns when it is there, in all
    processes.

    Args:
      path: the bundle.
      name: the new checkpoint's name, if the configuration has none.
      done: number of completed steps.
      metrics: of the latest evaluation.
    """
    config, start = self._config, self._start
    parameters = self._merge(state.averaged(self.state), self.frozen)
    if is_writer():
      parameters = {**parameters, **start.untrained}
      stored = jax.tree.map(lambda x: np.asarray(x).astype(config.save_dtype), parameters)
      source = f"{start.info.get('name', config.checkpoint)}" if config.checkpoint else "random"
      info = {
        **start.info,
        "name": config.name or name,
        "trained": True,
        "source": f"{done} steps of sam3-jax train from {source} parameters",
        "licence": config.licence or start.info.get("licence", ""),
        "figures": {**self._kept_metrics(), **metrics},
      }
      options = {"info": info, "unread": start.unread}
      replace_directory(
        path, lambda new: save(new, stored, start.model, start.tokenizer, **options)
      )
    multihost_utils.sync_global_devices(str(path))

  def _kept_metrics(self) -> Mapping[str, float]:
    """The starting checkpoint's metrics that are still valid: those of the rest of the model, if
    only the head for visual prompts or the tracker was trained."""
    if self._config.objective not in TRAINED_PARTS:
      return {}
    return self._start.info.get("figures", {})


def _check_batch(config: TrainConfig, devices: int) -> None:
  parts = devices * config.gradient_accumulation_steps
  if config.batch_size % parts:
    table = "clips" if config.clips else "data"
    raise ValueError(
      f"{table}.batch_size {config.batch_size} must be a multiple of {parts}, for {devices} "
      f"devices and {config.gradient_accumulation_steps} microbatches."
    )


def _check_part(trained: Iterable[str], part: str, what: str) -> None:
  for path in trained:
    if not path.startswith(f"{part}/"):
      raise ValueError(
        f"trainable matches {path}, but the objective {part} trains only {what}: use a pattern "
        f"that starts with {part}/, or remove trainable for all of it."
      )


def _step_settings(
  config: TrainConfig,
  model: Config,
  dtype: DTypeLike,
  layering: Layering,
  trained: Iterable[str],
) -> StepSettings:
  """The settings of a step; `trained` are paths."""
  paths = tuple(trained)
  return StepSettings(
    model=model,
    losses=config.losses,
    dense=config.dense,
    visual=config.visual,
    video=config.video,
    objective=config.objective,
    dtype=dtype,
    one_to_many=config.one_to_many,
    mask_prompts=config.mask_prompts or config.data.present_prompts,
    gradient_accumulation_steps=config.gradient_accumulation_steps,
    ema_decay=config.ema_decay,
    lora_scale=config.lora.scale,
    layering=layering,
    frozen_parts=tuple(p for p in ENCODERS if not any(x.startswith(f"{p}/") for x in paths)),
  )
