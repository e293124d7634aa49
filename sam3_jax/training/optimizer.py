"""The optimizer: AdamW or Muon with a learning rate for each part of the model, layer decay, weight
decay rules, and learning rate schedules.

Parameters are a flat dictionary by path, `a/b/c`. The rules follow Meta's SAM 3, directory
`sam3/train` (`optim/optimizer.py`, `optim/schedulers.py`, the fine-tuning configurations).
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from sam3_jax.config import TrunkConfig
from sam3_jax.utils.validation import check_numbers, check_pattern

OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("inverse_sqrt", "cosine", "constant")

# Number of leading axes that stack layers, by path; 0 for all other paths.
STACKED = (
  (r"trunk/groups/windowed/", 2),
  (r"trunk/groups/global/", 1),
  (r"(text/blocks|(geometry|fusion|decoder)/layers|visual/decoder/mask_mlp)/", 1),
  (r"video/(memory_attention/layers|memory_encoder/blocks)/", 1),
)
GROUP_NORM = r"masks/norm\d+/"  # every other norm is a LayerNorm
# Transposed convolutions [2, 2, in, out]: every output cell has one input cell.
UPSAMPLING = r"((visual/)?neck/level\d+|visual/decoder)/up\d+/kernel"
# Input and output projections. Muon is for the hidden layers between them.
INPUTS_OUTPUTS = (
  r"trunk/patch_embed/|.*semantic_project/|.*(point|box)_project/|decoder/box_bias/|.*_head/fc3/"
  r"|visual/prompt/mask/|video/memory_encoder/mask/|video/mask_downsample/|.*/depthwise/"
  r"|text/(first|last)/(mix|feed)/"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
  """The optimizer; the defaults are Meta's for fine-tuning the released model."""

  # "adamw"; or "muon" for Muon on the kernels of hidden layers and AdamW on everything else, at the
  # same learning rate.
  name: str = "adamw"
  # Peak learning rate, before `learning_rate_multipliers` and `layer_decay`. Meta: 0.1 * 8e-4.
  learning_rate: float = 8e-5
  # Pairs of a regular expression for the full path of a parameter and a factor on its learning
  # rate. The first match counts; parameters without a match have factor 1.
  learning_rate_multipliers: tuple[tuple[str, float], ...] = (
    (r"(trunk|neck)/.*", 0.3125),  # 2.5e-4 / 8e-4
    (r"text/.*", 0.0625),  # 5e-5 / 8e-4
  )
  # Factor on the learning rate for each block of the trunk, counted from its output; 1 for none.
  layer_decay: float = 0.9
  # Decoupled weight decay; biases and the scales of LayerNorms are not decayed.
  weight_decay: float = 0.1
  # Maximum global L2 norm of the gradients, which are scaled down to it; 0 for no clipping.
  max_grad_norm: float = 0.1
  # Decay of Adam's first moment.
  beta1: float = 0.9
  # Decay of Adam's second moment.
  beta2: float = 0.999
  # Added to the denominator of Adam's update.
  epsilon: float = 1e-8
  # "inverse_sqrt", "cosine" or "constant", after the warmup.
  schedule: str = "inverse_sqrt"
  # Steps over which the learning rate rises linearly from 0.
  warmup_steps: int = 20
  # Time scale of the schedule "inverse_sqrt", in steps.
  timescale: int = 20
  # Last steps, over which the learning rate falls linearly to 0; not for "cosine".
  cooldown_steps: int = 20
  # Final learning rate of the schedule "cosine", as a fraction of `learning_rate`.
  min_learning_rate_ratio: float = 0.0

  def __post_init__(self):
    for value, known, field in (
      (self.name, OPTIMIZERS, "name"),
      (self.schedule, SCHEDULES, "schedule"),
    ):
      if value not in known:
        raise ValueError(f"optimizer.{field} must be one of {', '.join(known)}; got {value!r}.")
    check = functools.partial(check_numbers, self, "optimizer")
    check(("learning_rate", "weight_decay", "max_grad_norm", "min_learning_rate_ratio"), 0)
    check(("warmup_steps", "cooldown_steps"), 0)
    check(("beta1", "beta2"), 0, 1, "[)")
    check(("epsilon",), 0, ends="(]")
    check(("layer_decay",), 0, 1, "(]")
    check(("timescale",), 1)
    for pattern, factor in self.learning_rate_multipliers:
      check_pattern(pattern, "optimizer.learning_rate_multipliers")
      if not 0 <= factor < math.inf:
        raise ValueError(
          f"optimizer.learning_rate_multipliers: the factor of {pattern!r} must be finite and not "
          f"negative; got {factor}."
        )


def make_optimizer(
  config: OptimizerConfig, parameters: Mapping[str, Any], trunk: TrunkConfig, steps: int
) -> optax.GradientTransformation:
  """Returns the transformation of gradients to updates.

  With "adamw" a step equals one of `torch.optim.AdamW` after `clip_grad_norm_`, with parameter
  groups of these learning rates and weight decays, up to the 1e-6 that PyTorch adds to the norm.
  "muon" scales its updates to the size of Adam's (Liu et al. 2025, arXiv:2502.16982), so learning
  rates and weight decays carry over.

  Args:
    config: the optimizer's settings.
    parameters: trainable parameters by path: arrays, or shapes.
    trunk: has the number of blocks, for the layer decay.
    steps: of the whole training.
  """
  factors = {
    path: learning_rate_factor(path, parameter.ndim, config, trunk)
    for path, parameter in parameters.items()
  }
  moments = optax.scale_by_adam(config.beta1, config.beta2, config.epsilon)
  if config.name == "muon":
    hidden = {path: array.shape for path, array in parameters.items() if _is_hidden(path)}
    labels = {path: "muon" if path in hidden else "adam" for path in parameters}
    moments = optax.partition({"muon": _muon(hidden, parameters), "adam": moments}, labels)
  return optax.chain(
    optax.clip_by_global_norm(config.max_grad_norm) if config.max_grad_norm else optax.identity(),
    moments,
    optax.add_decayed_weights(
      config.weight_decay, mask={path: is_decayed(path) for path in parameters}
    ),
    _scale_by(factors),
    optax.scale_by_learning_rate(make_schedule(config, steps)),
  )


