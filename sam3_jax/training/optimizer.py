"""The optimizer: AdamW or Muon with a learning rate for each part, layer decay and weight-decay
rules, and the schedules.

Parameters come as a flat dictionary by path, `a/b/c`. Source of the rules: Meta's SAM 3, folder
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

# Leading axes along which layers are stacked, by path; none elsewhere.
STACKED = (
  (r"trunk/groups/windowed/", 2),
  (r"trunk/groups/global/", 1),
  (r"(text/blocks|(geometry|fusion|decoder)/layers|visual/decoder/mask_mlp)/", 1),
)
GROUP_NORM = r"masks/norm\d+/"  # every other norm is a LayerNorm
# [2, 2, in, out]: every output cell has one input cell.
DOUBLE = r"((visual/)?neck/level\d+|visual/decoder)/up\d+/kernel"
# What turns inputs into features or features into outputs: Muon is for what lies between.
ENDS = (
  r"trunk/patch_embed/|.*semantic_project/|.*(point|box)_project/|decoder/box_bias/|.*_head/fc3/"
  r"|visual/prompt/mask/|text/(first|last)/(mix|feed)/"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
  """How parameters are changed; the defaults are Meta's for fine-tuning the released model."""

  name: str = "adamw"  # or "muon": hidden kernels by Muon, the others by AdamW, at one rate
  learning_rate: float = 8e-5  # 0.1 * 8e-4; of the parts that `multipliers` does not name
  # Pattern of the whole path -> factor on the learning rate; the first that matches counts.
  multipliers: tuple[tuple[str, float], ...] = (
    (r"(trunk|neck)/.*", 0.3125),  # 2.5e-4 / 8e-4
    (r"text/.*", 0.0625),  # 5e-5 / 8e-4
  )
  layer_decay: float = 0.9  # factor on the learning rate for each block of the trunk from its end
  weight_decay: float = 0.1
  clip: float = 0.1  # largest L2 norm of all gradients together; 0 for any
  beta1: float = 0.9
  beta2: float = 0.999
  epsilon: float = 1e-8
  schedule: str = "inverse_sqrt"  # or "cosine", "constant"
  warmup: int = 20  # steps; the rate grows linearly from 0
  timescale: int = 20  # steps, of inverse_sqrt
  cooldown: int = 20  # last steps, over which the rate falls linearly to 0; not of cosine
  final: float = 0.0  # of cosine: the last rate as a fraction of the first

  def __post_init__(self):
    for value, known, field in (
      (self.name, OPTIMIZERS, "name"),
      (self.schedule, SCHEDULES, "schedule"),
    ):
      if value not in known:
        raise ValueError(f"optimizer.{field} must be one of {', '.join(known)}; got {value!r}.")
    check = functools.partial(check_numbers, self, "optimizer")
    check(("learning_rate", "weight_decay", "clip", "warmup", "cooldown", "final"), 0)
    check(("beta1", "beta2"), 0, 1, "[)")
    check(("epsilon",), 0, ends="(]")
    check(("layer_decay",), 0, 1, "(]")
    check(("timescale",), 1)
    for pattern, factor in self.multipliers:
      check_pattern(pattern, "optimizer.multipliers")
      if not 0 <= factor < math.inf:
        raise ValueError(
          f"optimizer.multipliers: the factor of {pattern!r} must be finite, and 0 or more; "
          f"got {factor}."
        )


