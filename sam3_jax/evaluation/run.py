"""The work of `sam3-jax evaluate`: scores predictions, and writes metrics, a table and a page."""

import dataclasses
import heapq
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.table import Table
from rich.text import Text

from sam3_jax.datasets import annotations
from sam3_jax.datasets.annotations import Pair
from sam3_jax.evaluation import clicks, error_gallery, mask_generation, predictions
from sam3_jax.evaluation.average_precision import average_precision
from sam3_jax.evaluation.cgf1 import PairCounts
from sam3_jax.evaluation.detect import MIN_SCORE, PromptKind, detect_pairs
from sam3_jax.evaluation.predictions import EvalPrediction, PredictionsByPair
from sam3_jax.evaluation.score import Scorer
from sam3_jax.inference.mask_generator import MaskGeneration
from sam3_jax.inference.predictor import Sam3
from sam3_jax.outputs.coco_json import Write, json_of, write
from sam3_jax.utils.console import Console, Step, loading, progress, say
from sam3_jax.utils.notes import Notes
from sam3_jax.utils.param_tree import raise_faults

PREDICTIONS, PAGE = "predictions.json", "worst"  # beside the metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
  """What to score, how, and where to write the results.

  Attributes:
    data: annotation files, one for each annotator.
    images: the directory of the images; None for that of the first annotation file.
    checkpoint: directory of the model; None to score `predictions`.
    predictions: a file of COCO results; None to use the model.
    prompt: kind of the prompts.
    threshold: minimum score of a prediction, inclusive.
    out: JSON file of the metrics.
    worst: number of pairs on the page of the worst pairs; 0 for no page.
    visual: evaluate clicks and boxes, or mask generation ("everything"), instead of `prompt`.
    generation: options of mask generation; None for the defaults.
  """

  data: Sequence[Path]
  images: Path | None
  checkpoint: Path | None
  predictions: Path | None
  prompt: PromptKind
  threshold: float
  out: Path
  worst: int
  visual: Literal["click", "everything"] | None = None
  generation: MaskGeneration | None = None

  @property
  def folder(self) -> Path:
    """The directory of the images."""
    return self.data[0].parent if self.images is None else self.images

  def check(self) -> None:
    """Raises ValueError if an output would overwrite an input."""
    outputs = [self.out] + [self.out.with_name(PREDICTIONS)] * (self.predictions is None)
    inputs = [*self.data, *([self.predictions] if self.predictions else [])]
    for path in outputs:
      if path.resolve() in {given.resolve() for given in inputs}:
        raise ValueError(f"{path} is an input and would be overwritten; choose another --out.")