def make_schedule(config: OptimizerConfig, steps: int) -> Callable[[ArrayLike], Array]:
  """Returns the learning rate as a function of the step, 0 .. steps - 1, before the multipliers.

  Warmup, schedule and cooldown are multiplied, so they may overlap in a short run; Optax joins
  schedules one after another, and has no inverse square root.
  """
  base, warmup = config.learning_rate, config.warmup_steps
  cooldown, end = config.cooldown_steps, config.min_learning_rate_ratio

  def schedule(step: ArrayLike) -> Array:
    step = jnp.asarray(step, jnp.float32)
    rate = base * jnp.minimum(1.0, step / warmup) if warmup else jnp.full((), base, jnp.float32)
    if config.schedule == "cosine":
      done = jnp.clip((step - warmup) / max(1, steps - warmup), 0, 1)
      return rate * (end + (1 - end) * (1 + jnp.cos(jnp.pi * done)) / 2)
    if config.schedule == "inverse_sqrt":
      age = (step + config.timescale - warmup) / config.timescale
      rate = jnp.where(step > warmup, rate / jnp.sqrt(jnp.maximum(age, 1)), rate)
    if cooldown:
      rate = rate * jnp.clip((steps - step) / cooldown, 0, 1)
    return rate

  return schedule


def learning_rate_factor(
  path: str, ndim: int, config: OptimizerConfig, trunk: TrunkConfig
) -> np.ndarray:
  """The factor on a parameter's learning rate: a number, or for stacked blocks of the trunk an
  array that broadcasts over them."""
  multiplier = next(
    (factor for regex, factor in config.learning_rate_multipliers if re.fullmatch(regex, path)), 1.0
  )
  decays = path.startswith("trunk/") and path != "trunk/position"  # Meta's override for positions
  distance = trunk.blocks + 1 - _trunk_depth(path, trunk) if decays else np.zeros(())
  factor = np.asarray(multiplier * config.layer_decay**distance, np.float32)
  return factor.reshape(factor.shape + (1,) * (ndim - factor.ndim)) if factor.ndim else factor


def _trunk_depth(path: str, trunk: TrunkConfig) -> np.ndarray:
  """The depth of a parameter in the trunk: 0 before the first block, i + 1 in block i."""
  depths = 1 + np.arange(trunk.blocks).reshape(trunk.groups, trunk.windowed + 1)
  if path.startswith("trunk/groups/windowed/"):
    return depths[:, :-1]
  return depths[:, -1] if path.startswith("trunk/groups/global/") else np.zeros(())


def is_decayed(path: str) -> bool:
  """Whether weight decay applies to a parameter.

  Biases, scales and statistics are not decayed, except for the scales of GroupNorms. Embeddings and
  learned tokens are decayed.
  """
  leaf = path.rpartition("/")[2]
  excluded = leaf in ("bias", "mean", "variance") or leaf.endswith("scale")
  return not excluded or (leaf == "scale" and re.match(GROUP_NORM, path) is not None)


def stacked_axes(path: str) -> int:
  """The number of leading axes of a parameter that stack layers."""
  return next((axes for pattern, axes in STACKED if re.match(pattern, path)), 0)


def _is_hidden(path: str) -> bool:
  return path.endswith("/kernel") and re.match(INPUTS_OUTPUTS, path) is None


def _muon(
  hidden: Mapping[str, tuple[int, ...]], parameters: Mapping[str, Any]
) -> optax.GradientTransformation:
  """Muon for the `hidden` kernels, given their shapes; the other parameters are masked."""
  masked = dict.fromkeys(parameters, optax.transforms.MaskedNode())
  axes = {path: _kernel_axes(path, len(shape)) for path, shape in hidden.items()}
  sides = {
    path: [math.prod(shape[axis] for axis in side) for side in axes[path]]
    for path, shape in hidden.items()
  }
  factors = {path: 0.2 * math.sqrt(max(lengths)) for path, lengths in sides.items()}
  dimensions: Any = masked | {path: MuonDimensionNumbers(*both) for path, both in axes.items()}
  orthogonal = scale_by_muon(weight_dimension_numbers=lambda _: dimensions)
  return optax.chain(orthogonal, _scale_by(factors))


def _kernel_axes(path: str, ndim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """The input axes and the output axes of a kernel; its other axes stack layers."""
  axes = tuple(range(stacked_axes(path), ndim))
  if re.fullmatch(UPSAMPLING, path):
    return axes[2:3], (*axes[:2], axes[3])
  return axes[:-1], axes[-1:]


def _scale_by(factors: Mapping[str, Any]) -> optax.GradientTransformation:
  """Multiplies each update by its factor; updates without one are unchanged."""

  def scale(updates: Any, _: Any) -> Any:
    return {path: x * factors[path] if path in factors else x for path, x in updates.items()}

  return optax.stateless(scale)
