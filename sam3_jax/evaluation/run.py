"""The work of `sam3-jax evaluate`: truths and predictions in, figures, a table and a page out."""

import dataclasses
import heapq
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.table import Table
from rich.text import Text

from sam3_jax.datasets import annotations
from sam3_jax.datasets.annotations import Pair
from sam3_jax.evaluation import clicks, predictions
from sam3_jax.evaluation import error_gallery as worst
from sam3_jax.evaluation.coco import average_precision
from sam3_jax.evaluation.concept import Counts
from sam3_jax.evaluation.predict import LEAST, Ask, predict
from sam3_jax.evaluation.predictions import Found
from sam3_jax.evaluation.score import Scorer
from sam3_jax.inference.mask_generator import MaskGeneration
from sam3_jax.inference.predictor import Sam3
from sam3_jax.outputs.coco_json import Write, json_of, write
from sam3_jax.utils.console import Console, Step, loading, progress, say
from sam3_jax.utils.notes import Notes
from sam3_jax.utils.param_tree import raise_faults

PREDICTIONS, PAGE = "predictions.json", "worst"  # beside the figures


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
  """What to score, how, and where to.

  Attributes:
    data: annotation files, one for each annotator.
    images: the folder of their images; None for that of the first annotation file.
    checkpoint: folder of the model that predicts; None to score `predictions`.
    predictions: a file in COCO's results layout; None to ask the model.
    prompt: what the model is told, or was told.
    threshold: the least score at which a prediction counts.
    out: JSON file of the figures.
    worst: pairs on the page of the worst; 0 for no page.
    pointing: in place of `prompt`, what `run_visual` scores.
    generation: how to look for everything; None for the usual options.
  """

  data: Sequence[Path]
  images: Path | None
  checkpoint: Path | None
  predictions: Path | None
  prompt: Ask
  threshold: float
  out: Path
  worst: int
  pointing: Literal["click", "everything"] | None = None
  generation: MaskGeneration | None = None

  @property
  def folder(self) -> Path:
    """Of the images."""
    return self.data[0].parent if self.images is None else self.images

  def check(self) -> None:
    """Raises ValueError where an output would replace an input."""
    outputs = [self.out] + [self.out.with_name(PREDICTIONS)] * (self.predictions is None)
    inputs = [*self.data, *([self.predictions] if self.predictions else [])]
    for path in outputs:
      if path.resolve() in {one.resolve() for one in inputs}:
        raise ValueError(f"{path} is an input and would be overwritten; choose another --out.")


def run(job: Job, dtype: str | None, console: Console, errors: Console) -> dict[str, Any]:
  """Does a job; all files appear at its end, or none.

  Args:
    job: what to do.
    dtype: as in `Sam3.from_checkpoint`.
    console: for the table and the paths; if it is quiet, there are no progress and notes either.
    errors: for progress and notes.

  Returns:
    The figures, as written.

  Raises:
    ValueError, OSError: whatever goes wrong.
  """
  job.check()
  notes = Notes()
  truths = [annotations.read(path, notes=notes) for path in job.data]
  scorer = Scorer(*truths, prompt=job.prompt, score=job.threshold)
  model = None
  if job.checkpoint is not None:
    with loading(errors, job.checkpoint, quiet=console.quiet) as step:
      model = Sam3.from_checkpoint(job.checkpoint, dtype=dtype, verify=True, progress=step)
  with progress(errors, bar=True, quiet=console.quiet) as step:
    _check(job, scorer.pairs, model)
    found: dict[int, list[predictions.Prediction]] = {}
    rows = []
    given, left_out = {}, 0
    if job.predictions:
      given, left_out = predictions.read(job.predictions, truths[0], notes)
    for pair, one in _found(job, scorer.pairs, given, model, step):
      found[pair.id] = one
      rows.append((pair, scorer.add(pair, one)))
    step("average precision", 1)
    metrics = scorer.metrics() | average_precision(scorer.pairs, found)
    step("writing", 1)
    write(_files(job, metrics, found, rows))
  _say(notes, console, errors)
  if left_out and not console.quiet:
    say(
      errors,
      f"note: {left_out:,} predictions are left out: no pair asks for their category in their "
      "image.",
    )
  if model is not None and model.info.get("trained") is False and not console.quiet:
    name = job.checkpoint.name if job.checkpoint else ""
    say(errors, f"note: {name} is untrained, its parameters are random: its figures mean nothing.")
  _show(job, metrics, console, errors)
  return metrics


