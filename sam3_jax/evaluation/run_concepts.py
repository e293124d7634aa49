"""The work of `sam3-jax evaluate --video` for concepts: predictions, metrics, table and page."""

import heapq
from collections.abc import Iterator, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from sam3_jax.datasets.video_annotations import Concepts, Video
from sam3_jax.evaluation import concept_gallery, concept_tracks
from sam3_jax.evaluation.concept_tracks import ConceptTrack
from sam3_jax.evaluation.score_concepts import ConceptScorer, PairScore
from sam3_jax.evaluation.track_concepts import track_videos
from sam3_jax.evaluation.video_job import PAGE, PREDICTIONS, VideoJob
from sam3_jax.inference.predictor import Sam3
from sam3_jax.outputs.coco_json import json_of, write
from sam3_jax.utils.console import Console, Step, say
from sam3_jax.utils.notes import Notes


def run(
  job: VideoJob, data: Concepts, model: Sam3 | None, notes: Notes, step: Step
) -> dict[str, Any]:
  """Scores the tracks of a model or of a file; writes all files at the end, or none.

  Args:
    job: what to do.
    data: the videos and their pairs.
    model: tracks the phrases; None to score the job's predictions.
    notes: counts predictions that are left out, and objects that TETA leaves out.
    step: for progress.

  Returns:
    The metrics, as written: `ConceptScorer.metrics`, and `by_pair`, a list with the metrics of each
    pair.
  """
  scorer, scores = ConceptScorer(data, job.threshold), []
  unnamed = [
    one for video in data.videos for one in video.objects if one.category not in data.categories
  ]
  what = "objects left out of TETA, which needs their category in `categories` of the file"
  notes.add(what, count=len(unnamed))
  found: dict[int, list[ConceptTrack]] = {}
  for video, tracks in _tracks(job, data.videos, model, notes, step):
    scores += scorer.add(video, tracks)
    if model is not None or job.worst:
      found[video.id] = tracks
  step("writing", 1)
  metrics = scorer.metrics() | {"by_pair": [_row(one) for one in scores]}
  files = {job.out: json_of(metrics)}
  if model is not None:
    results = [
      row for number, own in found.items() for row in concept_tracks.to_results(number, own)
    ]
    files[job.out.with_name(PREDICTIONS)] = json_of(results)
  if job.worst:
    worst = heapq.nsmallest(job.worst, scores, key=concept_gallery.sort_key)
    files |= concept_gallery.page(
      worst, data.videos, found, job.folder, job.out.with_name(PAGE), job.threshold, len(scores)
    )
  write(files)
  return metrics


def show(job: VideoJob, metrics: dict[str, Any], console: Console) -> None:
  """Prints the table of metrics and the paths of the files."""
  counts = f"{metrics['videos']:,} videos, {metrics['pairs']:,} pairs"
  table = Table(title=Text(f"{job.source}, {counts}, {metrics['positive_pairs']:,} with objects"))
  table.add_column()
  for heading in ("Masks", "at 0.50", "at 0.75", "Boxes", "at 0.50", "at 0.75"):
    table.add_column(heading, justify="right")
  rows = {
    "cgF1": "cgf1", "IL_MCC": "il_mcc", "pmF1": "pmf1", "phrase AP": "phrase_ap", "pHOTA": "phota",
    "DetA": "deta", "AssA": "assa", "TETA": "teta",
  }  # fmt: skip
  for heading, name in rows.items():
    keys = [kind + name + suffix for kind in ("", "box_") for suffix in ("", "_50", "_75")]
    digits = 3 if name == "il_mcc" else 1
    cells = ["" if (v := metrics.get(key)) is None else f"{v:.{digits}f}" for key in keys]
    table.add_row(heading, *cells)
  console.print(table)
  say(console, _switches(metrics))
  say(console, str(job.out))
  if job.predictions is None:
    say(console, str(job.out.with_name(PREDICTIONS)))
  if job.worst:
    say(console, str(job.out.with_name(PAGE) / "index.html"))


def _tracks(
  job: VideoJob, videos: Sequence[Video], model: Sam3 | None, notes: Notes, step: Step
) -> Iterator[tuple[Video, list[ConceptTrack]]]:
  if model is not None:
    yield from track_videos(model.track, videos, job.folder, step)
    return
  step(f"reading {job.source.name}", 0)
  found = concept_tracks.read(job.source, videos, notes)
  total, done = sum(len(concept_tracks.all_pairs(video)) for video in videos), 0
  for video in videos:
    step(f"pair {done + 1:,} of {total:,}", done / total)
    yield video, found.pop(video.id, [])
    done += len(concept_tracks.all_pairs(video))


def _row(score: PairScore) -> dict[str, Any]:
  """The metrics of a pair in the file."""
  subject = {
    "video_id": score.video,
    "category_id": score.pair.category,
    "noun_phrase": score.pair.phrase,
  }
  return subject | dict(score.metrics)


def _switches(metrics: dict[str, Any]) -> str:
  line = f"{metrics['identity_switches']:,} identity switches of {metrics['objects']:,} objects"
  if "videos_without_occlusion" in metrics:
    line += (
      f", {metrics['identity_switches_without_occlusion']:,} in "
      f"{metrics['videos_without_occlusion']:,} videos without occlusion"
    )
  return line
