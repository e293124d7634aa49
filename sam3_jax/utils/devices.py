"""Selects the device of a model that has no mesh."""

import re
from typing import Any

import jax
from jax.sharding import Mesh


def default_device() -> Any:
  """`jax.default_device` if it is set, or else the first device of this process.

  Raises:
    ValueError: `jax.default_device` is a device of another process.
  """
  return find_device(jax.config.jax_default_device)  # pyright: ignore[reportAttributeAccessIssue]


def find_device(device: Any = None) -> Any:
  """A device of this process.

  Args:
    device: a `jax.Device`; a platform ("cpu", "gpu" or "tpu") for its first device; a platform and
      a number, "tpu:1"; None for the first device of all.

  Raises:
    TypeError: `device` is something else.
    ValueError: there is no such device, or it belongs to another process.
  """
  if device is None:
    return jax.local_devices()[0]
  if isinstance(device, jax.Device):
    if device.process_index != jax.process_index():
      raise ValueError(
        f"{device} is a device of process {device.process_index}, and this is process "
        f"{jax.process_index()}: choose one of jax.local_devices()."
      )
    return device
  if not isinstance(device, str):
    raise TypeError(f'device must be a jax.Device or a platform such as "cpu"; got {device!r:.60}.')
  platform, _, number = device.partition(":")
  try:
    found = jax.local_devices(backend=platform) if platform else []
  except RuntimeError:
    found = []
  if found and re.fullmatch(r"\d{0,6}", number) and int(number or 0) < len(found):
    return found[int(number or 0)]
  names = ", ".join(f"{one.platform}:{i}" for i, one in enumerate(jax.local_devices()))
  raise ValueError(f"there is no device {device!r:.60}; this process has {names}.")


def check_mesh(mesh: Mesh) -> None:
  """Raises ValueError if a mesh includes devices of other processes."""
  remote = set(jax.devices()) - set(jax.local_devices())
  if others := sorted({one.process_index for one in mesh.devices.flat if one in remote}):
    raise ValueError(
      f"the mesh has devices of other processes ({', '.join(map(str, others))}), but each process "
      f"has its own model (this is process {jax.process_index()}): make the mesh of "
      "jax.local_devices(), as sharding.make_mesh() does."
    )


def committed_device(tree: Any) -> Any:
  """The device that all arrays of a pytree are committed to; None if there is no such device."""
  devices = set()
  for leaf in jax.tree.leaves(tree):
    if not (isinstance(leaf, jax.Array) and leaf.committed and len(leaf.devices()) == 1):
      return None
    devices |= leaf.devices()
  return devices.pop() if len(devices) == 1 else None


def device_put(tree: Any, device: Any) -> Any:
  """Commits arrays to a device, copying only where needed; leaves ShapeDtypeStructs as they are."""

  return jax.tree.map(
    lambda x: x if isinstance(x, jax.ShapeDtypeStruct) else jax.device_put(x, device), tree
  )
