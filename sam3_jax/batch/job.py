"""The settings of a batch job, and the errors that stop it."""

import abc
import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from sam3_jax.batch.image_bytes import read_image_bytes
from sam3_jax.batch.input_list import Input, image_file
from sam3_jax.batch.job_files import ERRORS
from sam3_jax.batch.prompt_schema import visual_prompts
from sam3_jax.batch.run_stats import RunStats
from sam3_jax.inference.predictor import Sam3
from sam3_jax.inputs.preprocess import MAX_PIXELS
from sam3_jax.inputs.tiling import Tiling
from sam3_jax.utils.identity import FileIdentity

MIN_SAMPLE = 100  # inputs; with fewer, the error rate is not meaningful


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchJob(abc.ABC):
  """What to process, and where to write the results.

  Attributes:
    noun: what an input is called in messages and files.
    inputs: all inputs, of all processes.
    out: output directory; created when there is something to write.
    part_size: inputs per part.
    max_error_rate: the job stops when a larger fraction of the inputs fails.
    process, processes: index of this process, and their number.
    add: whether inputs that the job in `out` does not have extend it.
    retry_failed: whether failed inputs are done again.
    skip_unreadable: whether inputs that remain unreadable after all retries count as failed.
    frozen_input: makes inputs of the job's list that are not among `inputs`; with it, inputs that
      the job does not have are ignored unless `add` is set. See `inputs.frozen_input`.
  """

  noun: ClassVar[str]

  inputs: Sequence[Input]
  out: Path
  part_size: int = 256
  max_error_rate: float = 0.05
  process: int = 0
  processes: int = 1
  add: bool = False
  retry_failed: bool = False
  skip_unreadable: bool = False
  frozen_input: Callable[[str, FileIdentity | None], Input] | None = None

  @abc.abstractmethod
  def check(self, model: Sam3) -> None:
    """Raises ValueError if the model cannot do the job, before anything is written; ImportError if
    a package is missing."""

  @abc.abstractmethod
  def settings(self, model: Sam3) -> dict[str, Any]:
    """Everything that determines the results, except the inputs."""

  @abc.abstractmethod
  def read_identity(self, item: Input) -> FileIdentity:
    """Reads an input for the digest of its content; raises OSError or `UnusableFileError`."""

  def owns(self, part: int) -> bool:
    """Whether a part belongs to this process."""
    return part % self.processes == self.process


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job(BatchJob):
  """A job of images.

  Attributes:
    threshold: minimum score of an instance, exclusive.
    max_detections: maximum number of instances for each prompt; the best are kept.
    max_pixels: larger images are refused.
    tiling: the windows in which to segment each image; None for images as a whole.
    batch_images, batch_prompts: images per batch, and prompts decoded at a time, on each device;
      see `Engine`.
    workers: processes that read images; 0 for threads.
  """

  noun = "image"

  threshold: float = 0.5
  max_detections: int = 100
  max_pixels: int = MAX_PIXELS
  tiling: Tiling | None = None
  batch_images: int = 4
  batch_prompts: int | None = None
  workers: int = 0

  def check(self, model: Sam3) -> None:
    if self.tiling and self.has_visual_prompts:
      raise ValueError(
        "--tile takes phrases, exemplar boxes and concepts, but an image has a visual prompt "
        "(points, or a box with visual: true); remove such prompts, or leave out --tile."
      )
    if self.has_visual_prompts:
      model.visual_params()

  def settings(self, model: Sam3) -> dict[str, Any]:
    return {
      "part_size": self.part_size,
      "checkpoint": model.info,
      "checkpoint_identity": model.identity,
      "dtype": model.dtype.name,
      "threshold": self.threshold,
      "max_detections": self.max_detections,
      "max_pixels": self.max_pixels,
      "tile": self.tiling and self.tiling.tile,
      "overlap": self.tiling and self.tiling.overlap,
    }

  @functools.cached_property
  def has_visual_prompts(self) -> bool:
    """Whether any input has a visual prompt, whichever process handles it."""
    return any(visual_prompts(item.prompts) for item in self.inputs)

  def read_identity(self, item: Input) -> FileIdentity:
    return read_image_bytes(image_file(item))[1]


class TooManyFailuresError(ValueError):
  """More inputs failed than the job allows."""


class StorageError(OSError):
  """Too many inputs cannot be read: the storage is probably unavailable; the job can be
  resumed."""


def check_failures(job: BatchJob, stats: RunStats, at_end: bool = False) -> None:
  """Stops a job in which too many inputs fail.

  Args:
    job: says how many may fail.
    stats: outcome of the inputs so far.
    at_end: compare with the number of inputs processed, even if it is small; before the end, with
      at least `MIN_SAMPLE`.

  Raises:
    TooManyFailuresError: more inputs failed than allowed.
    StorageError: more inputs could not be read than allowed.
  """
  processed = stats.processed
  allowed = job.max_error_rate * (processed if at_end else max(processed, MIN_SAMPLE))
  if stats.all_failed > allowed:
    raise TooManyFailuresError(
      f"{stats.all_failed:,} of {processed:,} {job.noun}s failed, more than --max-error-rate "
      f"{job.max_error_rate:g} allows; {job.out / ERRORS} says why. Finished results are kept; "
      "to resume, rerun with a higher --max-error-rate."
    )
  missed = len(stats.unreadable)
  total = processed + missed
  if missed > job.max_error_rate * max(total, MIN_SAMPLE) and not at_end:
    raise StorageError(
      f"{missed:,} of {total:,} {job.noun}s cannot be read, more than --max-error-rate "
      f"{job.max_error_rate:g} allows: {stats.describe_unreadable()}. Check the storage and rerun "
      "the same command to resume."
    )