def run_visual(job: Job, dtype: str | None, console: Console, errors: Console) -> dict[str, Any]:
  """Likewise for a job that is `pointing`: by clicks and boxes for each object, or everything there
  is. No predictions are written, and neither prompt nor threshold has a part in it."""
  job.check()
  notes = Notes()
  [pairs] = [annotations.read(path, notes=notes) for path in job.data]
  folder = job.checkpoint or Path()
  with loading(errors, folder, quiet=console.quiet) as step:
    model = Sam3.from_checkpoint(folder, dtype=dtype, verify=True, progress=step)
  with progress(errors, bar=True, quiet=console.quiet) as step:
    step(f"reading {job.data[0].name}", 0)
    _check(job, pairs, model)
    if job.pointing == "everything":
      metrics = clicks.evaluate_everything(model, pairs, job.folder, job.generation, progress=step)
    else:
      metrics = clicks.evaluate(model, pairs, job.folder, progress=step)
    write({job.out: json_of(metrics)})
  _say(notes, console, errors)
  for name, value in metrics.items():
    say(console, f"{name:12} {value:.1f} %" if isinstance(value, float) else f"{name:12} {value:,}")
  say(console, str(job.out))
  return metrics


def _say(notes: Notes, console: Console, errors: Console) -> None:
  """What the data had that is worth a line, unless the console is quiet."""
  for line in [] if console.quiet else notes.lines():
    say(errors, line)


def _check(job: Job, pairs: Sequence[Pair], model: Sam3 | None) -> None:
  """All faults of images and phrases that would stop the work later, in one report."""
  bare = [dataclasses.replace(pair, objects=()) for pair in pairs]
  opened = job.folder if model is not None or job.worst else None
  faults = annotations.check(bare, opened, model.tokenizer if model else None)
  raise_faults(faults, str(job.data[0]), annotations.REMEDY)


def _found(
  job: Job, pairs: Sequence[Pair], given: Found, model: Sam3 | None, step: Step
) -> Iterator[tuple[Pair, list[predictions.Prediction]]]:
  if model is not None:
    least = min(LEAST, job.threshold)
    yield from predict(model, pairs, job.folder, prompt=job.prompt, least=least, progress=step)
  elif job.predictions is not None:
    for i, pair in enumerate(pairs):
      step(job.predictions.name, i / len(pairs))
      yield pair, list(given.get(pair.id, ()))


def _files(
  job: Job, metrics: dict[str, Any], found: Found, rows: Sequence[tuple[Pair, Counts]]
) -> dict[Path, Write]:
  files = {job.out: json_of(metrics)}
  if job.predictions is None:
    files[job.out.with_name(PREDICTIONS)] = json_of(
      predictions.to_coco(found, [pair for pair, _ in rows])
    )
  if job.worst:
    least = heapq.nsmallest(job.worst, rows, key=lambda row: worst.order(row[1]))
    folder = job.out.with_name(PAGE)
    count = len(rows)
    files |= worst.page(least, found, job.folder, folder, pairs=count, score=job.threshold)
  return files


def _show(job: Job, metrics: dict[str, Any], console: Console, errors: Console) -> None:
  if console.quiet:
    return
  source = job.checkpoint or job.predictions
  asked = {"text": "phrases", "box": "a box each", "text+box": "phrases, and a box if there is one"}
  table = Table(title=Text(f"{source}, {metrics['pairs']:,} pairs, asked by {asked[job.prompt]}"))
  table.add_column()
  for heading in ("Masks", "at 0.50", "at 0.75", "Boxes", "at 0.50", "at 0.75"):
    table.add_column(heading, justify="right")
  rows = {"cgF1": "cgf1", "IL_MCC": "il_mcc", "pmF1": "pmf1", "F1": "f1", "AP": "ap"}
  for heading, name in rows.items():
    keys = [box + name + overlap for box in ("", "box_") for overlap in ("", "_50", "_75")]
    digits = 3 if name == "il_mcc" else 1
    cells = ["" if (v := metrics.get(key)) is None else f"{v:.{digits}f}" for key in keys]
    table.add_row(heading, *cells)
  if job.prompt == "box":
    note = "note: pairs without objects are left out, so IL_MCC and cgF1 say nothing; see pmF1."
    say(errors, note)
  console.print(table)
  say(console, str(job.out))
  if job.predictions is None:
    say(console, str(job.out.with_name(PREDICTIONS)))
  if job.worst:
    say(console, str(job.out.with_name(PAGE) / "index.html"))
