"""What a batch job is, and what stops it."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sam3_jax.batch import parts
from sam3_jax.batch.inputs import Input
from sam3_jax.batch.prompt_schema import pointing
from sam3_jax.batch.run_stats import Tally
from sam3_jax.inference.predictor import Sam3
from sam3_jax.inputs.preprocess import MAX_PIXELS

SEEN = 100  # images before which the share of failures says nothing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
  """What to segment, how, and where to.

  Attributes:
    inputs: all of them, of all processes.
    out: output directory; made when there is something to write.
    threshold: instances score above it.
    max_detections: of each prompt, the best.
    max_pixels: larger images are refused.
    part_size: inputs of a part.
    images, prompts: of a batch, and of a round, on each device; see `Engine`.
    workers: processes that read images; 0 for threads.
    max_error_rate: more failures than this share stop the job.
    process, processes: which of how many this is.
    add: whether inputs that the job in `out` does not have extend it.
    retry_failed: whether inputs that failed are done again.
    skip_unreadable: whether inputs that cannot be read, at no try, count as failed.
  """

  inputs: Sequence[Input]
  out: Path
  threshold: float = 0.5
  max_detections: int = 100
  max_pixels: int = MAX_PIXELS
  part_size: int = 256
  images: int = 4
  prompts: int | None = None
  workers: int = 0
  max_error_rate: float = 0.05
  process: int = 0
  processes: int = 1
  add: bool = False
  retry_failed: bool = False
  skip_unreadable: bool = False

  def describe(self, model: Sam3) -> dict[str, Any]:
    """What decides the results, beside the inputs."""
    return {
      "part_size": self.part_size,
      "checkpoint": model.info,
      "checkpoint_identity": model.identity,
      "dtype": model.dtype.name,
      "threshold": self.threshold,
      "max_detections": self.max_detections,
      "max_pixels": self.max_pixels,
    }

  @functools.cached_property
  def visual(self) -> bool:
    """Whether there are visual prompts, whosever part they are in."""
    return any(pointing(one.prompts) for one in self.inputs)

  def is_mine(self, part: int) -> bool:
    return part % self.processes == self.process


class TooManyFailuresError(ValueError):
  """More inputs failed than the job allows."""


class StorageError(OSError):
  """So many inputs cannot be read that the storage must be away; the same command resumes."""


def check_failures(job: Job, tally: Tally, at_end: bool = False) -> None:
  """Stops a job of which too much fails.

  Args:
    job: what is allowed.
    tally: what became of its inputs so far.
    at_end: judge by all that was seen, even if that is little; before, by at least `SEEN`.

  Raises:
    TooManyFailuresError: more failed than allowed.
    StorageError: more could not be read.
  """
  seen = tally.seen
  allowed = job.max_error_rate * (seen if at_end else max(seen, SEEN))
  if tally.all_failed > allowed:
    raise TooManyFailuresError(
      f"{tally.all_failed:,} of {seen:,} images failed, more than --max-error-rate "
      f"{job.max_error_rate:g} allows; {job.out / parts.ERRORS} says why. What is done stays; "
      "to resume, rerun with a higher --max-error-rate."
    )
  missed = len(tally.unreadable)
  if missed > job.max_error_rate * max(seen + missed, SEEN) and not at_end:
    raise StorageError(
      f"{missed:,} of {seen + missed:,} images cannot be read, more than --max-error-rate "
      f"{job.max_error_rate:g} allows: {tally.some_unreadable()}. Check that the storage is there "
      "and rerun the same command to resume."
    )
