"""What `sam3-jax evaluate --video` is to do."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from sam3_jax.datasets import video_annotations
from sam3_jax.evaluation.cgf1 import THRESHOLD
from sam3_jax.evaluation.track_predictions import Assign
from sam3_jax.evaluation.tracking import PROMPTS

PREDICTIONS, PAGE = "predictions.json", "worst"  # beside the metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoJob:
  """What to score, and where to write the metrics.

  Attributes:
    data: annotation file in YouTube-VIS's layout, or in that of SA-Co/VEval.
    frames: directory of the frames; None for JPEGImages beside `data`.
    checkpoint: directory of the model that tracks; None to score `predictions`.
    predictions: file of predicted tracks; None to use the model.
    concepts: evaluate concepts if `data` has pairs of videos and phrases; otherwise J&F.
    threshold: minimum score of a track of a concept, inclusive.
    worst: number of pairs on the page of the worst pairs; 0 for no page.
    assign: how predicted tracks are assigned to objects, for J&F.
    prompts: kinds of prompts for the model, for J&F.
    out: JSON file of the metrics.
  """

  data: Path
  out: Path
  frames: Path | None = None
  checkpoint: Path | None = None
  predictions: Path | None = None
  concepts: bool = True
  threshold: float = THRESHOLD
  worst: int = 0
  assign: Assign = "id"
  prompts: Sequence[str] = PROMPTS

  @property
  def folder(self) -> Path:
    """The directory of the frames."""
    return video_annotations.frame_folder(self.data) if self.frames is None else self.frames

  @property
  def source(self) -> Path:
    """The checkpoint or the file of predictions; raises ValueError if there is neither."""
    if (found := self.checkpoint or self.predictions) is None:
      raise ValueError("there is neither a checkpoint nor a file of predictions; give one of them.")
    return found

  def check(self) -> None:
    """Raises ValueError if there is nothing to score, or an output would overwrite an input."""
    outputs = [self.out]
    if self.source == self.checkpoint and self.concepts:
      outputs.append(self.out.with_name(PREDICTIONS))
    inputs = {given.resolve() for given in (self.data, self.predictions) if given is not None}
    for path in outputs:
      if path.resolve() in inputs:
        raise ValueError(f"{path} is an input and would be overwritten; choose another --out.")
