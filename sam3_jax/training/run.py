"""The work of `sam3-jax train`: check everything, then run the training loop."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from sam3_jax.config import Config
from sam3_jax.datasets import annotations
from sam3_jax.inference.predictor import Sam3
from sam3_jax.inputs.tokenizer import Tokenizer, clean
from sam3_jax.training import log, tracking
from sam3_jax.training.config import VIDEO_METRICS, TrainConfig
from sam3_jax.training.data import Batches
from sam3_jax.training.loop import train
from sam3_jax.training.report import BUNDLE_METRICS
from sam3_jax.training.run_data import identify_data
from sam3_jax.training.sources import PairSource, SceneSource
from sam3_jax.training.start import load_model, load_start
from sam3_jax.training.trainer import Evaluate
from sam3_jax.training.video_data import ClipBatches
from sam3_jax.training.video_examples import ClipConfig
from sam3_jax.utils.console import Console, say
from sam3_jax.utils.notes import Notes
from sam3_jax.utils.param_tree import raise_faults

NEVER_ABSENT = (
  "no phrase is ever absent, so the model may learn to find its phrases in every image: add images "
  "that do not show them, other categories, or phrases in data.negatives"
)


def run(config: TrainConfig, out: Path, console: Console, *, plot: Path | None = None) -> Path:
  """Trains, or resumes training; returns the final bundle.

  Args:
    config: the run.
    out: its output directory.
    console: shows progress, and the number of pairs that cannot be used for training.
    plot: file for a plot of the metrics.

  Raises:
    ImportError: the plot needs matplotlib.
    FileNotFoundError, ValueError: an invalid plot file, a missing or invalid checkpoint or data,
      another run in `out`, a loss that is not finite.
  """
  if plot is not None:
    log.check_plot(plot)
  if jax.process_index():
    console = Console(quiet=True)
  start = load_start(config, console)
  config = with_sizes(config, start.model)
  data = _open(config, Tokenizer(start.tokenizer, context=start.model.text.context), console)
  batches, identities = data.batches, identify_data(*data.files, start.identity)
  options = {"evaluate": data.evaluate, "console": console, "data": identities}
  try:
    final = train(config, start, batches, out, **options)
  except BaseException:
    with contextlib.suppress(Exception):  # report the error of training, not of the plot
      _draw(config, out, plot)
    raise
  finally:
    batches.close()
  _draw(config, out, plot)
  return final


def check(config: TrainConfig, console: Console) -> str:
  """Checks a run's configuration and all of its data, without reading parameters.

  Args:
    config: the run.
    console: shows notes on the data.

  Returns:
    A summary of the training data.

  Raises:
    FileNotFoundError, ValueError: as for `run`.
  """
  model, vocabulary = load_model(config)
  config = with_sizes(config, model)
  data = _open(config, Tokenizer(vocabulary, context=model.text.context), console)
  data.batches.close()
  return data.summary


class _Data(NamedTuple):
  batches: Batches | ClipBatches
  summary: str
  evaluate: Evaluate | None
  files: tuple[list[str], list[tuple[str, list[str]]]]  # annotations; directories, image names


def _open(config: TrainConfig, tokenizer: Tokenizer, console: Console) -> _Data:
  """Opens a run's data, and prints notes on it."""
  notes = Notes()
  if config.clips is not None:
    data = _open_clips(config, config.clips, notes)
    for line in notes.lines():
      say(console, line)
    return data
  batches, left_out = open_data(config, tokenizer, notes)
  evaluation = open_evaluation(config, tokenizer, notes)
  for line in notes.lines():
    say(console, line)
  if left_out:
    say(console, f"note: pairs left out of training, not exhaustive or with crowds: {left_out:,}")
  files, images = [], []
  if isinstance(batches.source, PairSource):
    if not (config.data.negatives or batches.source.has_absent_phrases()):
      say(console, f"note: {NEVER_ABSENT}")
    files.append(config.annotations)
    images.append((str(batches.source.images), batches.source.names()))
  if evaluation is not None:
    files.append(config.evaluation_annotations)
    images.append((evaluation[1], [pair.file_name for pair in evaluation[0]]))
  summary = f"{len(batches.source):,} images to train on"
  return _Data(batches, summary, _make_evaluate(config, evaluation), (files, images))


def _open_clips(config: TrainConfig, clips: ClipConfig, notes: Notes) -> _Data:
  """Opens the data of a run with objective "video"."""
  from sam3_jax.datasets import video_annotations
  from sam3_jax.evaluation.session_tracker import session_tracker
  from sam3_jax.evaluation.tracking import evaluate_tracking

  process, processes = jax.process_index(), jax.process_count()
  batches = ClipBatches(clips, process=process, processes=processes)
  summary = f"clips of {clips.count:,} moving scenes to train on"
  if not (file := config.evaluation_annotations):
    return _Data(batches, summary, None, ([], []))
  videos = video_annotations.read(file, notes=notes)
  folder = Path(config.evaluation_images or video_annotations.frame_folder(Path(file)))
  faults = video_annotations.check(videos, folder)
  raise_faults(faults, file, video_annotations.REMEDY)

  def evaluate(model: Sam3) -> dict[str, float]:
    prompts = [metric.removeprefix("jf_") for metric in VIDEO_METRICS]
    metrics = evaluate_tracking(session_tracker(model), videos, folder, prompts)
    return {f"jf_{prompt}": metrics[prompt]["jf"] for prompt in prompts}

  names = [name for video in videos for name in video.file_names]
  return _Data(batches, summary, evaluate, ([file], [(str(folder), names)]))