def make_optimizer(
  config: OptimizerConfig, parameters: Mapping[str, Any], trunk: TrunkConfig, steps: int
) -> optax.GradientTransformation:
  """The transformation of gradients to updates.

  With "adamw" a step equals one of `torch.optim.AdamW` after `clip_grad_norm_` with parameter
  groups of these learning rates and weight decays, up to its 1e-6 beside the norm. "muon" scales
  its updates to the size of Adam's (Liu et al. 2025, arXiv:2502.16982), so that learning rates and
  weight decays carry over.

  Args:
    config: see there.
    parameters: what is trained, by path: arrays, or shapes.
    trunk: says how many blocks the layer decay counts.
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
    optax.clip_by_global_norm(config.clip) if config.clip else optax.identity(),
    moments,
    optax.add_decayed_weights(
      config.weight_decay, mask={path: is_decayed(path) for path in parameters}
    ),
    _scale_by(factors),
    optax.scale_by_learning_rate(make_schedule(config, steps)),
  )


def make_schedule(config: OptimizerConfig, steps: int) -> Callable[[ArrayLike], Array]:
  """The learning rate of each step, 0 .. steps - 1, before the factors of the parts."""
  base, warmup = config.learning_rate, config.warmup

  def schedule(step: ArrayLike) -> Array:
    step = jnp.asarray(step, jnp.float32)
    rate = base * jnp.minimum(1.0, step / warmup) if warmup else jnp.full((), base, jnp.float32)
    if config.schedule == "cosine":
      done = jnp.clip((step - warmup) / max(1, steps - warmup), 0, 1)
      return rate * (config.final + (1 - config.final) * (1 + jnp.cos(jnp.pi * done)) / 2)
    if config.schedule == "inverse_sqrt":
      age = (step + config.timescale - warmup) / config.timescale
      rate = jnp.where(step > warmup, rate / jnp.sqrt(jnp.maximum(age, 1)), rate)
    if config.cooldown:
      rate = rate * jnp.clip((steps - step) / config.cooldown, 0, 1)
    return rate

  return schedule


def learning_rate_factor(
  path: str, ndim: int, config: OptimizerConfig, trunk: TrunkConfig
) -> np.ndarray:
  """The factor on a parameter's learning rate: a number, or for stacked blocks of the trunk an
  array that broadcasts over them."""
  part = next((f for pattern, f in config.multipliers if re.fullmatch(pattern, path)), 1.0)
  decays = path.startswith("trunk/") and path != "trunk/position"  # Meta's override for positions
  distance = trunk.blocks + 1 - _trunk_blocks(path, trunk) if decays else np.zeros(())
  factor = np.asarray(part * config.layer_decay**distance, np.float32)
  return factor.reshape(factor.shape + (1,) * (ndim - factor.ndim)) if factor.ndim else factor


def _trunk_blocks(path: str, trunk: TrunkConfig) -> np.ndarray:
  """How many blocks, with the patch embedding, lie before the output of what `path` belongs to."""
  blocks = 1 + np.arange(trunk.blocks).reshape(trunk.groups, trunk.windowed + 1)
  if path.startswith("trunk/groups/windowed/"):
    return blocks[:, :-1]
  return blocks[:, -1] if path.startswith("trunk/groups/global/") else np.zeros(())


def is_decayed(path: str) -> bool:
  """Whether weight decay applies: not to biases, scales and statistics, but to GroupNorms' scales,
  to embeddings and to learned tokens."""
  leaf = path.rpartition("/")[2]
  kept = leaf in ("bias", "mean", "variance") or leaf.endswith("scale")
  return not kept or (leaf == "scale" and re.match(GROUP_NORM, path) is not None)


def stacked_axes(path: str) -> int:
  """How many leading axes of a parameter count layers."""
  return next((axes for pattern, axes in STACKED if re.match(pattern, path)), 0)


def _is_hidden(path: str) -> bool:
  return path.endswith("/kernel") and re.match(ENDS, path) is None


def _muon(
  hidden: Mapping[str, tuple[int, ...]], parameters: Mapping[str, Any]
) -> optax.GradientTransformation:
  """Muon of the `hidden` kernels; the other parameters' places are masked."""
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
  """The axes of a kernel that are inputs, and those that are outputs; the others count layers."""
  axes = tuple(range(stacked_axes(path), ndim))
  if re.fullmatch(DOUBLE, path):
    return axes[2:3], (*axes[:2], axes[3])
  return axes[:-1], axes[-1:]


def _scale_by(factors: Mapping[str, Any]) -> optax.GradientTransformation:
  def scale(updates: Any, _: Any) -> Any:
    return {path: x * factors[path] if path in factors else x for path, x in updates.items()}

  return optax.stateless(scale)
