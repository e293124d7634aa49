"""Shapes and dtypes that the parameters of a checkpoint must have."""

import functools
from collections.abc import Iterable

import jax.numpy as jnp
import numpy as np
from numpy.typing import DTypeLike

from sam3_jax.config import Config
from sam3_jax.utils.param_tree import flatten

# The names of the tracker's tensors in Meta's and Hugging Face's layout begin so.
_TRACKER = ("tracker.transformer.encoder.", "tracker_model.memory_attention.")
DTYPES = ("float32", "bfloat16")
VISUAL = "visual"  # an optional part: the head for visual prompts
VIDEO = "video"  # an optional part: the tracker, which needs that head


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
    config: sizes of the model. With `video`, the tracker and the head for visual prompts, which
      decodes its masks, are included.
    visual: includes the head for visual prompts.
  """
  from sam3_jax.model.sam3 import parameter_shapes  # a second of imports and tracing
  from sam3_jax.model.video import tracker
  from sam3_jax.model.visual import head

  parts = parameter_shapes(config)
  if visual or config.video:
    parts |= {VISUAL: head.parameter_shapes(config)}
  if config.video:
    parts |= {VIDEO: tracker.parameter_shapes(config)}
  return {name: leaf.shape for name, leaf in flatten(parts).items()}


def why_no_tracker(unread: Iterable[str]) -> str:
  """The reason why a checkpoint without the part `video` cannot track, and the remedy.

  Args:
    unread: names of the tensors that it keeps from its source.
  """
  if any(name.startswith(_TRACKER) for name in unread):
    return (
      "an earlier version of sam3-jax converted it, without the tracker; convert its source again "
      "with `sam3-jax convert`"
    )
  return (
    "it has no tracker; convert the released weights, facebook/sam3 or sam3.pt, with `sam3-jax "
    "convert`"
  )
