"""How the rows of a batch are sharded over the devices of a mesh, or placed on a single device."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Int

from sam3_jax.inference import sharding as parallel
from sam3_jax.inference.batching import batches, batches_by_image
from sam3_jax.utils import devices


@dataclasses.dataclass(frozen=True)
class Placement:
  """Where rows go.

  Attributes:
    mesh: of `parallel.make_mesh`; None for one device.
    device: the one without a mesh.
  """

  mesh: Mesh | None
  device: Any = None

  @property
  def devices(self) -> int:
    return self.mesh.size if self.mesh else 1

  def places(self, rows: int) -> int:
    """Among how many devices, or groups of devices that share the work on each, rows are cut."""
    return min(rows, self.devices)

  def shares(self, rows: int) -> bool:
    """Whether so few rows are cut that the devices of a group share the work on each."""
    return self.places(rows) < self.devices

  def own_rows(self, count: int) -> Int[np.ndarray, " P"]:
    """For each row of a batch, its number among those of its place."""
    return np.arange(count, dtype=np.int32) % (count // self.places(count))

  def prompt_batches(self, images: np.ndarray, sizes: Sequence[int]) -> Iterator[np.ndarray]:
    """Batches of prompts about these images; `sizes` as in `rows.batches`."""
    if self.mesh is None:
      return batches_by_image(images, sizes)
    rows, groups = np.arange(len(images)), self.mesh.shape["data"]
    if len(images) <= groups < self.devices:
      return batches(rows, (1,), groups)
    return batches(rows, sizes, self.devices)

  def sharding(self, rows: int) -> NamedSharding | None:
    """How batches of so many rows lie; None without a mesh, where they go to the program."""
    if self.mesh is None:
      return None
    return (parallel.by_groups if self.shares(rows) else parallel.by_rows)(self.mesh)

  def put(self, batch: tuple[Any, ...]) -> tuple[Any, ...]:
    """The batch where it belongs; the last of its arrays says how many rows it has."""
    sharding = self.sharding(len(batch[-1]))
    return batch if sharding is None else jax.device_put(batch, sharding)

  def whole(self, arrays: Any) -> Any:
    """NumPy arrays on the device, or the same on all devices of the mesh."""
    return jax.device_put(arrays, self.device if self.mesh is None else parallel.whole(self.mesh))

  def keep(self, pytree: Any) -> Any:
    """What is wanted more than once on the device; with a mesh, each batch of it is put there."""
    return pytree if self.device is None else devices.device_put(pytree, self.device)
