"""`sam3-jax train`."""

from pathlib import Path
from typing import Annotated

import typer

from sam3_jax.cli import arguments
from sam3_jax.cli.options import Debug, OnDevice, Quiet
from sam3_jax.utils.console import Console, say


def train(
  config: Annotated[
    Path | None,
    typer.Argument(metavar="[CONFIG]", help="TOML or JSON file with fields of TrainConfig."),
  ] = None,
  out: Annotated[
    Path | None,
    typer.Option(
      metavar="DIR",
      help="Output directory; required. Rerun with the same directory to resume.",
    ),
  ] = None,
  data: Annotated[
    Path | None, typer.Option(metavar="FILE", help="Annotation file in SA-Co's or COCO's format.")
  ] = None,
  images: Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Directory of the images. Default: the directory of --data."),
  ] = None,
  checkpoint: Annotated[
    str | None,
    typer.Option(metavar="DIR", help="Directory or name of the checkpoint to start from."),
  ] = None,
  evaluation_data: Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Annotation file to evaluate on during training."),
  ] = None,
  evaluation_images: Annotated[
    Path | None,
    typer.Option(
      metavar="DIR",
      help="Directory of the images to evaluate on. Default: the directory of --evaluation-data.",
    ),
  ] = None,
  evaluate_every: Annotated[
    int | None, typer.Option(min=0, metavar="N", help="Steps between evaluations.")
  ] = None,
  steps: Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Total number of training steps.")
  ] = None,
  batch: Annotated[int | None, typer.Option(min=1, metavar="N", help="Images per step.")] = None,
  learning_rate: Annotated[
    float | None,
    typer.Option(
      metavar="RATE", help="Learning rate; trunk, neck and text encoder use fractions of it."
    ),
  ] = None,
  pattern: Annotated[
    str | None,
    typer.Option(
      "--train",
      metavar="REGEX",
      help="Paths of the parameters to train. Default: all except trunk/ and text/.",
    ),
  ] = None,
  lora: Annotated[
    int | None,
    typer.Option(
      min=0, metavar="RANK", help="Train LoRA factors of this rank instead of the parameters."
    ),
  ] = None,
  plot: Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Plot the metrics to a .png or .svg file at the end."),
  ] = None,
  check: Annotated[
    bool,
    typer.Option("--check", metavar="", help="Check the configuration and all data, then exit."),
  ] = False,
  distributed: Annotated[
    bool,
    typer.Option(
      "--distributed",
      metavar="",
      help="Initialize `jax.distributed` (needed on TPU slices). All processes of a TPU pod, or of "
      "a Slurm, Kubernetes or Open MPI job, run this command, with DIR on a shared file system.",
    ),
  ] = False,
  device: OnDevice = None,
  quiet: Quiet = False,
  debug: Debug = False,
) -> None:
  """Train or fine-tune a model. Rerun the same command to resume.

  Options override CONFIG. The final checkpoint is DIR/final; DIR/best is the checkpoint with the
  best evaluation.
  """
  if out is None and not check:
    raise ValueError("--out DIR is required: the output directory.")
  if out is not None:
    arguments.check_writable(out)
  if plot is not None:
    arguments.check_writable(plot.parent, "--plot")
  if distributed:
    _initialize_distributed()
  arguments.use_device(device)

  from sam3_jax.training import run
  from sam3_jax.training.config import TrainConfig
  from sam3_jax.training.config_file import override, read

  typed = {
    "annotations": data,
    "images": images,
    "checkpoint": checkpoint,
    "evaluation_annotations": evaluation_data,
    "evaluation_images": evaluation_images,
    "evaluate_every": evaluate_every,
    "steps": steps,
    "data.batch_size": batch,
    "optimizer.learning_rate": learning_rate,
    "trainable": pattern,
    "lora.rank": lora,
  }
  values = override({} if config is None else read(config), typed)
  settings, errors = TrainConfig.from_dict(values), Console(stderr=True, quiet=quiet)
  if check or out is None:
    say(Console(quiet=quiet), run.check(settings, errors))
    return
  final = run.run(settings, out, errors, plot=plot)
  say(Console(quiet=quiet), f"{final}: the trained checkpoint")


def _initialize_distributed() -> None:
  """Connects the processes of a run; must be called before JAX accesses its devices."""
  import jax

  try:
    jax.distributed.initialize()
  except (ValueError, RuntimeError) as error:
    raise ValueError(
      f"--distributed: JAX cannot connect to the other processes ({error}); start one on each host "
      "of a TPU pod or through Slurm, Kubernetes or Open MPI, or leave out --distributed."
    ) from error
