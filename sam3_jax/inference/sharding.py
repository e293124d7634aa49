"""Sharding of inference over a mesh with the axes `data` and `model`.

Images and prompts are sharded over all devices of a mesh, and each device computes the prompts
about its own images. With replicated parameters the devices do not communicate at all. This takes
`jax.shard_map`: under jit alone, the loop over heads in `ops.attention` would gather what is
sharded (108 all-gathers in one window attention, as XLA compiles it for four chips of v6e).

With fewer prompts than devices, the devices of a group of the axis `model` can share the work on a
prompt: they split the fusion encoder's tokens, three fifths of a prompt's operations. Each of its
layers but the first then gathers the tokens once (2.7 MB in bfloat16 for the released model), and
so does its end.

Each device of a group computes the rest of the prompt whole. Attention of queries to cells is a
twentieth of a prompt's time on v6e (by its compiler's estimates). Split by cells, it would need an
all-reduce in each of six layers, of 0.2 MB of partial sums in float32 and the softmax's statistics.
The masks are two fifths. Split by rows, their convolutions would need the neighbors' rows, and
gathering the masks of a prompt (17 MB of 100) at the end would move as many bytes as all of fusion.

Parameters are replicated, or sharded along `model` by rules: the devices of a group then hold one
copy together, and gather it when a program starts.
"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

AXES = ("data", "model")

# How parameters are sharded: pairs of a pattern, which must match the whole path, and a spec, which
# may name the axis `model` only. The first match applies.
PartitionRules = Sequence[tuple[str, P]]
REPLICATED: PartitionRules = ((r".*", P()),)
# The kernels of trunk and text encoder, most of the parameters, sharded along their outputs.
BY_OUTPUTS: PartitionRules = (
  (r"trunk/groups/windowed/.*/kernel", P(None, None, None, "model")),
  (r"(trunk/groups/global|text/blocks)/.*/kernel", P(None, None, "model")),
  *REPLICATED,
)


def make_mesh(devices: Sequence[Any] | None = None, model: int = 1) -> Mesh:
  """A mesh of this process's devices, or of the given ones.

  Each process has its own mesh; processes do not wait for each other.

  Args:
    devices: the devices; None for all of this process.
    model: size of the axis `model`.

  Raises:
    ValueError: `model` does not divide the number of devices.
  """
  return mesh_of(jax.local_devices() if devices is None else devices, AXES, model)


def mesh_of(devices: Sequence[Any], axes: tuple[str, str], size: int) -> Mesh:
  """A mesh of devices whose second axis has `size` devices.

  Raises:
    ValueError: `size` does not divide the number of devices.
  """
  if size < 1 or len(devices) % size:
    raise ValueError(
      f"{axes[1]} must divide the number of devices, {len(devices)}; got {size}. Use 1 for none."
    )
  grid = np.asarray(devices).reshape(-1, size)
  return Mesh(grid, axes, axis_types=(AxisType.Auto, AxisType.Auto))


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding of arrays that are replicated on every device."""
  return NamedSharding(mesh, P())


def by_rows(mesh: Mesh) -> NamedSharding:
  """The sharding of the first axis over all devices, in the mesh's order."""
  return NamedSharding(mesh, P(AXES))


def by_groups(mesh: Mesh) -> NamedSharding:
  """The sharding of the first axis over `data`; devices of a group of `model` hold the same."""
  return NamedSharding(mesh, P("data"))


def parameter_sharding(
  mesh: Mesh, rules: PartitionRules = REPLICATED
) -> Callable[[str, tuple[int, ...]], NamedSharding]:
  """A function from a parameter's path and shape to its sharding, as `bundle.load` takes it.

  Raises:
    ValueError: (the function) no rule matches, or a rule shards an axis that the mesh does not
      divide.
  """

  def sharding(path: str, shape: tuple[int, ...]) -> NamedSharding:
    spec = next((spec for pattern, spec in rules if re.fullmatch(pattern, path)), None)
    if spec is None:
      raise ValueError(f"no rule matches the parameter {path}; end the rules with '.*'.")
    for axis, name in enumerate(spec):
      if name is not None and (axis >= len(shape) or shape[axis] % mesh.shape[name]):
        raise ValueError(
          f"{spec} cannot shard the parameter {path}, {list(shape)}, over {mesh.shape[name]} "
          "devices; change the rule or the mesh."
        )
    return NamedSharding(mesh, spec)

  return sharding


def shard_params(mesh: Mesh, params: Any, rules: PartitionRules = REPLICATED) -> Any:
  """Puts parameters on a mesh, without a copy of those that are there; shapes get shardings."""
  sharding = parameter_sharding(mesh, rules)

  def put(keys: Any, x: Any) -> Any:
    target = sharding("/".join(key.key for key in keys), x.shape)
    if isinstance(x, jax.ShapeDtypeStruct):
      return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=target)
    return jax.device_put(x, target)

  return jax.tree_util.tree_map_with_path(put, params)


def shard_rows(
  function: Callable[..., Any],
  mesh: Mesh | None,
  rules: PartitionRules = REPLICATED,
  axes: Any = AXES,
) -> Callable[..., Any]:
  """Maps a function over the devices of a mesh.

  Args:
    function: `function(params, *arrays)`, which gets whole parameters and a device's rows of each
      array.
    mesh: the mesh; None returns the function as it is.
    rules: how the mesh holds the parameters.
    axes: the axes of the mesh that shard the arrays' first axis.
  """
  if mesh is None:
    return function
  sharding = parameter_sharding(mesh, rules)

  def spec(keys: Any, x: Any) -> P:
    return sharding("/".join(key.key for key in keys), x.shape).spec

  @functools.wraps(function)
  def mapped(params, *arrays):
    specs = jax.tree_util.tree_map_with_path(spec, params)

    def local(params, *rows):
      return function(jax.tree.map(_gather, params, specs), *rows)

    # The check of varying axes refuses loops that start from a constant, which all devices share,
    # and continue with values that differ.
    in_specs = specs, *[P(axes)] * len(arrays)
    return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=P(axes), check_vma=False)(
      params, *arrays
    )

  return mapped


def _gather(x: Array, spec: P) -> Array:
  """A whole parameter from its shards."""
  for axis, name in enumerate(spec):
    if name is not None:
      x = jax.lax.all_gather(x, name, axis=axis, tiled=True)
  return x
