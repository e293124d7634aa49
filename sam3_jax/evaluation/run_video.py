"""The work of `sam3-jax evaluate --video`: J&F of tracks, written as JSON and shown as a table."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from sam3_jax.datasets import video_annotations
from sam3_jax.evaluation import track_predictions
from sam3_jax.evaluation.session_tracker import session_tracker
from sam3_jax.evaluation.tracking import PROMPTS, evaluate_tracking
from sam3_jax.inference.predictor import Sam3
from sam3_jax.outputs.coco_json import json_of, write
from sam3_jax.utils.console import Console, loading, progress, say
from sam3_jax.utils.notes import Notes
from sam3_jax.utils.param_tree import raise_faults


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoJob:
  """What to score, and where to write the metrics.

  Attributes:
    data: annotation file in YouTube-VIS's layout.
    frames: directory of the frames; None for JPEGImages beside `data`.
    checkpoint: directory of the model that tracks; None to score `predictions`.
    predictions: file of predicted tracks; None to use the model.
    assign: how predicted tracks are assigned to objects.
    prompts: kinds of prompts for the model.
    out: JSON file of the metrics.
  """

  data: Path
  out: Path
  frames: Path | None = None
  checkpoint: Path | None = None
  predictions: Path | None = None
  assign: track_predictions.Assign = "id"
  prompts: Sequence[str] = PROMPTS

  @property
  def folder(self) -> Path:
    """The directory of the frames."""
    return video_annotations.frame_folder(self.data) if self.frames is None else self.frames

  def check(self) -> None:
    """Raises ValueError if the output would overwrite an input."""
    if self.out.resolve() in {
      given.resolve() for given in (self.data, self.predictions) if given is not None
    }:
      raise ValueError(f"{self.out} is an input and would be overwritten; choose another --out.")


def run(job: VideoJob, dtype: str | None, console: Console, errors: Console) -> dict[str, Any]:
  """Does a job; writes the metrics at its end.

  Args:
    job: what to do.
    dtype: as in `Sam3.from_checkpoint`.
    console: for the table and the path; if it is quiet, no progress and notes are shown either.
    errors: for progress and notes.

  Returns:
    The metrics, as written.

  Raises:
    ValueError, OSError: the job cannot be done.
  """
  job.check()
  notes, track = Notes(), None
  if job.checkpoint is not None:
    with loading(errors, job.checkpoint, quiet=console.quiet) as step:
      model = Sam3.from_checkpoint(job.checkpoint, dtype=dtype, verify=True, progress=step)
    track = session_tracker(model)
  with progress(errors, bar=True, quiet=console.quiet) as step:
    step(f"reading {job.data.name}", 0)
    videos = video_annotations.read(job.data, notes=notes)
    if track is not None:
      faults = video_annotations.check(videos, job.folder)
      raise_faults(faults, str(job.data), video_annotations.REMEDY)
      metrics = evaluate_tracking(track, videos, job.folder, job.prompts, progress=step)
    elif job.predictions is not None:
      tracks = track_predictions.read(job.predictions, videos)
      metrics = track_predictions.score(videos, tracks, job.assign, progress=step)
    else:
      raise ValueError("there is neither a checkpoint nor a file of predictions; give one of them.")
    step("writing", 1)
    write({job.out: json_of(metrics)})
  for line in [] if console.quiet else notes.lines():
    say(errors, line)
  _show(job, metrics, console)
  return metrics


def _show(job: VideoJob, metrics: dict[str, Any], console: Console) -> None:
  """Prints the table of metrics and the path of the file."""
  if console.quiet:
    return
  source = job.checkpoint or job.predictions
  counts = f"{metrics['videos']:,} videos, {metrics['objects']:,} objects"
  table = Table(title=Text(f"{source}, {counts}"))
  table.add_column()
  columns = {"J&F": "jf", "J": "j", "recall": "j_recall", "decay": "j_decay"}
  columns |= {"F": "f", " recall": "f_recall", " decay": "f_decay"}
  for heading in columns:
    table.add_column(heading, justify="right")
  for kind, figures in metrics.items():
    if isinstance(figures, dict):
      table.add_row(kind, *(f"{figures[name]:.1f}" for name in columns.values()))
  console.print(table)
  say(console, str(job.out))
