"""Where training keeps what: a mesh with the axes `data` and `fsdp`, and the rules for arrays.

Images are shared out over both axes. Parameters and the optimizer's state are cut along `fsdp`
(fully sharded data parallel, Zhao et al. 2023, arXiv:2304.11277) and whole along `data`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array

from sam3_jax.inference.sharding import mesh_of, replicated
from sam3_jax.training.optimizer import stacked_axes

AXES = ("data", "fsdp")
SMALL = 2**12  # numbers of a layer up to which a parameter is whole everywhere


def make_mesh(devices: Sequence[Any] | None = None, fsdp: int = 1) -> Mesh:
  """All devices, or these, `fsdp` of them to a group that shares one copy of the parameters.

  Raises:
    ValueError: the devices cannot be grouped so.
  """
  return mesh_of(jax.devices() if devices is None else devices, AXES, fsdp)


def by_rows(mesh: Mesh) -> NamedSharding:
  """The first axis over all devices."""
  return NamedSharding(mesh, PartitionSpec(AXES))


def parameter_sharding(mesh: Mesh, path: str, shape: tuple[int, ...]) -> NamedSharding:
  """Cuts the largest axis that `fsdp` divides, the last of equals; never an axis that counts
  layers, as each layer is used by itself. Small parameters are whole."""
  parts, stack = mesh.shape["fsdp"], stacked_axes(path)
  layer = shape[stack:]
  fitting = [axis for axis, length in enumerate(layer) if length % parts == 0]
  if parts == 1 or not fitting or np.prod(layer) <= SMALL:
    return replicated(mesh)
  cut = max(fitting, key=lambda axis: (layer[axis], axis))
  return NamedSharding(mesh, PartitionSpec(*[None] * (stack + cut), "fsdp"))


def gatherer(mesh: Mesh, dtype: DTypeLike) -> Callable[[Any], Any] | None:
  """A function of a layer's parameters, a pytree, that brings their pieces together; None if they
  are whole already.

  Kernels travel in `dtype`, to which the layer would cast them anyway. Gradients are cut as the
  parameters are, so that each device keeps its piece of their sum.
  """
  if mesh.shape["fsdp"] == 1:
    return None

  def gather(x: Array) -> Array:
    cut = parameter_sharding(mesh, "", x.shape)
    if cut == replicated(mesh):
      return x

    @jax.custom_vjp
    def collect(x):
      x = x.astype(dtype) if x.ndim > 1 else x
      return jax.lax.with_sharding_constraint(x, replicated(mesh))

    def backward(_, gradient):
      return (jax.lax.with_sharding_constraint(gradient.astype(x.dtype), cut),)

    collect.defvjp(lambda x: (collect(x), None), backward)
    return collect(x)

  return lambda parameters: jax.tree.map(gather, parameters)


def state_shardings(mesh: Mesh, state: Any) -> Any:
  """A sharding for each leaf of a tree whose innermost dictionaries hold parameters, or their
  moments, by path; leaves outside of any are whole."""

  def sharding(keys: tuple[Any, ...], leaf: Any) -> NamedSharding:
    path = next((key.key for key in reversed(keys) if isinstance(key, jax.tree_util.DictKey)), None)
    return replicated(mesh) if path is None else parameter_sharding(mesh, path, leaf.shape)

  return jax.tree_util.tree_map_with_path(sharding, state)


def place(mesh: Mesh, tree: Any) -> Any:
  """Arrays that every process holds whole, cut and placed by `state_shardings`."""
  shardings = state_shardings(mesh, tree)
  if jax.process_count() == 1:
    return jax.device_put(tree, shardings)

  # device_put would send each array whole to every device, to compare it between processes.
  def pieces(x: Any, sharding: NamedSharding) -> Array:
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

  return jax.tree.map(pieces, tree, shardings)


def place_batch(mesh: Mesh, batch: Any) -> Any:
  """This process's rows of a batch, on its devices."""
  sharding = by_rows(mesh)
  if jax.process_count() == 1:
    return jax.device_put(batch, sharding)
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
