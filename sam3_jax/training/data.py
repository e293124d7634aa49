"""Batches of images for training; `batch_sequence` says how they are ordered and resumed."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from sam3_jax.inputs.tokenizer import Tokenizer
from sam3_jax.training.batch import Batch
from sam3_jax.training.batch_sequence import BatchSequence, MakeExample
from sam3_jax.training.examples import DataConfig, Source, TrainingImage, example


class Batches(BatchSequence[Batch]):
  """An endless iterator over batches of NumPy arrays; each image occurs once per epoch."""

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
    if len(source) < 1:
      raise ValueError("the source has no images; there is nothing to train on.")
    super().__init__(
      config,
      len(source),
      _MakeExample(source, tokenizer, config),
      {"images": len(source), "shuffle": int(config.shuffle)},
      what="data",
      shuffle=config.shuffle,
      process=process,
      processes=processes,
    )
    self.source = source

  def name(self, index: int) -> str:
    """The name of an image, for messages."""
    return self.source.name(index)


class _MakeExample(MakeExample):
  def __init__(self, source: Source, tokenizer: Tokenizer, config: DataConfig):
    self.source = source
    self.tokenizer = tokenizer
    self.config = config
    self._tokens: dict[str, np.ndarray] = {}  # cache by phrase

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
