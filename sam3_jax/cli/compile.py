"""`sam3-jax compile`."""

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from sam3_jax.cli import arguments
from sam3_jax.cli.options import Computed, Debug, Dtype, OnDevice, Quiet
from sam3_jax.utils.console import Console, progress

if TYPE_CHECKING:
  from sam3_jax.inference.aot import Program
  from sam3_jax.inference.predictor import Sam3


class Platform(enum.StrEnum):
  tpu = "tpu"


def compile(
  checkpoint: Annotated[
    str, typer.Argument(metavar="[CHECKPOINT]", help="Directory or name of a checkpoint.")
  ] = "sam3-tiny",
  platform: Annotated[
    Platform | None,
    typer.Option(help="Compile ahead of time for this platform. Default: this machine."),
  ] = None,
  topology: Annotated[
    str,
    typer.Option(metavar="NAME", help="TPU topology for --platform tpu; one chip of it is used."),
  ] = "v5e:1x1",
  images: Annotated[int, typer.Option(min=0, metavar="N", help="Images encoded per call.")] = 1,
  prompts: Annotated[int, typer.Option(min=0, metavar="N", help="Prompts per image and call.")] = 1,
  boxes: Annotated[int, typer.Option(min=0, max=128, metavar="N", help="Boxes per prompt.")] = 0,
  max_detections: Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Value of --max-detections in `segment`.")
  ] = None,
  device: OnDevice = None,
  dtype: Computed = Dtype.auto,
  quiet: Quiet = False,
  debug: Debug = False,
) -> None:
  """Compile a checkpoint's programs ahead of time (AOT), without reading its parameters.

  Programs for this machine are stored in the compilation cache, where `segment` finds them. With
  --platform tpu, prints the compiler's estimates for a TPU; requires the extra `tpu`.
  """
  if platform is not None and device is not None:
    raise ValueError("--platform and --device exclude each other; give one of them.")
  arguments.use_device("cpu" if platform else device)

  from sam3_jax.inference.aot import described_tpu
  from sam3_jax.inference.predictor import default_dtype
  from sam3_jax.utils.devices import default_device

  chip = described_tpu(topology) if platform else default_device()
  if dtype is not Dtype.auto:
    precision = dtype.value
  else:
    precision = "bfloat16" if platform else default_dtype(chip.platform)
  directory = arguments.find(checkpoint, quiet)
  with progress(Console(stderr=True), bar=False, quiet=quiet) as step:
    step(f"compiling {directory.name}", 0)
    model = _model(directory, precision, chip)
    done = model.compile(images, prompts, boxes=boxes, max_detections=max_detections)
  where = topology if platform else "this machine"
  Console(quiet=quiet).print(_table(f"{directory.name}, {model.dtype}, for {where}", done))


def _model(directory: Path, dtype: str, chip: Any) -> "Sam3":
  """The checkpoint's model, with shapes instead of parameters."""
  import jax

  from sam3_jax.checkpoint.bundle import inspect
  from sam3_jax.inference.predictor import Sam3
  from sam3_jax.inputs.tokenizer import Tokenizer
  from sam3_jax.model.sam3 import parameter_shapes

  config = inspect(directory).config
  sharding = jax.sharding.SingleDeviceSharding(chip)
  params = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, jax.numpy.dtype(dtype), sharding=sharding),
    parameter_shapes(config),
  )
  tokenizer = Tokenizer(directory / "tokenizer.model", context=config.text.context)
  return Sam3(config, params, tokenizer, dtype=dtype)


def _table(title: str, programs: "list[Program]") -> Table:
  table = Table(
    title=title, caption="Programs are compiled in parallel. Memory is that of the device."
  )
  table.add_column("Program")
  for head in ("Seconds", "Peak memory", "Inputs and parameters"):
    table.add_column(head, justify="right")
  for one in programs:
    memory = (f"{size / 1e6:,.1f} MB" for size in (one.peak_bytes, one.argument_bytes))
    table.add_row(one.name, f"{one.seconds:.1f}", *memory)
  return table
