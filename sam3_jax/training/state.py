"""The state of training, and the split of parameters into trainable and frozen ones.

Parameters are flat dictionaries by path. Only trainable parameters have gradients, moments and a
moving average.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Int, Key

from sam3_jax.training import lora
from sam3_jax.training.optimizer import stacked_axes
from sam3_jax.utils.param_tree import nest
from sam3_jax.utils.validation import check_pattern

Flat = dict[str, Array]


@struct.dataclass
class TrainState:
  """Everything that a training step changes.

  Attributes:
    step: number of completed steps.
    trained: the trainable parameters, including `lora_a` and `lora_b`, float32.
    optimizer: state of the optimizer.
    ema: exponential moving average of `trained`; empty if there is none.
    key: of dropout; each step folds in its number.
  """

  step: Int[Array, ""]
  trained: Flat
  optimizer: Any
  ema: Flat
  key: Key[Array, ""]


def create(
  trained: Mapping[str, Array],
  optimizer: optax.GradientTransformation,
  key: Array,
  *,
  ema: bool,
) -> TrainState:
  """Makes the state before the first step. It holds copies, because a step donates its state."""
  copies = {path: jnp.array(x, jnp.float32, copy=True) for path, x in trained.items()}
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    trained=copies,
    optimizer=optimizer.init(copies),
    ema={path: jnp.array(x, copy=True) for path, x in copies.items()} if ema else {},
    key=jax.random.clone(key),
  )


def split(
  parameters: Mapping[str, Any], pattern: str, *, allow_none: bool = False
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Splits parameters into trainable ones, whose full paths match a pattern, and frozen ones.

  Raises:
    ValueError: none match, unless `allow_none`.
  """
  check_pattern(pattern, "trainable")
  trained = {path: x for path, x in parameters.items() if re.fullmatch(pattern, path)}
  if not trained and not allow_none:
    raise ValueError(
      f"trainable {pattern!r} matches no parameter; it must match full paths such as "
      "decoder/norm/scale. Use .* for all parameters."
    )
  return trained, {path: x for path, x in parameters.items() if path not in trained}


def model_parameters(
  trained: Mapping[str, Array],
  frozen: Mapping[str, Array],
  lora_scale: float,
  gather: Callable[[Any], Any] | None = None,
) -> dict[str, Any]:
  """Returns the model's parameter tree, with low-rank products merged.

  `gather` is applied to the parameters that are not in stacked layers.
  """
  merged = lora.merge({**frozen, **trained}, lora_scale)
  if gather is not None:
    merged |= gather({path: x for path, x in merged.items() if not stacked_axes(path)})
  return nest(merged)


def averaged(state: TrainState) -> Flat:
  """The parameters to evaluate and save: the moving average, if there is one."""
  return state.ema or state.trained


def update_ema(ema: Flat, trained: Flat, step: Array, decay: float) -> Flat:
  """Updates the exponential moving average.

  The decay rises from 0.1 to `decay`, as in TensorFlow, so the average soon forgets the start.
  """
  decay_now = jnp.minimum(decay, (1 + step) / (10 + step))
  return {path: decay_now * x + (1 - decay_now) * trained[path] for path, x in ema.items()}
