"""Writes the exported programs as ONNX files, with jax2onnx.

The model needs four adaptations. jax2onnx replaces functions of jax.numpy while it traces, which
breaks Flax's scan; so JAX traces first, and jax2onnx gets primitives only. It does not support
choices by platform; the CPU's steps are chosen here. It cannot pad between values; maps are stacked
instead. onnxruntime sums numbers one by one, and the mean over the millions of a group norm would
have an error of 1e-3; it is computed one axis at a time.
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
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun  # pyright: ignore[reportPrivateImportUsage]
from jax.interpreters.partial_eval import dce_jaxpr
from jaxtyping import Array

from sam3_jax.model import masks, neck, norms
from sam3_jax.ops import attention
from sam3_jax.utils.param_tree import flatten, nest

LOCK = threading.Lock()


def check() -> None:
  """Raises ImportError if jax2onnx is missing."""
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
  """Writes a program with its parameters; inputs and outputs are named by their paths.

  Args:
    path: of the file.
    function, inputs: as in `exportable.functions`.
    params: shapes of the parameters, by path.
    read: reads the parameters of paths; called with those that the program uses.
  """
  # jax2onnx warns about each of its examples whose package is missing.
  logging.getLogger("jax2onnx").setLevel(logging.ERROR)
  from jax2onnx import to_onnx  # pyright: ignore[reportMissingImports]

  flat, names = flatten(inputs), sorted(params)
  with _supported_steps():
    traced, shapes = jax.make_jaxpr(
      lambda params, *arrays: function(params, nest(dict(zip(flat, arrays, strict=True)))),
      return_shape=True,
    )(dict(params), *flat.values())
  # Drops the parameters that the program does not use; keeps all inputs.
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
    file.chmod(0o644)  # large tensors are in a separate file, which only the owner can read


@contextlib.contextmanager
def _supported_steps() -> Iterator[None]:
  """A context in which the model uses only steps that jax2onnx supports."""
  # Other threads trace these steps too meanwhile.
  with LOCK, contextlib.ExitStack() as stack:
    stack.enter_context(mock.patch.object(attention, "platform_dependent", _on_cpu))
    for module in (neck, masks):
      stack.enter_context(mock.patch.object(module, "interleaved", _interleaved))
    stack.enter_context(mock.patch.object(norms, "mean", _mean))
    jax.clear_caches()  # of earlier traces
    try:
      yield
    finally:
      jax.clear_caches()


def _on_cpu(*operands: Any, cpu: Any, default: Any) -> Any:
  return cpu(*operands)


def _mean(x: Array, axes: tuple[int, ...]) -> Array:
  """`norms.mean`, one axis at a time."""
  for axis in axes:
    x = x.mean(axis, keepdims=True)
  return x


def _interleaved(cells: list[list[Array]]) -> Array:
  """`layers.interleaved` without padding between values."""
  rows, height, width, channels = cells[0][0].shape
  side = len(cells)
  both = jnp.stack([jnp.stack(row, axis=3) for row in cells], axis=2)
  return both.reshape(rows, height * side, width * side, channels)
