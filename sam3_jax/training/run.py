"""The work of `sam3-jax train`: everything is checked before any work, then the loop runs."""

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from sam3_jax.checkpoint import bundle as checkpoint
from sam3_jax.config import Config
from sam3_jax.datasets import annotations
from sam3_jax.inputs.tokenizer import Tokenizer, trim
from sam3_jax.registry import find_checkpoint
from sam3_jax.training import log
from sam3_jax.training.config import TrainConfig
from sam3_jax.training.data import Batches
from sam3_jax.training.loop import Evaluate, Start, train
from sam3_jax.training.report import FIGURES
from sam3_jax.training.run_data import identify_data
from sam3_jax.training.sources import PairSource, SceneSource
from sam3_jax.training.visual_init import new_head
from sam3_jax.utils.console import Console, loading, say
from sam3_jax.utils.notes import Notes
from sam3_jax.utils.param_tree import flatten


def run(config: TrainConfig, out: Path, console: Console, *, plot: Path | None = None) -> Path:
  """Trains, or goes on; returns the final bundle.

  Args:
    config: the run.
    out: its folder.
    console: for the progress bar, and a note on pairs that cannot be trained on.
    plot: where a plot of the metrics goes, if anywhere.

  Raises:
    ImportError: there is no matplotlib for the plot.
    FileNotFoundError, ValueError: a plot that cannot be drawn, a checkpoint or data that is not
      there or faulty, another run in `out`, a loss that is not finite.
  """
  if plot is not None:
    log.check_plot(plot)
  if jax.process_index():
    console = Console(quiet=True)
  start = load_start(config, console)
  config = settled(config, start.model)
  data = _open(config, Tokenizer(start.tokenizer, context=start.model.text.context), console)
  batches, kept = data.batches, identify_data(*data.files, start.identity)
  try:
    final = train(config, start, batches, out, evaluate=data.evaluate, console=console, data=kept)
  except BaseException:
    with contextlib.suppress(Exception):  # what is to be told is why training ended
      _draw(config, out, plot)
    raise
  finally:
    batches.close()
  _draw(config, out, plot)
  return final


def check(config: TrainConfig, console: Console) -> str:
  """Checks a run's configuration and all of its data, without the checkpoint's parameters.

  Args:
    config: the run.
    console: for the notes.

  Returns:
    What there is to train on, in words.

  Raises:
    FileNotFoundError, ValueError: as `run`.
  """
  if config.checkpoint:
    stored = checkpoint.open_stored(find_checkpoint(config.checkpoint))
    model, vocabulary = _resized(stored.config, config), stored.tokenizer
  else:
    model, vocabulary = _random(config)
  config = settled(config, model)
  data = _open(config, Tokenizer(vocabulary, context=model.text.context), console)
  data.batches.close()
  return f"{len(data.batches.source):,} images to train on"


class _Data(NamedTuple):
  batches: Batches
  evaluate: Evaluate | None
  files: tuple[list[str], list[tuple[str, list[str]]]]  # annotations; directories and their images


def _open(config: TrainConfig, tokenizer: Tokenizer, console: Console) -> _Data:
  """A run's data; what they have that is worth a line goes to the console."""
  notes = Notes()
  batches, left_out = open_data(config, tokenizer, notes)
  evaluation = open_evaluation(config, tokenizer, notes)
  for line in notes.lines():
    say(console, line)
  if left_out:
    say(console, f"note: pairs left out of training, not exhaustive or with crowds: {left_out:,}")
  files, images = [], []
  if isinstance(batches.source, PairSource):
    files.append(config.annotations)
    images.append((str(batches.source.images), batches.source.names()))
  if evaluation is not None:
    files.append(config.evaluation_annotations)
    images.append((evaluation[1], [pair.file_name for pair in evaluation[0]]))
  return _Data(batches, _evaluate(config, evaluation), (files, images))


def load_start(config: TrainConfig, console: Console | None = None) -> Start:
  """The parameters and the tokenizer to start from, on the host; the console shows progress."""
  if config.checkpoint:
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])  # each process has its own
    path = find_checkpoint(config.checkpoint)
    with loading(console or Console(quiet=True), path) as step:
      bundle = checkpoint.load(path, dtype="float32", sharding=here, verify=True, progress=step)
    parts, unread = jax.device_get(bundle.params), checkpoint.load_unread(path)
    model = _resized(bundle.config, config)
    if config.objective == "visual":
      if checkpoint.VISUAL not in parts:
        parts[checkpoint.VISUAL] = new_head(model, parts, config.seed)
      visual = None
    else:
      visual = parts.pop(checkpoint.VISUAL, None)
    given = bundle.tokenizer, bundle.info, unread, visual, bundle.identity
    return Start(model, flatten(parts), *given)
  from sam3_jax.model.sam3 import init

  model, vocabulary = _random(config)
  parameters = flatten(jax.device_get(init(model, jax.random.key(config.seed))))
  return Start(model, parameters, vocabulary, {})


