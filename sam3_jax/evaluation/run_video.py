"""The work of `sam3-jax evaluate --video`: scores tracks, and writes the metrics and a table."""

from typing import Any

from rich.table import Table
from rich.text import Text

from sam3_jax.datasets import video_annotations
from sam3_jax.datasets.video_annotations import Concepts
from sam3_jax.evaluation import run_concepts, track_predictions
from sam3_jax.evaluation.session_tracker import session_tracker
from sam3_jax.evaluation.tracking import evaluate_tracking
from sam3_jax.evaluation.video_job import VideoJob
from sam3_jax.inference.predictor import Sam3
from sam3_jax.outputs.coco_json import json_of, write
from sam3_jax.utils.console import Console, Step, loading, progress, say
from sam3_jax.utils.notes import Notes
from sam3_jax.utils.param_tree import raise_faults

__all__ = ["VideoJob", "run"]


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
  notes = Notes()
  with progress(errors, bar=True, quiet=console.quiet) as step:
    step(f"reading {job.data.name}", 0)
    data = _read(job, notes)
  by_concepts = any(video.pairs for video in data.videos) and job.concepts
  if job.worst and not by_concepts:
    raise ValueError(
      f"--worst {job.worst} needs a file with `video_np_pairs`, and --prompt text; leave it out."
    )
  model = None
  if job.checkpoint is not None:
    with loading(errors, job.checkpoint, quiet=console.quiet) as step:
      model = Sam3.from_checkpoint(job.checkpoint, dtype=dtype, verify=True, progress=step)
  with progress(errors, bar=True, quiet=console.quiet) as step:
    if model is not None or job.worst:
      faults = video_annotations.check(data.videos, job.folder)
      raise_faults(faults, str(job.data), video_annotations.REMEDY)
    if by_concepts:
      metrics = run_concepts.run(job, data, model, notes, step)
    else:
      metrics = _measure(job, data, model, step)
      step("writing", 1)
      write({job.out: json_of(metrics)})
  for line in [] if console.quiet else notes.lines():
    say(errors, line)
  if model is not None and model.info.get("trained") is False and not console.quiet:
    name = job.checkpoint.name if job.checkpoint else ""
    say(errors, f"note: {name} is untrained, its parameters are random: the metrics mean nothing.")
  if not console.quiet:
    (run_concepts.show if by_concepts else _show)(job, metrics, console)
  return metrics


def _read(job: VideoJob, notes: Notes) -> Concepts:
  if job.concepts:
    return video_annotations.read_concepts(job.data, notes=notes)
  return Concepts(video_annotations.read(job.data, notes=notes), {})


def _measure(job: VideoJob, data: Concepts, model: Sam3 | None, step: Step) -> dict[str, Any]:
  """J&F of prompted objects, or of predicted tracks."""
  if model is not None:
    track = session_tracker(model)
    return evaluate_tracking(track, data.videos, job.folder, job.prompts, progress=step)
  tracks = track_predictions.read(job.source, data.videos)
  return track_predictions.score(data.videos, tracks, job.assign, progress=step)


def _show(job: VideoJob, metrics: dict[str, Any], console: Console) -> None:
  """Prints the table of metrics and the path of the file."""
  counts = f"{metrics['videos']:,} videos, {metrics['objects']:,} objects"
  table = Table(title=Text(f"{job.source}, {counts}"))
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
