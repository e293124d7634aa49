"""Batches without end, the same in every run: shuffled, shared out to processes, resumable.

What a batch holds depends on the seed and the batch's number alone: an image's place in the
sequence gives the epoch, and the random numbers of its example come from (seed, epoch, image).
So the position to resume from is one number, and neither threads nor worker processes nor how
many processes share the work change what is in a batch.
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

_PLACES = 2**48  # of a sequence without end, which Grain's own length does not hold


class Batches(Iterator[Batch]):
  """An endless iterator over batches of NumPy arrays.

  Its state is a plain dictionary that JSON holds; after `set_state` the same batches come as came
  after `get_state`, also with another number of workers or processes.

  Epochs follow each other without a gap: a batch may hold the last images of one and the first of
  the next, so each image is seen once an epoch however large the batch.
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
      source: any random-access list of `TrainingImage`; with workers, one that can be pickled.
      tokenizer: the checkpoint's.
      config: its `batch` is of all processes; each gets its share.
      process, processes: which of how many this is; `jax.process_index()`, `jax.process_count()`.

    Raises:
      ValueError: an empty source, no sizes, or a batch that the processes cannot share.
    """
    if not (config.image_size and config.mask_size):
      raise ValueError(
        f"batches need the sizes of images and masks; got image_size {config.image_size} and "
        f"mask_size {config.mask_size}: give DataConfig the model's."
      )
    if len(source) < 1:
      raise ValueError("the source has no image; there is nothing to train on.")
    if not 0 <= process < processes:
      raise ValueError(f"process {process} is none of the {processes} processes (from 0).")
    if config.batch % processes:
      raise ValueError(
        f"the batch of {config.batch} images cannot be shared by {processes} processes; "
        "make it a multiple."
      )
    self.source = source
    self.config = config
    self._examples = _Examples(source, tokenizer, config)
    self._share = process, processes
    self._next = 0
    self._running: list[Any] = []  # Grain's iterator, if it was started
    weakref.finalize(self, close_all, self._running)  # at exit too, while modules are alive

  def __next__(self) -> Batch:
    if not self._running:
      self._running.append(iter(self._dataset(self._next)))
    with explain_lost_workers():
      batch = next(self._running[0])
    self._next += 1
    # A worker's arrays lie in shared memory, which is freed once they are copied.
    return jax.tree.map(np.array, batch) if self.config.workers else batch

  def get_state(self) -> dict[str, int]:
    """What `set_state` needs to go on after the batch that came last."""
    return {"batch": self._next, **self._identity()}

  def set_state(self, state: dict[str, int]) -> None:
    """Goes to where `get_state` was called.

    Raises:
      ValueError: the state is of another sequence: of another seed, batch size or source.
    """
    for key, value in self._identity().items():
      if state.get(key) != value:
        raise ValueError(
          f"the data's state was saved with {key} {state.get(key)!r}, but now it is {value!r}: "
          "go on with the same data and settings, or start anew."
        )
    self.close()
    self._next = int(state["batch"])

  def name(self, index: int) -> str:
    """What an image is called, for messages."""
    return self.source.name(index)

  def close(self) -> None:
    """Ends threads and worker processes; `next` starts them again."""
    close_all(self._running)

  def _identity(self) -> dict[str, int]:
    config = self.config
    return {
      "seed": config.seed,
      "images": len(self.source),
      "images_a_batch": config.batch,
      "shuffle": int(config.shuffle),
    }

  def _dataset(self, first: int) -> Any:
    """Grain's data set of this process's batches from number `first` on."""
    import grain

    config = self.config
    process, processes = self._share
    order = grain.MapDataset.range(len(self.source))
    if config.shuffle:
      order = order.seed(config.seed).shuffle()
    batches = (
      order.repeat(_PLACES // len(self.source) + 1)
      .map_with_index(self._examples)
      .slice(slice(first * config.batch + process, None, processes))
      .batch(config.batch // processes, batch_fn=_stack)
    )
    if not config.workers:
      threads = int(config.ahead > 0)
      return batches.to_iter_dataset(
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=config.ahead)
      )
    parse_flags()
    one_by_one = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return batches.to_iter_dataset(one_by_one).mp_prefetch(
      grain.MultiprocessingOptions(
        num_workers=config.workers, per_worker_buffer_size=max(1, config.ahead)
      )
    )


class _Examples:
  """Place in the sequence and image to an example; can be pickled, for workers."""

  def __init__(self, source: Source, tokenizer: Tokenizer, config: DataConfig):
    self.source = source
    self.tokenizer = tokenizer
    self.config = config
    self._rows: dict[str, np.ndarray] = {}

  def __setstate__(self, state: dict[str, Any]) -> None:
    vars(self).update(state)
    exit_with_parent()

  def __call__(self, place: int, index: int) -> Batch:
    epoch = place // len(self.source)
    generator = np.random.default_rng((self.config.seed, epoch, index))
    image = self.source[index]
    return example(TrainingImage(*image), index, self.config, self._tokenize, generator)

  def _tokenize(self, phrases: Sequence[str]) -> Int[np.ndarray, "P T"]:
    """The tokenizer, with a memory: phrases come again and again."""
    if len(self._rows) > 2**16:
      self._rows.clear()
    for phrase in phrases:
      if phrase not in self._rows:
        self._rows[phrase] = self.tokenizer([phrase])[0]
    return np.stack([self._rows[phrase] for phrase in phrases])


def _stack(rows: Any) -> Batch:
  return jax.tree.map(lambda *arrays: np.stack(arrays), *rows)
