"""What a batch job is, and what stops it."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sam3_jax.batch import parts
from sam3_jax.batch.asked import pointing
from sam3_jax.batch.inputs import Input, digest
from sam3_jax.batch.tally import Tally
from sam3_jax.inference import Sam3
from sam3_jax.preprocess import MAX_PIXELS

SEEN = 100  # pictures before which the share of failures says nothing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
  """What to segment, how, and where to.

  Attributes:
    inputs: all of them, of all processes.
    out: folder; made when there is something to write.
    checkpoint_sha256: of the checkpoint's manifest, which has the checksums of its parameters.
    threshold: instances score above it.
    max_detections: of each prompt, the best.
    max_pixels: larger pictures are refused.
    part_size: inputs of a part.
    images, prompts: of a batch, and of a round, on each device; see `Engine`.
    workers: processes that read pictures; 0 for threads.
    max_error_rate: more failures than this share stop the job.
    process, processes: which of how many this is.
  """

  inputs: Sequence[Input]
  out: Path
  checkpoint_sha256: str
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

  def describe(self, model: Sam3) -> dict[str, Any]:
    """What has to be the same for all who work on the job: all that decides its results."""
    return {
      "inputs": len(self.inputs),
      "inputs_sha256": digest(self.inputs),
      "part_size": self.part_size,
      "checkpoint": model.info,
      "checkpoint_sha256": self.checkpoint_sha256,
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


def check_failures(job: Job, tally: Tally, at_end: bool = False) -> None:
  """Raises TooManyFailuresError if more failed than allowed: of what was seen at the end, before
  that of at least `SEEN`."""
  seen = tally.done + tally.failed
  if tally.failed > job.max_error_rate * (seen if at_end else max(seen, SEEN)):
    raise TooManyFailuresError(
      f"{tally.failed:,} of {seen:,} pictures failed, more than --max-error-rate "
      f"{job.max_error_rate:g} allows; {job.out / parts.ERRORS} says why. What is done stays; a "
      "higher --max-error-rate goes on."
    )
