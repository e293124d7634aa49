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
  count: Annotated[int, typer.Option(min=1, metavar="N", help="Number of images or videos.")] = 100,
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
    float, typer.Option(metavar="0..1", help="Strength of the color and shape augmentation.")
  ] = 0.0,
  unseen: Annotated[
    bool,
    typer.Option("--unseen", metavar="", help="Use phrases that training on scenes never uses."),
  ] = False,
  video: Annotated[
    bool,
    typer.Option(
      "--video", metavar="", help="Write moving scenes: --count videos, in YouTube-VIS's format."
    ),
  ] = False,
  frames: Annotated[
    int | None,
    typer.Option(metavar="N", help="Frames of each video; needs --video. Default: 24."),
  ] = None,
  size: Annotated[
    str | None,
    typer.Option(
      metavar="WxH", help="Width and height in pixels, such as 320x240. Default: random sizes."
    ),
  ] = None,
  quiet: Quiet = False,
  debug: Debug = False,
) -> None:
  """Compose synthetic images or videos of drawings, with phrases and masks, for training or
  evaluation.

  Rerun the same command after an interruption; it starts over.
  """
  arguments.check_writable(out)

  if video and new:
    raise ValueError(f"--new {new.value} is for images only; leave out --video or --new.")
  if frames is not None and not video:
    raise ValueError(f"--frames {frames} needs --video; add it, or leave out --frames.")

  from sam3_jax.datasets.synthetic import moving_scene_files, scene_files

  styles = [each.value for each in style or [Style.train]]
  options = {"augment": augment, "unseen": unseen, "size": _parse_size(size)}
  with progress(Console(stderr=True), bar=True, quiet=quiet) as step:
    if video:
      length = 24 if frames is None else frames
      done = moving_scene_files.write(
        out, count, seed, styles, frames=length, progress=step, **options
      )
    else:
      name = new and new.value
      done = scene_files.write(out, count, seed, styles, new=name, progress=step, **options)
  counts = ", ".join(f"{number:,} {what}" for what, number in done.items())
  say(Console(quiet=quiet), f"{out / 'annotations.json'}: {counts}")
  if new:
    say(Console(quiet=quiet), f"{out / new.value}.json: the pairs of {new.value} alone")


def _parse_size(size: str | None) -> tuple[int, int] | None:
  """Height and width, from the form 320x240."""
  if size is None:
    return None
  numbers = size.lower().split("x")
  if len(numbers) != 2 or not all(one.isascii() and one.isdecimal() for one in numbers):
    raise ValueError(f"--size {size!r} must be width and height in pixels, such as 320x240.")
  return int(numbers[1]), int(numbers[0])
