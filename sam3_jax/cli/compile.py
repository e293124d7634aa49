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
    str, typer.Argument(metavar="[CHECKPOINT]", help="Folder or name of a checkpoint.")
  ] = "sam3-tiny",
  platform: Annotated[
    Platform | None,
    typer.Option(help="Compile for a TPU that is not here; for this machine, if left out."),
  ] = None,
  topology: Annotated[
    str, typer.Option(metavar="NAME", help="Which TPU, of which one chip is used.")
  ] = "v5e:1x1",
  images: Annotated[int, typer.Option(min=0, metavar="N", help="Encoded in one call.")] = 1,
  prompts: Annotated[int, typer.Option(min=0, metavar="N", help="Of one image in a call.")] = 1,
  boxes: Annotated[int, typer.Option(min=0, max=128, metavar="N", help="Of one prompt.")] = 0,
  max_detections: Annotated[
    int | None, typer.Option(min=1, metavar="N", help="As it will be given to segment.")
  ] = None,
  device: OnDevice = None,
  dtype: Computed = Dtype.auto,
  quiet: Quiet = False,
  debug: Debug = False,
) -> None:
  """Compile a checkpoint's programs before they are needed; reads no parameter.

  For this machine they go to the cache of compiled programs, where `segment` finds them. For a TPU
  that is not here it shows what its compiler says; that needs the extra `tpu`.
  """
  if platform is not None and device is not None:
    raise ValueError("--platform describes what is not here, --device is here; give one of them.")
  arguments.use_device("cpu" if platform else device)

  from sam3_jax.inference.aot import described_tpu
  from sam3_jax.inference.predictor import default_dtype
  from sam3_jax.utils.devices import default_device

  chip = described_tpu(topology) if platform else default_device()
  if dtype is not Dtype.auto:
    precision = dtype.value
  else:
    precision = "bfloat16" if platform else default_dtype()
  folder = arguments.find(checkpoint, quiet)
  with progress(Console(stderr=True), bar=False, quiet=quiet) as step:
    step(f"compiling {folder.name}", 0)
    model = _model(folder, precision, chip)
    done = model.compile(images, prompts, boxes=boxes, max_detections=max_detections)
  where = topology if platform else "this machine"
  Console(quiet=quiet).print(_table(f"{folder.name}, {model.dtype}, for {where}", done))


def _model(folder: Path, dtype: str, chip: Any) -> "Sam3":
  """The checkpoint's, with shapes in place of parameters."""
  import jax

  from sam3_jax.checkpoint.bundle import inspect
  from sam3_jax.inference.predictor import Sam3
  from sam3_jax.inputs.tokenizer import Tokenizer
  from sam3_jax.model.sam3 import parameter_shapes

  config = inspect(folder).config
  place = jax.sharding.SingleDeviceSharding(chip)
  params = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, jax.numpy.dtype(dtype), sharding=place),
    parameter_shapes(config),
  )
  tokenizer = Tokenizer(folder / "tokenizer.model", context=config.text.context)
  return Sam3(config, params, tokenizer, dtype=dtype)


def _table(title: str, programs: "list[Program]") -> Table:
  table = Table(title=title, caption="Programs are compiled side by side. Memory of the device.")
  table.add_column("Program")
  for head in ("Seconds", "Peak memory", "of it inputs and parameters"):
    table.add_column(head, justify="right")
  for one in programs:
    memory = (f"{size / 1e6:,.1f} MB" for size in (one.peak_bytes, one.argument_bytes))
    table.add_row(one.name, f"{one.seconds:.1f}", *memory)
  return table