def with_sizes(config: TrainConfig, model: Config) -> TrainConfig:
  """Returns the configuration with the model's image size, and its mask size unless one is set.

  Raises:
    ValueError: a mask size that the losses cannot average down to the model's maps, clips that the
      tracker does not read as a session does, or sizes in the table `data` or `clips` that are
      not the run's.
  """
  mask_size, grid = config.mask_size or model.mask_size, model.image_size // model.patch
  pooled_to_masks = config.objective != "detection"
  unit = 4 * grid if pooled_to_masks else grid if config.losses.cell_weight else 1
  if mask_size % unit:
    raise ValueError(f"mask_size must be a multiple of {unit} for this model; got {mask_size}.")
  if config.clips is not None and model.video is not None:
    tracking.check_clips(config.clips, model.video)
  sizes = {"image_size": model.image_size, "mask_size": mask_size}
  table, data = ("data", config.data) if config.clips is None else ("clips", config.clips)
  for field, size in sizes.items():
    if (value := getattr(data, field)) not in (0, size):
      raise ValueError(
        f"{table}.{field} must be the run's {field}, {size}; got {value}: set {field} at the top "
        f"of the configuration, and remove it from {table}."
      )
  sized: dict[str, Any] = {table: dataclasses.replace(data, **sizes), "mask_size": mask_size}
  return dataclasses.replace(config, **sized)


def open_data(
  config: TrainConfig, tokenizer: Tokenizer, notes: Notes | None = None
) -> tuple[Batches, int]:
  """Returns this process's batches, and the number of pairs that cannot be used for training.

  `notes` counts anomalies in the annotations.

  Raises:
    ValueError: neither annotations nor scenes, or both; or all faults of the annotations.
  """
  if bool(config.annotations) == (config.scenes is not None):
    raise ValueError("give either annotations (--data FILE --images DIR) or scenes to train on.")
  if config.scenes is not None:
    source, left_out = SceneSource(config.scenes), 0
  else:
    images = _image_directory(config.images, config.annotations)
    absent: dict[str, annotations.AbsentPhrases] = {}
    pairs = annotations.read_checked(
      config.annotations, images, tokenizer, notes=notes, absent=absent
    )
    source = PairSource(pairs, images, absent)
    left_out = source.left_out
    _check_negatives(config.data.negatives, pairs, tokenizer)
  process, processes = jax.process_index(), jax.process_count()
  batches = Batches(source, tokenizer, config.data, process=process, processes=processes)
  return batches, left_out


def _check_negatives(
  negatives: Sequence[str], pairs: Sequence[annotations.Pair], tokenizer: Tokenizer
) -> None:
  """Checks that negatives are phrases that no image shows.

  Raises:
    ValueError: an invalid phrase, or one that has objects.
  """
  shown = {clean(pair.phrase): pair for pair in pairs if pair.objects} if negatives else {}
  for phrase in negatives:
    if fault := tokenizer.fault(phrase):
      raise ValueError(f"data.negatives: {fault}.")
    if pair := shown.get(clean(phrase)):
      raise ValueError(
        f"data.negatives has {phrase!r}, but {pair.file_name} shows it: remove it from the list."
      )


def open_evaluation(
  config: TrainConfig, tokenizer: Tokenizer, notes: Notes | None = None
) -> tuple[list[annotations.Pair], str] | None:
  """Returns the evaluation's pairs and the directory of their images; None without evaluation."""
  if not config.evaluation_annotations:
    return None
  images = _image_directory(config.evaluation_images, config.evaluation_annotations)
  pairs = annotations.read_checked(config.evaluation_annotations, images, tokenizer, notes=notes)
  return pairs[: config.evaluate_pairs or None], images


def _make_evaluate(
  config: TrainConfig, data: tuple[list[annotations.Pair], str] | None
) -> Evaluate | None:
  """Returns a function that evaluates a model on the data; None without data."""
  if data is None:
    return None
  from sam3_jax.evaluation import clicks, score

  pairs, images = data
  evaluate: Callable[..., Any]
  evaluate = clicks.evaluate if config.objective == "visual" else score.evaluate
  return lambda model: evaluate(model, pairs, images)


def _image_directory(images: str, file: str) -> str:
  """The directory of the images; by default that of the annotation file."""
  return images or str(Path(file).parent)


def _draw(config: TrainConfig, out: Path, plot: Path | None) -> None:
  metrics = out / "metrics.jsonl"
  if plot is not None and jax.process_index() == 0 and metrics.exists():
    log.plot(metrics, plot, [*BUNDLE_METRICS, config.best_metric])
