"""How batches are sharded over the devices of a mesh, or put on a single device."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Int

from sam3_jax.inference.batching import batches, batches_by_image
from sam3_jax.inference.sharding import by_groups, by_rows, replicated
from sam3_jax.utils import devices


@dataclasses.dataclass(frozen=True)
class BatchSharding:
  """Shards batches.

  Attributes:
    mesh: from `sharding.make_mesh`; None for one device.
    device: the device without a mesh; None for the device that the computation chooses.
  """

  mesh: Mesh | None
  device: Any = None

  @property
  def devices(self) -> int:
    """Their number."""
    return self.mesh.size if self.mesh else 1

  def shards(self, count: int) -> int:
    """The number of devices, or of groups of devices, that a batch of `count` is split over."""
    return min(count, self.devices)

  def is_split(self, count: int) -> bool:
    """Whether the devices of a group compute each prompt of a batch of `count` together."""
    return self.shards(count) < self.devices

  def local_rows(self, count: int) -> Int[np.ndarray, " P"]:
    """The row of each prompt of a batch of `count` within its own shard."""
    return np.arange(count, dtype=np.int32) % (count // self.shards(count))

  def prompt_batches(self, images: np.ndarray, sizes: Sequence[int]) -> Iterator[np.ndarray]:
    """Batches of prompts.

    Args:
      images: the image of each prompt.
      sizes: as in `batching.batches`.
    """
    if self.mesh is None:
      return batches_by_image(images, sizes)
    rows, groups = np.arange(len(images)), self.mesh.shape["data"]
    if len(images) <= groups < self.devices:
      return batches(rows, (1,), groups)
    return batches(rows, sizes, self.devices)

  def sharding(self, count: int) -> NamedSharding | None:
    """The sharding of a batch of `count`; None without a mesh."""
    if self.mesh is None:
      return None
    return (by_groups if self.is_split(count) else by_rows)(self.mesh)

  def put(self, batch: tuple[Any, ...]) -> tuple[Any, ...]:
    """Shards a batch, whose last array has its length; without a mesh, returns it as it is."""
    sharding = self.sharding(len(batch[-1]))
    return batch if sharding is None else jax.device_put(batch, sharding)

  def replicate(self, arrays: Any) -> Any:
    """Puts NumPy arrays on the device, or on every device of the mesh."""
    return jax.device_put(arrays, self.device if self.mesh is None else replicated(self.mesh))

  def commit(self, pytree: Any) -> Any:
    """Commits arrays that several batches use to the device; `put` shards them on a mesh."""
    return pytree if self.device is None else devices.device_put(pytree, self.device)
