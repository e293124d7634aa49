"""What a training step reads and writes, and which parameters it changes.

Parameters are flat dictionaries by path. Those that are trained are kept apart from the frozen, so
that gradients, moments and averages exist of them only.
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
  """All that changes from step to step.

  Attributes:
    step: how many steps are done.
    trained: the trained parameters, `lora_a` and `lora_b` among them, float32.
    optimizer: moments and counts.
    average: of the trained parameters, exponential; empty if there is none.
    key: of dropout; each step folds its number in.
  """

  step: Int[Array, ""]
  trained: Flat
  optimizer: Any
  average: Flat
  key: Key[Array, ""]


def create(
  trained: Mapping[str, Array],
  optimizer: optax.GradientTransformation,
  key: Array,
  *,
  average: bool,
) -> TrainState:
  """The state before the first step, made of copies: a step consumes the state that it is given."""
  copies = {path: jnp.array(x, jnp.float32, copy=True) for path, x in trained.items()}
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    trained=copies,
    optimizer=optimizer.init(copies),
    average={path: jnp.array(x, copy=True) for path, x in copies.items()} if average else {},
    key=jax.random.clone(key),
  )


def split(
  parameters: Mapping[str, Any], pattern: str, *, some: bool = True
) -> tuple[dict[str, Any], dict[str, Any]]:
  """The parameters to train, whose whole paths match, and the frozen ones.

  Raises:
    ValueError: none match, unless `some` is False.
  """
  check_pattern(pattern, "train")
  trained = {path: x for path, x in parameters.items() if re.fullmatch(pattern, path)}
  if some and not trained:
    raise ValueError(
      f"train {pattern!r} matches no parameter; patterns are of whole paths such as "
      "decoder/norm/scale. Use .* for all."
    )
  return trained, {path: x for path, x in parameters.items() if path not in trained}


def model_parameters(
  trained: Mapping[str, Array],
  frozen: Mapping[str, Array],
  lora_scale: float,
  gather: Callable[[Any], Any] | None = None,
) -> dict[str, Any]:
  """The tree that the model's modules take: all together, low-rank products added, and `gather`
  applied to what is not of stacked layers."""
  merged = lora.merge({**frozen, **trained}, lora_scale)
  if gather is not None:
    merged |= gather({path: x for path, x in merged.items() if not stacked_axes(path)})
  return nest(merged)


def averaged(state: TrainState) -> Flat:
  """The trained parameters to use after training: their average, if there is one."""
  return state.average or state.trained


def move_average(average: Flat, trained: Flat, step: Array, decay: float) -> Flat:
  """One step of the exponential average, whose memory grows to `decay` (as TensorFlow's has it), so
  that the start is soon forgotten."""
  kept = jnp.minimum(decay, (1 + step) / (10 + step))
  return {path: kept * x + (1 - kept) * trained[path] for path, x in average.items()}
