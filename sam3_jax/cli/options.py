"""Options that several commands share."""

import enum
from typing import Annotated

import typer


class Device(enum.StrEnum):
  cpu = "cpu"
  gpu = "gpu"
  tpu = "tpu"


class Dtype(enum.StrEnum):
  auto = "auto"
  float32 = "float32"
  bfloat16 = "bfloat16"


OnDevice = Annotated[
  Device | None, typer.Option(help="Device to compute on. Default: the fastest one available.")
]
Computed = Annotated[
  Dtype, typer.Option(help="Dtype of the computation; auto is float32 on a CPU, else bfloat16.")
]
MaskOptions = Annotated[
  list[str] | None,
  typer.Option(
    metavar="NAME=VALUE",
    help="Option of SAM's mask generator, such as points_per_side=16 or "
    "stability_score_thresh=0.7. May be repeated.",
  ),
]
# A flag takes no value, so its metavar is empty.
Quiet = Annotated[bool, typer.Option("--quiet", "-q", metavar="", help="Print errors only.")]
Tile = Annotated[
  int | None,
  typer.Option(
    metavar="PIXELS",
    help="Segment in overlapping windows of this size, for large images with small objects.",
  ),
]
Overlap = Annotated[
  float | None,
  typer.Option(metavar="0..0.75", help="With --tile: fraction that windows share. [default: 0.25]"),
]
Strict = Annotated[
  bool,
  typer.Option(
    "--strict", metavar="", help="Fail before any work if a file would be skipped or is empty."
  ),
]
# Declared here for the help only: `cli.main` reads this flag from the arguments, as usage errors
# occur before any command runs.
Debug = Annotated[
  bool, typer.Option("--debug", metavar="", help="Print the traceback of an error.")
]
