"""Batches of clips for training; `batch_sequence` says how they are ordered and resumed, and
`video_examples` what a clip is."""

import numpy as np

from sam3_jax.training.batch_sequence import BatchSequence, MakeExample
from sam3_jax.training.video_examples import ClipBatch, ClipConfig, clip_example


class ClipBatches(BatchSequence[ClipBatch]):
  """An endless iterator over batches of NumPy arrays; each moving scene occurs once per epoch."""

  def __init__(self, config: ClipConfig, *, process: int = 0, processes: int = 1):
    """Prepares the sequence; no scene is composed yet.

    Args:
      config: `batch_size` is divided among the processes.
      process, processes: `jax.process_index()` and `jax.process_count()`.

    Raises:
      ValueError: no sizes, or a batch size that is not a multiple of `processes`.
    """
    super().__init__(
      config,
      config.count,
      _MakeClip(config),
      {"scenes": config.count},
      what="clips",
      shuffle=False,
      process=process,
      processes=processes,
    )

  def name(self, index: int) -> str:
    """What to compose again, for messages."""
    return f"moving scene {index} of seed {self.config.seed}"


class _MakeClip(MakeExample):
  def __init__(self, config: ClipConfig):
    self.config = config

  def __call__(self, position: int, index: int) -> ClipBatch:
    generator = np.random.default_rng((self.config.seed, position // self.config.count, index))
    return clip_example(index, self.config, generator)
