"""Parameter trees by path, `a/b/c`: flattening, comparison, checksums."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

SHOWN_FAULTS = 20

Shapes = Mapping[str, tuple[int, ...]]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Flattens nested dictionaries to leaves by path, `a/b/c`."""
  flat = {}
  for name, value in tree.items():
    if isinstance(value, Mapping):
      flat |= flatten(value, f"{prefix}{name}/")
    else:
      flat[prefix + name] = value
  return flat


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
  """Inverse of `flatten`."""
  tree: dict[str, Any] = {}
  for path, value in flat.items():
    *folders, leaf = path.split("/")
    node = tree
    for folder in folders:
      node = node.setdefault(folder, {})
    node[leaf] = value
  return tree


def compare(found: Shapes, wanted: Shapes) -> list[str]:
  """Lists the faults of `found`, one line each."""
  faults = [f"{name} is missing" for name in wanted if name not in found]
  faults += [f"{name} is unknown" for name in found if name not in wanted]
  return faults + [
    f"{name} is {list(found[name])}, expected {list(shape)}"
    for name, shape in wanted.items()
    if name in found and tuple(found[name]) != tuple(shape)
  ]


def not_finite(flat: Mapping[str, Any]) -> list[str]:
  """Lists the arrays with infinities or NaN, one line each.

  Runs on the host: compiling a program for each shape would take much longer than the copy.
  """
  return [
    f"{name} holds values that are not finite"
    for name, array in flat.items()
    if not all(np.isfinite(piece).all() for piece in _on_host(array))
  ]


def describe(array: Any) -> dict[str, Any]:
  """Shape, dtype and SHA-256 of an array, as in a checkpoint's manifest."""
  data = np.ascontiguousarray(_whole(array)).reshape(-1).view(np.uint8)
  return {
    "shape": list(array.shape),
    "dtype": str(array.dtype),
    "sha256": hashlib.sha256(data.data).hexdigest(),
  }


def raise_faults(
  faults: list[str], what: str, remedy: str = "Convert or copy the checkpoint again."
) -> None:
  """Raises one ValueError for all faults, if there are any."""
  if faults:
    more = len(faults) - SHOWN_FAULTS
    raise ValueError(
      f"{what}, {len(faults)} fault{'s' if len(faults) > 1 else ''}: "
      + "; ".join(faults[:SHOWN_FAULTS])
      + (f"; and {more} more. " if more > 0 else ". ")
      + remedy
    )


def _whole(array: Any) -> np.ndarray:
  """Gathers an array that is sharded over devices of this process."""
  if isinstance(array, np.ndarray):
    return array
  pieces = {str(shard.index): shard for shard in array.addressable_shards}
  if len(pieces) == 1:
    return np.asarray(_device_copy(array.addressable_shards[0].data))
  whole = np.empty(array.shape, array.dtype)
  for shard in pieces.values():
    whole[shard.index] = np.asarray(_device_copy(shard.data))
  return whole


def _on_host(array: Any) -> Iterable[np.ndarray]:
  """The distinct shards of an array on this process's devices."""
  if isinstance(array, np.ndarray):
    return [array]
  pieces = {str(shard.index): shard.data for shard in array.addressable_shards}
  return (np.asarray(_device_copy(piece)) for piece in pieces.values())


def _device_copy(piece: jax.Array) -> jax.Array:
  """A copy on the device, since a `jax.Array` caches its host copy for as long as it lives."""
  if piece.platform() == "cpu":  # NumPy reads the same memory
    return piece

  return jax.device_put(piece, piece.sharding, may_alias=False)
