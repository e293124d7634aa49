"""Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685) of dense kernels, stacked or not.

Beside a kernel [.., in, out] stand `lora_a` [.., in, r] and `lora_b` [.., r, out]; the layer's
kernel is then kernel + scale * lora_a @ lora_b. Parameters come as a flat dictionary by path.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from sam3_jax.ops.precision import matmul
from sam3_jax.training.optimizer import stacked_axes
from sam3_jax.utils.validation import check_numbers, check_pattern

A, B = "lora_a", "lora_b"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
  """Which kernels are adapted, and how."""

  rank: int = 0  # 0 for none
  scale: float = 1.0  # on the product; often written alpha / rank
  # Pattern of the whole path: attention and MLP kernels of every part.
  kernels: str = r".*(attn/(query|key|value|out)|mlp/fc\d+)/kernel"

  def __post_init__(self):
    if self.rank < 0:
      raise ValueError(f"lora.rank must be 1 or more, or 0 for none; got {self.rank}.")
    check_numbers(self, "lora", ("scale",), -math.inf)
    check_pattern(self.kernels, "lora.kernels")


def adapt(parameters: Mapping[str, Any], config: LoraConfig, key: Array) -> dict[str, Array]:
  """New factors for the chosen kernels, float32; `lora_b` is 0, so that nothing changes at first.

  Args:
    parameters: of the model, by path: arrays, or shapes.
    config: see there.
    key: of the factors `lora_a`, which are uniform as PyTorch's dense layers are at first.

  Raises:
    ValueError: no dense kernel matches.
  """
  if not config.rank:
    return {}
  factors = {}
  for number, path in enumerate(chosen(parameters, config)):
    *stack, inputs, outputs = parameters[path].shape
    bound, name = 1 / math.sqrt(inputs), path.removesuffix("kernel")
    shape = (*stack, inputs, config.rank)
    factors[name + A] = jax.random.uniform(
      jax.random.fold_in(key, number), shape, jnp.float32, minval=-bound, maxval=bound
    )
    factors[name + B] = jnp.zeros((*stack, config.rank, outputs), jnp.float32)
  return factors


def chosen(parameters: Mapping[str, Any], config: LoraConfig) -> list[str]:
  """Paths of the kernels that `config` names, in order. Raises ValueError if there are none."""
  found = [
    path
    for path, parameter in sorted(parameters.items())
    if path.endswith("/kernel")
    and re.fullmatch(config.kernels, path)
    and parameter.ndim - stacked_axes(path) == 2
  ]
  if not found:
    raise ValueError(
      f"lora.kernels {config.kernels!r} match no dense kernel; patterns are of whole paths such as "
      "trunk/groups/global/attn/query/kernel."
    )
  return found


def merge(parameters: Mapping[str, Array], scale: float) -> dict[str, Array]:
  """The model's own parameters with every product added to its kernel; differentiable."""
  merged = {path: x for path, x in parameters.items() if path.rpartition("/")[2] not in (A, B)}
  for path, a in parameters.items():
    name, _, leaf = path.rpartition("/")
    if leaf == A:
      kernel = merged[f"{name}/kernel"]
      product = matmul(a, parameters[f"{name}/{B}"], preferred_element_type=jnp.float32)
      merged[f"{name}/kernel"] = (kernel + scale * product).astype(kernel.dtype)
  return merged
