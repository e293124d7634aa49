"""The work of `sam3-jax train`: everything is checked before any work, then the loop runs."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from sam3_jax import annotations, checkpoint
from sam3_jax.config import Config
from sam3_jax.hub import find_checkpoint
from sam3_jax.tokenizer import Tokenizer, trim
from sam3_jax.training.config import TrainConfig
from sam3_jax.training.data import Batches, PairSource
from sam3_jax.training.log import plot
from sam3_jax.training.loop import Evaluate, Start, train
from sam3_jax.training.sources import SceneSource
from sam3_jax.trees import flatten


def run(config: TrainConfig, out: Path, console: Console, *, picture: Path | None = None) -> Path:
  """Trains, or goes on; returns the final bundle.

  Args:
    config: the run.
    out: its folder.
    console: for the progress bar.
    picture: where a plot of the metrics goes, if anywhere.

  Raises:
    FileNotFoundError, ValueError: a checkpoint or data that is not there or faulty, another run in
      `out`, a loss that is not finite.
  """
  start = load_start(config)
  config = settled(config, start.model)
  tokenizer = Tokenizer(start.tokenizer, context=start.model.text.context)
  batches = open_data(config, tokenizer)
  evaluate = open_evaluation(config, tokenizer)
  try:
    final = train(config, start, batches, out, evaluate=evaluate, console=console)
  finally:
    batches.close()
    if picture is not None and (out / "metrics.jsonl").exists():
      plot(out / "metrics.jsonl", picture)
  return final


def load_start(config: TrainConfig) -> Start:
  """The parameters and the tokenizer to start from, on the host."""
  if config.checkpoint:
    path = find_checkpoint(config.checkpoint)
    bundle = checkpoint.load(path, dtype="float32")
    parameters = flatten(jax.device_get(bundle.params))
    unread = checkpoint.load_unread(path)
    return Start(bundle.config, parameters, bundle.tokenizer, bundle.info, unread)
  from sam3_jax.model.sam3 import init

  if config.model is None:
    raise ValueError("a run without a checkpoint needs a model.")
  vocabulary = Path(config.tokenizer)
  if not vocabulary.is_file():
    vocabulary = find_checkpoint(config.tokenizer) / "tokenizer.model"
  model = trim(Tokenizer(vocabulary).model, config.model.text.vocabulary)
  parameters = flatten(jax.device_get(init(config.model, jax.random.key(config.seed))))
  return Start(config.model, parameters, model, {})


def settled(config: TrainConfig, model: Config) -> TrainConfig:
  """The run with what the model decides: pixels of a picture, and cells of a mask if left open."""
  data = dataclasses.replace(
    config.data,
    image_size=model.image_size,
    mask_size=config.mask_size or model.mask_size,
    masked=min(config.data.masked, config.data.prompts),
  )
  return dataclasses.replace(config, data=data, mask_size=data.mask_size)


def open_data(config: TrainConfig, tokenizer: Tokenizer) -> Batches:
  """This process's batches. Raises one ValueError for all faults of the annotations."""
  if bool(config.annotations) == (config.scenes is not None):
    raise ValueError("give either annotations (--data FILE --images DIR) or scenes to train on.")
  if config.scenes is not None:
    values: dict[str, Any] = dataclasses.asdict(config.scenes)
    if not values["styles"]:
      del values["styles"]
    source: Any = SceneSource(**values)
  else:
    source = PairSource(
      annotations.read_checked(config.annotations, config.images, tokenizer), config.images
    )
  return Batches(
    source,
    tokenizer,
    config.data,
    process=jax.process_index(),
    processes=jax.process_count(),
  )


def open_evaluation(config: TrainConfig, tokenizer: Tokenizer) -> Evaluate | None:
  """A function that scores a model on the evaluation's pairs; None if there are none."""
  if not config.evaluation_annotations:
    return None
  from sam3_jax.evaluation.score import evaluate

  images = config.evaluation_images
  pairs = annotations.read_checked(config.evaluation_annotations, images, tokenizer)
  pairs = pairs[: config.evaluate_pairs or None]
  scored: Callable[..., Any] = evaluate
  return lambda model: scored(model, pairs, images)
