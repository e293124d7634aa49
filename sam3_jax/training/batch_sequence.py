"""The sequence behind batches of images and of clips: endless, sharded over processes, resumable.

A batch depends only on the seed and its number: an item's position in the sequence gives the epoch,
and (seed, epoch, item) seeds its augmentation. So the state is one number, and batches do not
depend on the number of threads, workers or processes.
"""

import abc
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Generic, Protocol, TypeVar

import jax
import numpy as np

from sam3_jax.utils.grain_workers import (
  close_all,
  exit_with_parent,
  explain_lost_workers,
  parse_flags,
)

_LENGTH = 2**48  # of the "endless" sequence: Grain cannot hold a larger one

Rows = TypeVar("Rows")  # a pytree of NumPy arrays


class SequenceConfig(Protocol):
  """The fields of a configuration that a sequence reads."""

  @property
  def batch_size(self) -> int: ...
  @property
  def image_size(self) -> int: ...
  @property
  def mask_size(self) -> int: ...
  @property
  def prefetch(self) -> int: ...
  @property
  def seed(self) -> int: ...
  @property
  def workers(self) -> int: ...


class MakeExample(abc.ABC):
  """Makes the example at a position of the sequence; can be pickled, for workers."""

  def __setstate__(self, state: dict[str, Any]) -> None:
    vars(self).update(state)
    exit_with_parent()

  @abc.abstractmethod
  def __call__(self, position: int, index: int) -> Any:
    """The example of item `index`, at a position that counts from the first epoch on."""


class BatchSequence(Iterator[Rows], Generic[Rows]):
  """An endless iterator over batches of NumPy arrays.

  The state is a plain dictionary for JSON. After `set_state` the batches are the same as after
  `get_state`, with any number of workers or processes.

  Each item occurs once per epoch: a batch may hold the last items of one epoch and the first of the
  next.
  """

  def __init__(
    self,
    config: SequenceConfig,
    length: int,
    make: Callable[[int, int], Rows],
    identity: dict[str, int],
    *,
    what: str,
    shuffle: bool,
    process: int,
    processes: int,
  ):
    """Prepares the sequence; nothing is read yet.

    Args:
      config: its `batch_size` is divided among the processes.
      length: number of items, at least 1.
      make: makes an example; a `MakeExample` if there are workers.
      identity: what must be equal when a state is set.
      what: the section of the configuration, for messages.
      shuffle: whether the order of each epoch is random.
      process, processes: `jax.process_index()` and `jax.process_count()`.

    Raises:
      ValueError: no sizes, or a batch size that is not a multiple of `processes`.
    """
    if not (config.image_size and config.mask_size):
      raise ValueError(
        f"batches need the sizes of images and masks; got image_size {config.image_size} and "
        f"mask_size {config.mask_size}: give {type(config).__name__} the model's."
      )
    if not 0 <= process < processes:
      raise ValueError(f"process must be in 0 .. {processes - 1}; got {process}.")
    if config.batch_size % processes:
      raise ValueError(
        f"{what}.batch_size {config.batch_size} must be a multiple of the {processes} processes."
      )
    self.config: Any = config
    self._length, self._make, self._what, self._shuffle = length, make, what, shuffle
    self._identity = identity | {"seed": config.seed, "batch_size": config.batch_size}
    self._shard = process, processes
    self._next = 0
    self._running: list[Any] = []  # Grain's iterator, once it has started
    weakref.finalize(self, close_all, self._running)  # also at exit, before modules are torn down

  def __next__(self) -> Rows:
    if not self._running:
      self._running.append(iter(self._dataset(self._next)))
    with explain_lost_workers():
      batch = next(self._running[0])
    self._next += 1
    # Workers' arrays are in shared memory, which is freed once they are copied.
    return jax.tree.map(np.array, batch) if self.config.workers else batch

  def get_state(self) -> dict[str, int]:
    """The state after the latest batch, for `set_state`."""
    return {"batch": self._next, **self._identity}

  def set_state(self, state: dict[str, int]) -> None:
    """Continues where `get_state` was called.

    Raises:
      ValueError: the state is of another sequence: its seed, batch size or source differs.
    """
    for key, value in self._identity.items():
      if state.get(key) != value:
        raise ValueError(
          f"the state of the {self._what} was saved with {key} {state.get(key)!r}, but {key} is "
          f"now {value!r}; resume with the same data and settings, or start a new run."
        )
    self.close()
    self._next = int(state["batch"])

  def close(self) -> None:
    """Stops threads and worker processes; `next` starts them again."""
    close_all(self._running)

  def _dataset(self, first: int) -> Any:
    """Grain's dataset of this process's batches, from batch number `first` on."""
    import grain

    config, (process, processes) = self.config, self._shard
    order = grain.MapDataset.range(self._length)
    if self._shuffle:
      order = order.seed(config.seed).shuffle()
    batches = (
      order.repeat(_LENGTH // self._length + 1)
      .map_with_index(self._make)
      .slice(slice(first * config.batch_size + process, None, processes))
      .batch(config.batch_size // processes, batch_fn=_stack)
    )
    if not config.workers:
      threads = int(config.prefetch > 0)
      return batches.to_iter_dataset(
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=config.prefetch)
      )
    parse_flags()
    no_prefetch = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return batches.to_iter_dataset(no_prefetch).mp_prefetch(
      grain.MultiprocessingOptions(
        num_workers=config.workers, per_worker_buffer_size=max(1, config.prefetch)
      )
    )


def _stack(rows: Any) -> Any:
  return jax.tree.map(lambda *arrays: np.stack(arrays), *rows)
