"""`sam3-jax scenes` and `train`."""

import enum
from pathlib import Path
from typing import Annotated

import typer

from sam3_jax.cli import arguments
from sam3_jax.cli.options import Debug, OnDevice, Quiet
from sam3_jax.utils.console import Console, progress, say


class Style(enum.StrEnum):
  train = "train"
  noto = "noto"
  noto_v1 = "noto-v1"
  fluent = "fluent"
  twemoji = "twemoji"


class New(enum.StrEnum):
  avocado = "avocado"
  crown = "crown"
  owl = "owl"


def scenes(
  out: Annotated[
    Path, typer.Option(metavar="DIR", help="Folder to make; it must not exist, or be empty.")
  ],
  count: Annotated[int, typer.Option(min=1, metavar="N", help="Images.")] = 100,
  seed: Annotated[int, typer.Option(min=0, metavar="S", help="Decides all of them.")] = 0,
  style: Annotated[
    list[Style] | None,
    typer.Option(
      help="Whose drawings; train, the default, is all that a model may be trained on. Repeat for "
      "several."
    ),
  ] = None,
  new: Annotated[
    New | None,
    typer.Option(
      help="Show this thing, of which other scenes know nothing, in half of the images, and ask "
      "for it in all; its pairs go to NAME.json too."
    ),
  ] = None,
  augment: Annotated[
    float, typer.Option(metavar="0..1", help="How strongly colours and shapes are changed.")
  ] = 0.0,
  unseen: Annotated[
    bool,
    typer.Option("--unseen", metavar="", help="Ask by words that training on scenes never uses."),
  ] = False,
  quiet: Quiet = False,
  debug: Debug = False,
) -> None:
  """Compose images of drawings, with phrases and the masks that match, to train or to measure on.

  What an interrupted run left in the folder is done again.
  """
  arguments.check_writable(out)

  from sam3_jax.datasets.synthetic.scene_files import write

  with progress(Console(stderr=True), bar=True, quiet=quiet) as step:
    done = write(
      out,
      count,
      seed,
      [one.value for one in style or [Style.train]],
      new=new and new.value,
      augment=augment,
      unseen=unseen,
      progress=step,
    )
  counts = ", ".join(f"{number:,} {what}" for what, number in done.items())
  say(Console(quiet=quiet), f"{out / 'annotations.json'}: {counts}")
  if new:
    say(
      Console(quiet=quiet), f"{out / new.value}.json: those of its pairs that ask for {new.value}"
    )


def train(
  config: Annotated[
    Path | None,
    typer.Argument(metavar="[CONFIG]", help="A TOML or JSON file with fields of TrainConfig."),
  ] = None,
  out: Annotated[
    Path | None, typer.Option(metavar="DIR", help="Folder of the run; needed.")
  ] = None,
  data: Annotated[
    Path | None, typer.Option(metavar="FILE", help="Annotations, SA-Co's or COCO's layout.")
  ] = None,
  images: Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Folder of the images; that of the annotations, if left out."),
  ] = None,
  checkpoint: Annotated[
    str | None, typer.Option(metavar="DIR", help="Folder or name of the checkpoint to start from.")
  ] = None,
  evaluation_data: Annotated[
    Path | None, typer.Option(metavar="FILE", help="Annotations to score on while training.")
  ] = None,
  evaluation_images: Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Folder of their images; theirs, if left out."),
  ] = None,
  evaluate_every: Annotated[
    int | None, typer.Option(min=0, metavar="N", help="Steps between evaluations.")
  ] = None,
  steps: Annotated[int | None, typer.Option(min=1, metavar="N", help="Of the whole run.")] = None,
  batch: Annotated[int | None, typer.Option(min=1, metavar="N", help="Images a step.")] = None,
  learning_rate: Annotated[
    float | None, typer.Option(metavar="RATE", help="Of all but trunk, neck and text.")
  ] = None,
  pattern: Annotated[
    str | None,
    typer.Option(
      "--train",
      metavar="REGEX",
      help="Paths of the parameters to train; all but trunk/ and text/, if not given.",
    ),
  ] = None,
  lora: Annotated[
    int | None,
    typer.Option(min=0, metavar="RANK", help="Train low-rank factors of this rank instead."),
  ] = None,
  plot: Annotated[
    Path | None, typer.Option(metavar="FILE", help="Draw the metrics at the end, a .png or .svg.")
  ] = None,
  check: Annotated[
    bool,
    typer.Option(
      "--check", metavar="", help="Check the configuration and all of the data, then stop."
    ),
  ] = False,
  distributed: Annotated[
    bool,
    typer.Option(
      "--distributed",
      metavar="",
      help="Train together with the other processes of a TPU pod, or of a job of Slurm, Kubernetes "
      "or Open MPI; all of them run this command, with DIR on a disk that they share.",
    ),
  ] = False,
  device: OnDevice = None,
  quiet: Quiet = False,
  debug: Debug = False,
) -> None:
  """Train or fine-tune a model; the same command again goes on where it was stopped.

  Options stand over what CONFIG says. The result is the checkpoint DIR/final, and DIR/best the one
  with the best evaluation.
  """
  if out is None and not check:
    raise ValueError("--out DIR is needed: the folder of the run.")
  if out is not None:
    arguments.check_writable(out)
  if plot is not None:
    arguments.check_writable(plot.parent, "--plot")
  if distributed:
    _meet()
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


def _meet() -> None:
  """Connects the processes of a run; JAX must not have looked at its devices before."""
  import jax

  try:
    jax.distributed.initialize()
  except (ValueError, RuntimeError) as error:
    raise ValueError(
      f"--distributed: JAX cannot meet the other processes ({error}); start one on each host of a "
      "TPU pod or through Slurm, Kubernetes or Open MPI, or leave --distributed out."
    ) from error
