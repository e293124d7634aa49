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
    str, typer.Argument(metavar="CHECKPOINT", help="Folder or name of a checkpoint.")
  ],
  out: Annotated[
    Path, typer.Argument(metavar="OUT", help="Folder to make; it must not exist, or be empty.")
  ],
  platforms: Annotated[
    str | None,
    typer.Option(
      metavar="NAMES",
      help="Some of tpu, cuda, rocm and cpu, by commas; tpu,cuda,cpu, if left out.",
    ),
  ] = None,
  to: Annotated[
    Format, typer.Option(help="What to write; onnx has no platforms, and parameters inside.")
  ] = Format.stablehlo,
  images: Annotated[int, typer.Option(min=1, metavar="N", help="Encoded in one call.")] = 1,
  prompts: Annotated[int, typer.Option(min=1, metavar="N", help="Decoded in one call.")] = 1,
  boxes: Annotated[int, typer.Option(min=1, max=128, metavar="N", help="Of one prompt.")] = 8,
  points: Annotated[
    int,
    typer.Option(min=2, max=64, metavar="N", help="Of one visual prompt; a box takes two."),
  ] = 3,
  max_detections: Annotated[
    int | None, typer.Option(min=1, metavar="N", help="The best so many; all, if left out.")
  ] = None,
  text: Annotated[
    list[str] | None,
    typer.Option(metavar="PHRASE", help="Keep its token ids in tokens.json; may be repeated."),
  ] = None,
  dtype: Annotated[
    Dtype,
    typer.Option(
      help="Of parameters and computation; auto is float32 if a CPU is among the "
      "platforms, else bfloat16."
    ),
  ] = Dtype.auto,
  quiet: Quiet = False,
  debug: Debug = False,
) -> None:
  """Write a checkpoint's programs as StableHLO that JAX alone runs, or as ONNX."""
  arguments.use_device("cpu")

  from sam3_jax.export.bundle import check_platforms
  from sam3_jax.export.bundle import export as run
  from sam3_jax.export.exportable import Sizes

  names = None
  if platforms is not None:
    names = [name.strip() for name in platforms.split(",") if name.strip()]
  check_platforms(names, to is Format.onnx)  # before a checkpoint is fetched
  folder = arguments.find(checkpoint, quiet)
  with progress(Console(stderr=True), bar=True, quiet=quiet) as step:
    done = run(
      folder,
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
