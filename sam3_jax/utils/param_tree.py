"""Trees of parameters by path, `a/b/c`: what is in them, and what is wrong with them."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

SHOWN_FAULTS = 20

Shapes = Mapping[str, tuple[int, ...]]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Leaves of nested dictionaries by path, `a/b/c`."""
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
  """What is wrong with `found`, a line each."""
  faults = [f"{name} is missing" for name in wanted if name not in found]
  faults += [f"{name} is unknown" for name in found if name not in wanted]
  return faults + [
    f"{name} is {list(found[name])}, expected {list(shape)}"
    for name, shape in wanted.items()
    if name in found and tuple(found[name]) != tuple(shape)
  ]


def not_finite(flat: Mapping[str, Any]) -> list[str]:
  """The arrays with infinities or NaN in them, a line each.

  Done on the host: one compilation a shape would take many times as long as the copy.
  """
  return [
    f"{name} holds values that are not finite"
    for name, array in flat.items()
    if not all(np.isfinite(piece).all() for piece in _on_host(array))
  ]


def describe(array: Any) -> dict[str, Any]:
  """Shape, dtype and SHA-256 of an array, as a checkpoint's manifest has them."""
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
  """On the host, whatever devices of this process it is sharded over."""
  if isinstance(array, np.ndarray):
    return array
  pieces = {str(shard.index): shard for shard in array.addressable_shards}
  if len(pieces) == 1:
    return np.asarray(_passing(array.addressable_shards[0].data))
  whole = np.empty(array.shape, array.dtype)
  for shard in pieces.values():
    whole[shard.index] = np.asarray(_passing(shard.data))
  return whole


def _on_host(array: Any) -> Iterable[np.ndarray]:
  """This process's pieces of an array, each once."""
  if isinstance(array, np.ndarray):
    return [array]
  pieces = {str(shard.index): shard.data for shard in array.addressable_shards}
  return (np.asarray(_passing(piece)) for piece in pieces.values())


def _passing(piece: jax.Array) -> jax.Array:
  """A copy on the device: an array keeps the copy that NumPy asked it for as long as it lives."""
  if piece.platform() == "cpu":  # there NumPy looks at the same memory
    return piece
  return jax.device_put(piece, piece.sharding, may_alias=False)
