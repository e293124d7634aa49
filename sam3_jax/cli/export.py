"""`sam3-jax export`."""

import enum
from pathlib import Path
from typing import Annotated

import typer

from sam3_jax.cli import arguments
from sam3_jax.cli.options import Debug, Dtype, Quiet
from sam3_jax.utils.console import Console, progress, say


class Format(enum.StrEnum):
  stablehlo = "stablehlo"
  onnx = "onnx"


def export(
  checkpoint: Annotated[
    str, typer.Argument(metavar="CHECKPOINT", help="Directory or name of a checkpoint.")
  ],
  out: Annotated[
    Path, typer.Argument(metavar="OUT", help="Output directory; must not exist, or be empty.")
  ],
  platforms: Annotated[
    str | None,
    typer.Option(
      metavar="NAMES",
      help="Target platforms, separated by commas: tpu, cuda, rocm, cpu. Default: tpu,cuda,cpu.",
    ),
  ] = None,
  to: Annotated[
    Format,
    typer.Option(
      help="Format to write. onnx needs no platforms, and its files contain the parameters."
    ),
  ] = Format.stablehlo,
  images: Annotated[int, typer.Option(min=1, metavar="N", help="Images encoded per call.")] = 1,
  prompts: Annotated[int, typer.Option(min=1, metavar="N", help="Prompts decoded per call.")] = 1,
  boxes: Annotated[int, typer.Option(min=1, max=128, metavar="N", help="Boxes per prompt.")] = 8,
  points: Annotated[
    int,
    typer.Option(min=2, max=64, metavar="N", help="Points per visual prompt; a box counts as two."),
  ] = 3,
  max_detections: Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="At most N instances per prompt. Default: all."),
  ] = None,
  text: Annotated[
    list[str] | None,
    typer.Option(metavar="PHRASE", help="Write its token ids to tokens.json. May be repeated."),
  ] = None,
  dtype: Annotated[
    Dtype,
    typer.Option(
      help="Dtype of parameters and computation; auto is float32 if the platforms include cpu, "
      "else bfloat16."
    ),
  ] = Dtype.auto,
  quiet: Quiet = False,
  debug: Debug = False,
) -> None:
  """Export a checkpoint's programs as StableHLO, which needs only JAX to run, or as ONNX."""
  arguments.use_device("cpu")

  from sam3_jax.export.bundle import check_platforms
  from sam3_jax.export.bundle import export as run
  from sam3_jax.export.exportable import Sizes

  names = None
  if platforms is not None:
    names = [name.strip() for name in platforms.split(",") if name.strip()]
  check_platforms(names, to is Format.onnx)  # before downloading a checkpoint
  directory = arguments.find(checkpoint, quiet)
  with progress(Console(stderr=True), bar=True, quiet=quiet) as step:
    done = run(
      directory,
      out,
      platforms=names,
      sizes=Sizes(
        images=images, prompts=prompts, boxes=boxes, points=points, max_detections=max_detections
      ),
      dtype=None if dtype is Dtype.auto else dtype.value,
      phrases=text or (),
      onnx=to is Format.onnx,
      progress=step,
    )
  programs = ", ".join(done["programs"])
  say(
    Console(quiet=quiet), f"{out}: {programs} for {', '.join(done['platforms'])} in {done['dtype']}"
  )
