"""What several commands take, so that it reads the same in the help of each."""

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
  Device | None, typer.Option(help="Where to compute; the fastest there is, if not given.")
]
Computed = Annotated[
  Dtype, typer.Option(help="Of the computation; auto is float32 on a CPU, else bfloat16.")
]
MaskOptions = Annotated[
  list[str] | None,
  typer.Option(
    metavar="NAME=VALUE",
    help="Of everything, an option of SAM's mask generator: points_per_side=16, "
    "stability_score_thresh=0.7 and so on. May be repeated.",
  ),
]
# An empty metavar, as a flag takes no value.
Quiet = Annotated[bool, typer.Option("--quiet", "-q", metavar="", help="Print nothing but errors.")]
Strict = Annotated[
  bool,
  typer.Option(
    "--strict", metavar="", help="Stop before any work if a listed file is left out or empty."
  ),
]
# Read by cli.main from the words typed, as errors of usage come before any command runs; here for
# the help.
Debug = Annotated[
  bool, typer.Option("--debug", metavar="", help="Print the traceback of an error.")
]
