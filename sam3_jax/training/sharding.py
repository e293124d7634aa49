"""Sharding in training: a mesh with the axes `data` and `fsdp`, and the sharding of each array.

Images are sharded over both axes. Parameters and the optimizer's state are sharded over `fsdp`
(fully sharded data parallel, Zhao et al. 2023, arXiv:2304.11277) and replicated over `data`.
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
SMALL = 2**12  # parameters with at most this many numbers per layer are replicated


def make_mesh(devices: Sequence[Any] | None = None, fsdp: int = 1) -> Mesh:
  """A mesh of all devices, or of the given ones; groups of `fsdp` share one copy of the parameters.

  Raises:
    ValueError: the number of devices is not a multiple of `fsdp`.
  """
  return mesh_of(jax.devices() if devices is None else devices, AXES, fsdp)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Shards the first axis over all devices."""
  return NamedSharding(mesh, PartitionSpec(AXES))


def parameter_sharding(mesh: Mesh, path: str, shape: tuple[int, ...]) -> NamedSharding:
  """The sharding of a parameter over `fsdp`.

  It shards the largest axis that `fsdp` divides, the last one of equal axes, but no axis that
  stacks layers, because layers are used one at a time. Small parameters are replicated.
  """
  parts, stack = mesh.shape["fsdp"], stacked_axes(path)
  layer = shape[stack:]
  fitting = [axis for axis, length in enumerate(layer) if length % parts == 0]
  if parts == 1 or not fitting or np.prod(layer) <= SMALL:
    return replicated(mesh)
  sharded = max(fitting, key=lambda axis: (layer[axis], axis))
  return NamedSharding(mesh, PartitionSpec(*[None] * (stack + sharded), "fsdp"))


def gatherer(mesh: Mesh, dtype: DTypeLike) -> Callable[[Any], Any] | None:
  """Returns a function that all-gathers the parameters of a layer (a pytree); None without `fsdp`.

  Kernels are sent in `dtype`, to which the layer casts them anyway. Gradients are sharded like the
  parameters, so each device keeps its shard of their sum.
  """
  if mesh.shape["fsdp"] == 1:
    return None

  def gather(x: Array) -> Array:
    sharding = parameter_sharding(mesh, "", x.shape)
    if sharding == replicated(mesh):
      return x

    @jax.custom_vjp
    def collect(x):
      x = x.astype(dtype) if x.ndim > 1 else x
      return jax.lax.with_sharding_constraint(x, replicated(mesh))

    def backward(_, gradient):
      return (jax.lax.with_sharding_constraint(gradient.astype(x.dtype), sharding),)

    collect.defvjp(lambda x: (collect(x), None), backward)
    return collect(x)

  return lambda parameters: jax.tree.map(gather, parameters)


def state_shardings(mesh: Mesh, state: Any) -> Any:
  """The shardings of a tree whose innermost dictionaries hold parameters or moments by path.

  Leaves outside of these dictionaries are replicated.
  """

  def sharding(keys: tuple[Any, ...], leaf: Any) -> NamedSharding:
    path = next((key.key for key in reversed(keys) if isinstance(key, jax.tree_util.DictKey)), None)
    return replicated(mesh) if path is None else parameter_sharding(mesh, path, leaf.shape)

  return jax.tree_util.tree_map_with_path(sharding, state)


def put_state(mesh: Mesh, tree: Any) -> Any:
  """Puts arrays that each process has in full on the devices, sharded by `state_shardings`."""
  shardings = state_shardings(mesh, tree)
  if jax.process_count() == 1:
    return jax.device_put(tree, shardings)

  # device_put would send each full array to every device, to compare it between processes.
  def put(x: Any, sharding: NamedSharding) -> Array:
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

  return jax.tree.map(put, tree, shardings)


def put_batch(mesh: Mesh, batch: Any) -> Any:
  """Puts this process's rows of a batch on its devices."""
  sharding = batch_sharding(mesh)
  if jax.process_count() == 1:
    return jax.device_put(batch, sharding)
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
