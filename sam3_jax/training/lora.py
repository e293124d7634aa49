"""Low-rank adaptation (LoRA; Hu et al. 2021, arXiv:2106.09685) of dense kernels, stacked or not.

A kernel [.., in, out] gets two factors, `lora_a` [.., in, r] and `lora_b` [.., r, out]; the layer
then uses kernel + scale * lora_a @ lora_b. Parameters are a flat dictionary by path.
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
  """Low-rank adaptation."""

  # Rank of the factors; 0 for no adaptation.
  rank: int = 0
  # Factor on the product of the two factors, often written alpha / rank.
  scale: float = 1.0
  # Regular expression for the full paths of the kernels to adapt; by default all kernels of
  # attention layers and MLPs.
  kernels: str = r".*(attn/(query|key|value|out)|mlp/fc\d+)/kernel"

  def __post_init__(self):
    if self.rank < 0:
      raise ValueError(f"lora.rank must be 0 (no adaptation) or more; got {self.rank}.")
    check_numbers(self, "lora", ("scale",), -math.inf)
    check_pattern(self.kernels, "lora.kernels")


def adapt(parameters: Mapping[str, Any], config: LoraConfig, key: Array) -> dict[str, Array]:
  """Returns new float32 factors for the adapted kernels.

  `lora_b` is 0, so the model's outputs do not change at first. `lora_a` is uniform, as PyTorch
  initializes dense layers.

  Args:
    parameters: of the model, by path: arrays, or shapes.
    config: the adaptation.
    key: of the random factors.

  Raises:
    ValueError: no dense kernel matches.
  """
  if not config.rank:
    return {}
  factors = {}
  for number, path in enumerate(adapted_kernels(parameters, config)):
    *stack, inputs, outputs = parameters[path].shape
    bound, name = 1 / math.sqrt(inputs), path.removesuffix("kernel")
    shape = (*stack, inputs, config.rank)
    factors[name + A] = jax.random.uniform(
      jax.random.fold_in(key, number), shape, jnp.float32, minval=-bound, maxval=bound
    )
    factors[name + B] = jnp.zeros((*stack, config.rank, outputs), jnp.float32)
  return factors


def adapted_kernels(parameters: Mapping[str, Any], config: LoraConfig) -> list[str]:
  """Sorted paths of the kernels to adapt. Raises ValueError if there are none."""
  paths = [
    path
    for path, parameter in sorted(parameters.items())
    if path.endswith("/kernel")
    and re.fullmatch(config.kernels, path)
    and parameter.ndim - stacked_axes(path) == 2
  ]
  if not paths:
    raise ValueError(
      f"lora.kernels {config.kernels!r} matches no dense kernel; it must match full paths such as "
      "trunk/groups/global/attn/query/kernel."
    )
  return paths


def merge(parameters: Mapping[str, Array], scale: float) -> dict[str, Array]:
  """Returns the model's parameters with each product added to its kernel; differentiable."""
  merged = {path: x for path, x in parameters.items() if path.rpartition("/")[2] not in (A, B)}
  for path, a in parameters.items():
    name, _, leaf = path.rpartition("/")
    if leaf == A:
      kernel = merged[f"{name}/kernel"]
      product = matmul(a, parameters[f"{name}/{B}"], preferred_element_type=jnp.float32)
      merged[f"{name}/kernel"] = (kernel + scale * product).astype(kernel.dtype)
  return merged
