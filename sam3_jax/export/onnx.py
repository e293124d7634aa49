"""The exported programs as ONNX files, by jax2onnx.

Four things stand between it and this model. It replaces functions of jax.numpy while it traces,
which Flax's scan does not survive: so JAX traces first, and jax2onnx sees primitives alone. It
knows no choice by platform: a CPU's is made here. It cannot pad between values: maps are stacked.
And onnxruntime adds numbers up one by one, so that the mean of a group norm's millions would be off
by 1e-3: it is taken an axis at a time.
"""

import contextlib
import importlib.util
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.interpreters.partial_eval import dce_jaxpr
from jaxtyping import Array

from sam3_jax.model import masks, neck, norms
from sam3_jax.ops import attention
from sam3_jax.utils.param_tree import flatten, nest

LOCK = threading.Lock()


def check() -> None:
  """Raises ImportError where jax2onnx is missing."""
  if importlib.util.find_spec("jax2onnx") is None:
    raise ImportError(
      "ONNX needs jax2onnx, which asks for an older Orbax than this package: pip install "
      "'sam3-jax[onnx]', then pip install --no-deps jax2onnx."
    )


def write_onnx(
  path: Path,
  function: Any,
  params: Mapping[str, jax.ShapeDtypeStruct],
  inputs: Any,
  read: Callable[[Sequence[str]], Mapping[str, np.ndarray]],
) -> None:
  """Writes one program, parameters inside; its inputs and outputs are called by their paths.

  Args:
    path: of the file.
    function, inputs: as `plain.functions` has them.
    params: shapes of the parameters, by path.
    read: gives those of some paths; it is asked for what the program needs.
  """
  # It tells at length of each example in it whose package is missing.
  logging.getLogger("jax2onnx").setLevel(logging.ERROR)
  from jax2onnx import to_onnx  # pyright: ignore[reportMissingImports]

  flat, names = flatten(inputs), sorted(params)
  with _steps_it_knows():
    traced, shapes = jax.make_jaxpr(
      lambda params, *arrays: function(params, nest(dict(zip(flat, arrays, strict=True)))),
      return_shape=True,
    )(dict(params), *flat.values())
  # What the program does not read is no argument any more; inputs stay.
  keep = [False] * len(names) + [True] * len(flat)
  jaxpr, used = dce_jaxpr(traced.jaxpr, [True] * len(traced.jaxpr.outvars), keep)
  needed = [name for name, is_used in zip(names, used, strict=False) if is_used]
  arrays, run = read(needed), jaxpr_as_fun(ClosedJaxpr(jaxpr, traced.consts))
  constants = [arrays[name] for name in needed]
  to_onnx(
    lambda *arrays: tuple(run(*constants, *arrays)),
    list(flat.values()),
    model_name=path.stem,
    input_names=[f"in.{name.replace('/', '.')}" for name in flat],
    output_names=sorted(shapes),
    return_mode="file",
    output_path=str(path),
  )
  for file in path.parent.glob(f"{path.name}*"):
    file.chmod(0o644)  # large tensors come in a file beside, for the owner alone


@contextlib.contextmanager
def _steps_it_knows() -> Iterator[None]:
  """Within, the model is traced from steps that jax2onnx has."""
  # What another thread traces meanwhile takes these steps too.
  with LOCK, contextlib.ExitStack() as stack:
    stack.enter_context(mock.patch.object(attention, "platform_dependent", _on_cpu))
    for module in (neck, masks):
      stack.enter_context(mock.patch.object(module, "interleaved", _interleaved))
    stack.enter_context(mock.patch.object(norms, "mean", _mean))
    jax.clear_caches()  # of what was traced before
    try:
      yield
    finally:
      jax.clear_caches()


def _on_cpu(*operands: Any, cpu: Any, default: Any) -> Any:
  return cpu(*operands)


def _mean(x: Array, axes: tuple[int, ...]) -> Array:
  """`norms.mean`, an axis at a time."""
  for axis in axes:
    x = x.mean(axis, keepdims=True)
  return x


def _interleaved(cells: list[list[Array]]) -> Array:
  """`layers.interleaved` without padding between values."""
  rows, height, width, channels = cells[0][0].shape
  side = len(cells)
  both = jnp.stack([jnp.stack(row, axis=3) for row in cells], axis=2)
  return both.reshape(rows, height * side, width * side, channels)
