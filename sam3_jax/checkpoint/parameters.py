"""Shapes and dtypes that the parameters of a checkpoint must have."""

import functools

import jax.numpy as jnp
import numpy as np
from numpy.typing import DTypeLike

from sam3_jax.config import Config
from sam3_jax.utils.param_tree import flatten

DTYPES = ("float32", "bfloat16")
VISUAL = "visual"  # the optional part: the head for visual prompts


def check_dtype(dtype: DTypeLike) -> np.dtype:
  """The dtype of parameters or computation; ValueError unless it is one of `DTYPES`."""
  try:
    found = jnp.dtype(dtype)
  except TypeError:
    found = None
  if found is None or found.name not in DTYPES:
    raise ValueError(f"dtype must be {' or '.join(DTYPES)}; got {dtype!r}.")
  return found


@functools.lru_cache
def expected_shapes(config: Config, *, visual: bool = False) -> dict[str, tuple[int, ...]]:
  """The shape of every parameter of the model, by path.

  Args:
    config: sizes of the model.
    visual: includes the head for visual prompts.
  """
  from sam3_jax.model.sam3 import parameter_shapes  # a second of imports and tracing
  from sam3_jax.model.visual import head

  parts = parameter_shapes(config) | ({VISUAL: head.parameter_shapes(config)} if visual else {})
  return {name: leaf.shape for name, leaf in flatten(parts).items()}
