"""The exported programs as ONNX files, by jax2onnx.

Three things stand between it and this model. It replaces functions of jax.numpy while it traces,
which Flax's scan does not survive: so JAX traces first, and jax2onnx sees primitives alone. It
knows no choice by platform: a CPU's is made here. It cannot pad between values: that is reshaping.
"""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import jax
from jax.extend.core import jaxpr_as_fun
from jaxtyping import Array

from sam3_jax.trees import flatten

LAX_PAD = jax.lax.pad  # also while `_pad` stands in its place


def check() -> None:
  """Raises ImportError where jax2onnx is missing."""
  if importlib.util.find_spec("jax2onnx") is None:
    raise ImportError(
      "ONNX needs jax2onnx, which asks for an older Orbax than this package: pip install "
      "'sam3-jax[onnx]', then pip install --no-deps jax2onnx."
    )


def write_onnx(path: Path, function: Any, params: Mapping[str, Any], inputs: Any) -> None:
  """Writes one program, parameters inside; its inputs and outputs are called by their paths.

  Args:
    path: of the file.
    function, inputs: as `export.functions` has them.
    params: arrays, by path.
  """
  from jax2onnx import to_onnx  # pyright: ignore[reportMissingImports]

  flat = flatten(inputs)
  leaves, tree = jax.tree.flatten(inputs)
  named = {id(leaf): name.replace("/", ".") for name, leaf in flat.items()}
  with (
    mock.patch.object(jax.lax, "platform_dependent", _on_cpu),
    mock.patch.object(jax.lax, "pad", _pad),
  ):
    jax.clear_caches()  # of what was traced without these
    traced, shapes = jax.make_jaxpr(
      lambda *arrays: function(params, jax.tree.unflatten(tree, arrays)), return_shape=True
    )(*leaves)
  jax.clear_caches()
  run = jaxpr_as_fun(traced)
  to_onnx(
    lambda *arrays: tuple(run(*arrays)),
    leaves,
    model_name=path.stem,
    input_names=[f"in.{named[id(leaf)]}" for leaf in leaves],
    output_names=sorted(shapes),
    return_mode="file",
    output_path=str(path),
  )
  for file in path.parent.glob(f"{path.name}*"):
    file.chmod(0o644)  # large tensors come in a file beside, for the owner alone


def _on_cpu(*operands: Any, default: Any = None, **branches: Any) -> Any:
  return branches.get("cpu", default)(*operands)


def _pad(x: Array, value: Any, config: Any) -> Array:
  """`jax.lax.pad`, interior padding by a new axis."""
  for axis, (low, high, between) in enumerate(config):
    size = x.shape[axis]
    if between:
      x = x.reshape(*x.shape[: axis + 1], 1, *x.shape[axis + 1 :])
      edges = [(0, between if at == axis + 1 else 0, 0) for at in range(x.ndim)]
      x = LAX_PAD(x, value, edges)
      x = x.reshape(*x.shape[:axis], size * (between + 1), *x.shape[axis + 2 :])
    whole = low + size + max(0, size - 1) * between + high
    after = max(0, whole - low - x.shape[axis])
    x = LAX_PAD(x, value, [(low, after, 0) if at == axis else (0, 0, 0) for at in range(x.ndim)])
    x = jax.lax.slice_in_dim(x, 0, whole, axis=axis)
  return x