def run(job: Job, dtype: str | None, console: Console, errors: Console) -> dict[str, Any]:
  """Does a job; writes all files at its end, or none.

  Args:
    job: what to do.
    dtype: as in `Sam3.from_checkpoint`.
    console: for the table and the paths; if it is quiet, no progress and notes are shown either.
    errors: for progress and notes.

  Returns:
    The metrics, as written.

  Raises:
    ValueError, OSError: the job cannot be done.
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
    found: dict[int, list[EvalPrediction]] = {}
    scored = []
    given, left_out = {}, 0
    if job.predictions:
      given, left_out = predictions.read(job.predictions, truths[0], notes)
    for pair, pair_predictions in _predictions(job, scorer.pairs, given, model, step):
      found[pair.id] = pair_predictions
      scored.append((pair, scorer.add(pair, pair_predictions)))
    step("average precision", 1)
    metrics = scorer.metrics() | average_precision(scorer.pairs, found)
    step("writing", 1)
    write(_files(job, metrics, found, scored))
  _show_notes(notes, console, errors)
  if left_out and not console.quiet:
    say(
      errors,
      f"note: {left_out:,} predictions are left out: no pair has their category and image.",
    )
  if model is not None and model.info.get("trained") is False and not console.quiet:
    name = job.checkpoint.name if job.checkpoint else ""
    say(errors, f"note: {name} is untrained, its parameters are random: the metrics mean nothing.")
  _show(job, metrics, console, errors)
  return metrics


def run_visual(job: Job, dtype: str | None, console: Console, errors: Console) -> dict[str, Any]:
  """As `run`, for a job with `visual`: clicks and boxes for each object, or mask generation.

  Predictions are not written, and `prompt` and `threshold` are not used.
  """
  job.check()
  if job.checkpoint is None:
    raise ValueError("a job with visual prompts needs a checkpoint.")
  notes = Notes()
  [pairs] = [annotations.read(path, notes=notes) for path in job.data]
  with loading(errors, job.checkpoint, quiet=console.quiet) as step:
    model = Sam3.from_checkpoint(job.checkpoint, dtype=dtype, verify=True, progress=step)
  with progress(errors, bar=True, quiet=console.quiet) as step:
    step(f"reading {job.data[0].name}", 0)
    _check(job, pairs, model)
    if job.visual == "everything":
      metrics = mask_generation.evaluate(model, pairs, job.folder, job.generation, progress=step)
    else:
      metrics = clicks.evaluate(model, pairs, job.folder, progress=step)
    write({job.out: json_of(metrics)})
  _show_notes(notes, console, errors)
  for name, value in metrics.items():
    say(console, f"{name:12} {value:.1f} %" if isinstance(value, float) else f"{name:12} {value:,}")
  say(console, str(job.out))
  return metrics


def _show_notes(notes: Notes, console: Console, errors: Console) -> None:
  """Shows the notes about the data, unless the console is quiet."""
  for line in [] if console.quiet else notes.lines():
    say(errors, line)


def _check(job: Job, pairs: Sequence[Pair], model: Sam3 | None) -> None:
  """Reports all faults of images and phrases that would stop the work later."""
  without_objects = [dataclasses.replace(pair, objects=()) for pair in pairs]
  opened = job.folder if model is not None or job.worst else None
  faults = annotations.check(without_objects, opened, model.tokenizer if model else None)
  raise_faults(faults, str(job.data[0]), annotations.REMEDY)


def _predictions(
  job: Job, pairs: Sequence[Pair], given: PredictionsByPair, model: Sam3 | None, step: Step
) -> Iterator[tuple[Pair, list[EvalPrediction]]]:
  """The predictions for each pair, of the model or given."""
  if model is not None:
    least = min(MIN_SCORE, job.threshold)
    yield from detect_pairs(
      model, pairs, job.folder, prompt=job.prompt, min_score=least, progress=step
    )
  elif job.predictions is not None:
    for i, pair in enumerate(pairs):
      step(job.predictions.name, i / len(pairs))
      yield pair, list(given.get(pair.id, ()))


def _files(
  job: Job,
  metrics: dict[str, Any],
  found: PredictionsByPair,
  scored: Sequence[tuple[Pair, PairCounts]],
) -> dict[Path, Write]:
  files = {job.out: json_of(metrics)}
  if job.predictions is None:
    files[job.out.with_name(PREDICTIONS)] = json_of(
      predictions.to_coco(found, [pair for pair, _ in scored])
    )
  if job.worst:
    worst = heapq.nsmallest(job.worst, scored, key=lambda item: error_gallery.sort_key(item[1]))
    files |= error_gallery.page(
      worst, found, job.folder, job.out.with_name(PAGE), pairs=len(scored), score=job.threshold
    )
  return files


def _show(job: Job, metrics: dict[str, Any], console: Console, errors: Console) -> None:
  """Prints the table of metrics and the paths of the files."""
  if console.quiet:
    return
  source = job.checkpoint or job.predictions
  kinds = {"text": "phrases", "box": "one box", "text+box": "phrases and boxes"}
  table = Table(title=Text(f"{source}, {metrics['pairs']:,} pairs, prompts: {kinds[job.prompt]}"))
  table.add_column()
  for heading in ("Masks", "at 0.50", "at 0.75", "Boxes", "at 0.50", "at 0.75"):
    table.add_column(heading, justify="right")
  rows = {"cgF1": "cgf1", "IL_MCC": "il_mcc", "pmF1": "pmf1", "F1": "f1", "AP": "ap"}
  for heading, name in rows.items():
    keys = [kind + name + suffix for kind in ("", "box_") for suffix in ("", "_50", "_75")]
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