def _random(config: TrainConfig) -> tuple[Config, bytes]:
  """Model and tokenizer of a run that starts from random parameters."""
  if config.model is None:
    raise ValueError("a run without a checkpoint needs a model.")
  vocabulary = Path(config.tokenizer)
  if not vocabulary.is_file():
    vocabulary = find_checkpoint(config.tokenizer) / "tokenizer.model"
  return config.model, trim(Tokenizer(vocabulary).model, config.model.text.vocabulary)


def _resized(model: Config, config: TrainConfig) -> Config:
  """The model at the run's resolution."""
  trunk = dataclasses.replace(model.trunk, window=config.window or model.trunk.window)
  return dataclasses.replace(model, image_size=config.image_size or model.image_size, trunk=trunk)


def settled(config: TrainConfig, model: Config) -> TrainConfig:
  """The run with what the model decides: pixels of an image, and cells of a mask if left open.

  Raises:
    ValueError: target masks whose cells the losses cannot add up to the model's, or sizes in the
      table `data` that are not those of the run.
  """
  mask_size, grid = config.mask_size or model.mask_size, model.image_size // model.patch
  fine = config.objective != "detection"
  unit = 4 * grid if fine else grid if config.losses.cell_weight else 1
  if mask_size % unit:
    raise ValueError(f"mask_size must be a multiple of {unit} for this model; got {mask_size}.")
  sizes = {"image_size": model.image_size, "mask_size": mask_size}
  for field, size in sizes.items():
    if (given := getattr(config.data, field)) not in (0, size):
      raise ValueError(
        f"data.{field} is the model's, here {size}; got {given}: set {field} at the top of the "
        "configuration, and leave it out of data."
      )
  return dataclasses.replace(
    config, data=dataclasses.replace(config.data, **sizes), mask_size=mask_size
  )


def open_data(
  config: TrainConfig, tokenizer: Tokenizer, notes: Notes | None = None
) -> tuple[Batches, int]:
  """This process's batches, and the number of pairs that cannot be trained on.

  `notes` counts what is surprising in the annotations.

  Raises:
    ValueError: neither annotations nor scenes, or both; or all faults of the annotations.
  """
  if bool(config.annotations) == (config.scenes is not None):
    raise ValueError("give either annotations (--data FILE --images DIR) or scenes to train on.")
  if config.scenes is not None:
    source, left_out = SceneSource(config.scenes), 0
  else:
    images = _folder(config.images, config.annotations)
    pairs = annotations.read_checked(config.annotations, images, tokenizer, notes=notes)
    source = PairSource(pairs, images)
    left_out = source.left_out
  process, processes = jax.process_index(), jax.process_count()
  batches = Batches(source, tokenizer, config.data, process=process, processes=processes)
  return batches, left_out


def open_evaluation(
  config: TrainConfig, tokenizer: Tokenizer, notes: Notes | None = None
) -> tuple[list[annotations.Pair], str] | None:
  """The evaluation's pairs, and the folder of their images; None if there are none."""
  if not config.evaluation_annotations:
    return None
  images = _folder(config.evaluation_images, config.evaluation_annotations)
  pairs = annotations.read_checked(config.evaluation_annotations, images, tokenizer, notes=notes)
  return pairs[: config.evaluate_pairs or None], images


def _evaluate(
  config: TrainConfig, given: tuple[list[annotations.Pair], str] | None
) -> Evaluate | None:
  """A function that scores a model on the evaluation's pairs; None if there are none."""
  if given is None:
    return None
  from sam3_jax.evaluation import clicks, score

  pairs, images = given
  scored: Callable[..., Any] = clicks.evaluate if config.objective == "visual" else score.evaluate
  return lambda model: scored(model, pairs, images)


def _folder(images: str, file: str) -> str:
  """Of the images: that of their annotations, if none is given."""
  return images or str(Path(file).parent)


def _draw(config: TrainConfig, out: Path, plot: Path | None) -> None:
  metrics = out / "metrics.jsonl"
  if plot is not None and jax.process_index() == 0 and metrics.exists():
    log.plot(metrics, plot, [*FIGURES, config.best])
