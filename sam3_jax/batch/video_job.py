"""The settings of a batch job of videos."""

import dataclasses
import os
from typing import Any

from sam3_jax.batch.input_list import Input
from sam3_jax.batch.job import BatchJob
from sam3_jax.batch.local_video import read_identity
from sam3_jax.inference.predictor import Sam3
from sam3_jax.inputs.video_container import import_av
from sam3_jax.storage.urls import is_url
from sam3_jax.utils.identity import FileIdentity


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoJob(BatchJob):
  """A job of videos, whose prompts are phrases.

  The rules of tracking are those of the checkpoint, and belong to its identity.

  Attributes:
    part_size: videos per part. A killed process loses the videos of its part that were done, so it
      is 1; a larger one makes fewer files of many short videos.
  """

  noun = "video"

  part_size: int = 1

  def check(self, model: Sam3) -> None:
    _ = model.video_programs
    if any(is_url(item.path) or not os.path.isdir(item.path) for item in self.inputs):
      import_av()

  def settings(self, model: Sam3) -> dict[str, Any]:
    return {
      "noun": self.noun,
      "part_size": self.part_size,
      "checkpoint": model.info,
      "checkpoint_identity": model.identity,
      "dtype": model.dtype.name,
    }

  def read_identity(self, item: Input) -> FileIdentity:
    return read_identity(item)
