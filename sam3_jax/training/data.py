"""An endless, deterministic sequence of batches: shuffled, sharded over processes, resumable.

A batch depends only on the seed and its number: an image's position in the sequence gives the
epoch, and (seed, epoch, image) seeds its augmentation. So the state is one number, and batches do
not depend on the number of threads, workers or processes.
"""

import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from sam3_jax.inputs.tokenizer import Tokenizer
from sam3_jax.training.batch import Batch
from sam3_jax.training.examples import DataConfig, Source, TrainingImage, example
from sam3_jax.utils.grain_workers import (
  close_all,
  exit_with_parent,
  explain_lost_workers,
  parse_flags,
)

_LENGTH = 2**48  # of the "endless" sequence: Grain cannot hold a larger one


class Batches(Iterator[Batch]):
  """An endless iterator over batches of NumPy arrays.

  The state is a plain dictionary for JSON. After `set_state` the batches are the same as after
  `get_state`, with any number of workers or processes.

  Each image occurs once per epoch: a batch may hold the last images of one epoch and the first of
  the next.
  """

  def __init__(
    self,
    source: Source,
    tokenizer: Tokenizer,
    config: DataConfig,
    *,
    process: int = 0,
    processes: int = 1,
  ):
    """Prepares the sequence; nothing is read yet.

    Args:
      source: a random-access sequence of `TrainingImage`; with workers, one that can be pickled.
      tokenizer: the checkpoint's.
      config: sizes and augmentation; its `batch_size` is divided among the processes.
      process, processes: `jax.process_index()` and `jax.process_count()`.

    Raises:
      ValueError: an empty source, no sizes, or a batch size that is not a multiple of `processes`.
    """
    if not (config.image_size and config.mask_size):
      raise ValueError(
        f"batches need the sizes of images and masks; got image_size {config.image_size} and "
        f"mask_size {config.mask_size}: give DataConfig the model's."
      )
    if len(source) < 1:
      raise ValueError("the source has no images; there is nothing to train on.")
    if not 0 <= process < processes:
      raise ValueError(f"process must be in 0 .. {processes - 1}; got {process}.")
    if config.batch_size % processes:
      raise ValueError(
        f"data.batch_size {config.batch_size} must be a multiple of the {processes} processes."
      )
    self.source = source
    self.config = config
    self._make_example = _MakeExample(source, tokenizer, config)
    self._shard = process, processes
    self._next = 0
    self._running: list[Any] = []  # Grain's iterator, once it has started
    weakref.finalize(self, close_all, self._running)  # also at exit, before modules are torn down

  def __next__(self) -> Batch:
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
    """Continues where `get_state` was called.

    Raises:
      ValueError: the state is of another sequence: its seed, batch size or source differs.
    """
    for key, value in self._identity().items():
      if state.get(key) != value:
        raise ValueError(
          f"the state of the data was saved with {key} {state.get(key)!r}, but {key} is now "
          f"{value!r}; resume with the same data and settings, or start a new run."
        )
    self.close()
    self._next = int(state["batch"])

  def name(self, index: int) -> str:
    """The name of an image, for messages."""
    return self.source.name(index)

  def close(self) -> None:
    """Stops threads and worker processes; `next` starts them again."""
    close_all(self._running)

  def _identity(self) -> dict[str, int]:
    config = self.config
    return {
      "seed": config.seed,
      "images": len(self.source),
      "batch_size": config.batch_size,
      "shuffle": int(config.shuffle),
    }

  def _dataset(self, first: int) -> Any:
    """Grain's dataset of this process's batches, from batch number `first` on."""
    import grain

    config = self.config
    process, processes = self._shard
    order = grain.MapDataset.range(len(self.source))
    if config.shuffle:
      order = order.seed(config.seed).shuffle()
    batches = (
      order.repeat(_LENGTH // len(self.source) + 1)
      .map_with_index(self._make_example)
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


class _MakeExample:
  """Makes the example at a position of the sequence; can be pickled, for workers."""

  def __init__(self, source: Source, tokenizer: Tokenizer, config: DataConfig):
    self.source = source
    self.tokenizer = tokenizer
    self.config = config
    self._tokens: dict[str, np.ndarray] = {}  # cache by phrase

  def __setstate__(self, state: dict[str, Any]) -> None:
    vars(self).update(state)
    exit_with_parent()

  def __call__(self, position: int, index: int) -> Batch:
    epoch = position // len(self.source)
    generator = np.random.default_rng((self.config.seed, epoch, index))
    image = self.source[index]
    return example(TrainingImage(*image), index, self.config, self._tokenize, generator)

  def _tokenize(self, phrases: Sequence[str]) -> Int[np.ndarray, "P T"]:
    if len(self._tokens) > 2**16:
      self._tokens.clear()
    for phrase in phrases:
      if phrase not in self._tokens:
        self._tokens[phrase] = self.tokenizer([phrase])[0]
    return np.stack([self._tokens[phrase] for phrase in phrases])


def _stack(rows: Any) -> Batch:
  return jax.tree.map(lambda *arrays: np.stack(arrays), *rows)
