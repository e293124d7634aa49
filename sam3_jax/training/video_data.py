"""An endless, deterministic sequence of batches of clips; see `video_examples`.

A batch depends only on the seed and its number.
"""

import weakref
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from sam3_jax.training.video_examples import ClipBatch, ClipConfig, clip_example
from sam3_jax.utils.grain_workers import (
  close_all,
  exit_with_parent,
  explain_lost_workers,
  parse_flags,
)

_LENGTH = 2**48  # of the "endless" sequence: Grain cannot hold a larger one


class ClipBatches(Iterator[ClipBatch]):
  """An endless iterator over batches of NumPy arrays; see `data.Batches`, whose state it has."""

  def __init__(self, config: ClipConfig, *, process: int = 0, processes: int = 1):
    """Prepares the sequence; no scene is composed yet.

    Args:
      config: `batch_size` is divided among the processes.
      process, processes: `jax.process_index()` and `jax.process_count()`.

    Raises:
      ValueError: no sizes, or a batch size that is not a multiple of `processes`.
    """
    if not (config.image_size and config.mask_size):
      raise ValueError(
        f"clips need the sizes of images and masks; got image_size {config.image_size} and "
        f"mask_size {config.mask_size}: give ClipConfig the model's."
      )
    if not 0 <= process < processes:
      raise ValueError(f"process must be in 0 .. {processes - 1}; got {process}.")
    if config.batch_size % processes:
      raise ValueError(
        f"clips.batch_size {config.batch_size} must be a multiple of the {processes} processes."
      )
    self.config = config
    self._shard = process, processes
    self._next = 0
    self._running: list[Any] = []  # Grain's iterator, once it has started
    weakref.finalize(self, close_all, self._running)  # also at exit, before modules are torn down

  def __next__(self) -> ClipBatch:
    if not self._running:
      self._running.append(iter(self._dataset(self._next)))
    with explain_lost_workers():
      batch = next(self._running[0])
    self._next += 1
    # Workers' arrays are in shared memory, which is freed once they are copied.
    return jax.tree.map(np.array, batch) if self.config.workers else batch

  def get_state(self) -> dict[str, int]:
    """The state after the latest batch, for `set_state`."""
    return {"batch": self._next, **self._identity()}

  def set_state(self, state: dict[str, int]) -> None:
    """Continues where `get_state` was called; raises ValueError for another sequence's state."""
    for key, value in self._identity().items():
      if state.get(key) != value:
        raise ValueError(
          f"the state of the clips was saved with {key} {state.get(key)!r}, but {key} is now "
          f"{value!r}; resume with the same settings, or start a new run."
        )
    self.close()
    self._next = int(state["batch"])

  def name(self, index: int) -> str:
    """What to compose again, for messages."""
    return f"moving scene {index} of seed {self.config.seed}"

  def close(self) -> None:
    """Stops threads and worker processes; `next` starts them again."""
    close_all(self._running)

  def _identity(self) -> dict[str, int]:
    config = self.config
    return {"seed": config.seed, "scenes": config.count, "batch_size": config.batch_size}

  def _dataset(self, first: int) -> Any:
    """Grain's dataset of this process's batches, from batch number `first` on."""
    import grain

    config, (process, processes) = self.config, self._shard
    batches = (
      grain.MapDataset.range(config.count)
      .repeat(_LENGTH // config.count + 1)
      .map_with_index(_MakeClip(config))
      .slice(slice(first * config.batch_size + process, None, processes))
      .batch(config.batch_size // processes, batch_fn=_stack)
    )
    if not config.workers:
      threads = int(config.prefetch > 0)
      return batches.to_iter_dataset(
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=config.prefetch)
      )
    parse_flags()
    return batches.to_iter_dataset(
      grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    ).mp_prefetch(
      grain.MultiprocessingOptions(
        num_workers=config.workers, per_worker_buffer_size=max(1, config.prefetch)
      )
    )


class _MakeClip:
  """Makes the clip at a position of the sequence; can be pickled, for workers."""

  def __init__(self, config: ClipConfig):
    self.config = config

  def __setstate__(self, state: dict[str, Any]) -> None:
    vars(self).update(state)
    exit_with_parent()

  def __call__(self, position: int, index: int) -> ClipBatch:
    generator = np.random.default_rng((self.config.seed, position // self.config.count, index))
    return clip_example(index, self.config, generator)


def _stack(rows: Any) -> ClipBatch:
  return jax.tree.map(lambda *arrays: np.stack(arrays), *rows)
