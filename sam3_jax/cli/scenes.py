"""`sam3-jax scenes`."""

import enum
from pathlib import Path
from typing import Annotated

import typer

from sam3_jax.cli import arguments
from sam3_jax.cli.options import Debug, Quiet
from sam3_jax.utils.console import Console, progress, say


class Style(enum.StrEnum):
  train = "train"
  noto = "noto"
  noto_v1 = "noto-v1"
  fluent = "fluent"
  twemoji = "twemoji"


class NewConcept(enum.StrEnum):
  avocado = "avocado"
  crown = "crown"
  owl = "owl"


def scenes(
  out: Annotated[
    Path, typer.Option(metavar="DIR", help="Output directory; must not exist, or be empty.")
  ],
  count: Annotated[int, typer.Option(min=1, metavar="N", help="Number of images.")] = 100,
  seed: Annotated[int, typer.Option(min=0, metavar="S", help="Seed of the random generator.")] = 0,
  style: Annotated[
    list[Style] | None,
    typer.Option(
      help="Set of drawings. train, the default, has all drawings that may be used for training. "
      "May be repeated."
    ),
  ] = None,
  new: Annotated[
    NewConcept | None,
    typer.Option(
      help="Add this concept, which no other scenes contain, to half of the images, and its phrase "
      "to all of them; its pairs are also written to NAME.json."
    ),
  ] = None,
  augment: Annotated[
    float, typer.Option(metavar="0..1", help="Strength of the colour and shape augmentation.")
  ] = 0.0,
  unseen: Annotated[
    bool,
    typer.Option("--unseen", metavar="", help="Use phrases that training on scenes never uses."),
  ] = False,
  quiet: Quiet = False,
  debug: Debug = False,
) -> None:
  """Compose synthetic images of drawings, with phrases and masks, for training or evaluation.

  Rerun the same command after an interruption; it starts over.
  """
  arguments.check_writable(out)

  from sam3_jax.datasets.synthetic.scene_files import write

  with progress(Console(stderr=True), bar=True, quiet=quiet) as step:
    done = write(
      out,
      count,
      seed,
      [each.value for each in style or [Style.train]],
      new=new and new.value,
      augment=augment,
      unseen=unseen,
      progress=step,
    )
  counts = ", ".join(f"{number:,} {what}" for what, number in done.items())
  say(Console(quiet=quiet), f"{out / 'annotations.json'}: {counts}")
  if new:
    say(Console(quiet=quiet), f"{out / new.value}.json: the pairs of {new.value} alone")
