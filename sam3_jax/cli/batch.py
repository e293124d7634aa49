"""`sam3-jax batch`."""

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sam3_jax.cli import arguments
from sam3_jax.cli.options import Computed, Debug, Device, Dtype, OnDevice, Quiet, Strict
from sam3_jax.utils.console import Console, loading, print_error, say
from sam3_jax.utils.signals import RESUME, terminable

if TYPE_CHECKING:
  from sam3_jax.batch.job import Job
  from sam3_jax.inference.predictor import Sam3
  from sam3_jax.utils.notes import ListingNotes

DEADLINE = 5.0  # seconds after SIGTERM to finish the current batches


class Layout(enum.StrEnum):
  coco = "coco"
  labelme = "labelme"
  yolo = "yolo"
  parquet = "parquet"


def batch(
  out: Annotated[
    Path,
    typer.Option(metavar="DIR", help="Output directory. Rerun with the same directory to resume."),
  ],
  images: Annotated[
    str | None,
    typer.Option(
      metavar="DIR|GLOB|FILE",
      help="Images: a directory, a quoted pattern, a WebDataset .tar, or a .jsonl file with lines "
      '{"image": PATH, "prompts": [...]}.',
    ),
  ] = None,
  prompts: Annotated[
    str | None,
    typer.Option(
      metavar='FILE|"A, B"',
      help="Phrases for images without prompts of their own: a file with one phrase per line, or "
      "phrases separated by commas.",
    ),
  ] = None,
  merge: Annotated[
    bool,
    typer.Option("--merge", metavar="", help="Merge all part files, without running the model."),
  ] = False,
  add: Annotated[
    bool,
    typer.Option("--add", metavar="", help="Add new images to the job in DIR."),
  ] = False,
  retry_failed: Annotated[
    bool, typer.Option("--retry-failed", metavar="", help="Process failed images again.")
  ] = False,
  skip_unreadable: Annotated[
    bool,
    typer.Option(
      "--skip-unreadable",
      metavar="",
      help="Count unreadable images as failed, so that the job can finish without them.",
    ),
  ] = False,
  to: Annotated[
    Layout, typer.Option(help="With --merge, also write the annotations in this format.")
  ] = Layout.coco,
  checkpoint: Annotated[
    str, typer.Option(metavar="DIR", help="Directory or name of a checkpoint.")
  ] = "sam3-tiny",
  threshold: Annotated[
    float, typer.Option(metavar="0..1", help="Keep instances with a score above this value.")
  ] = 0.5,
  max_detections: Annotated[
    int, typer.Option(min=1, metavar="N", help="Keep at most N instances per prompt.")
  ] = 100,
  max_pixels: Annotated[
    int, typer.Option(min=1, metavar="N", help="Reject images with more than N pixels.")
  ] = 300_000_000,  # preprocess.MAX_PIXELS, whose import would import JAX
  max_error_rate: Annotated[
    float,
    typer.Option(metavar="0..1", help="Stop when a larger fraction of the images fails."),
  ] = 0.05,
  part_size: Annotated[int, typer.Option(min=1, metavar="N", help="Images per part file.")] = 256,
  batch_images: Annotated[
    int, typer.Option(min=1, metavar="N", help="Images per batch and device.")
  ] = 4,
  batch_prompts: Annotated[
    int | None,
    typer.Option(
      min=1, metavar="N", help="Prompts decoded at a time per device. Default: 1 on a CPU, else 4."
    ),
  ] = None,
  workers: Annotated[
    int,
    typer.Option(
      min=0, metavar="N", help="Processes that read images; 0 uses threads of this process."
    ),
  ] = 0,
  processes: Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Number of processes that share the job.")
  ] = None,
  process: Annotated[
    int | None, typer.Option(min=0, metavar="I", help="Index of this process, from 0.")
  ] = None,
  coordinator: Annotated[
    str | None,
    typer.Option(metavar="HOST:PORT", help="Address of process 0, for `jax.distributed`."),
  ] = None,
  distributed: Annotated[
    bool | None,
    typer.Option(
      "--distributed/--no-distributed",
      metavar="",
      help="Initialize `jax.distributed` (needed on TPU slices), or treat this process as the only "
      "one. Default: detected from the variables of Slurm and Open MPI.",
    ),
  ] = None,
  start_timeout: Annotated[
    int,
    typer.Option(
      min=1, metavar="SECONDS", help="How long to wait for the other processes to start."
    ),
  ] = 300,
  device: OnDevice = None,
  dtype: Computed = Dtype.auto,
  strict: Strict = False,
  quiet: Quiet = False,
  debug: Debug = False,
) -> None:
  """Segment a dataset of any size. Writes part files, which --merge combines.

  The command may be stopped or killed at any time. Rerun it to resume, with any number of
  processes. Images that fail are listed in errors.jsonl; the others are processed.

  Exit status: 0, all parts of this process are done. 75, work remains, rerun the same command: the
  process was stopped, images could not be read, or another process works on some parts. 2, an
  error, or more images failed than --max-error-rate allows. 130, interrupted.
  """
  if merge:
    _merge(out, to, Console(quiet=quiet))
    return
  if to is not Layout.coco:
    raise ValueError(f"--to {to.value} needs --merge; leave out --to until the images are done.")
  if images is None:
    raise ValueError("--images is required: a directory, a pattern, a .tar or a .jsonl file.")
  arguments.check_fraction("--threshold", threshold)
  arguments.check_fraction("--max-error-rate", max_error_rate)
  arguments.check_writable(out)

  members: dict[str, Any] = {
    "coordinator": coordinator, "processes": processes, "process": process,
    "distributed": distributed, "timeout": start_timeout,
  }  # fmt: skip
  settings: dict[str, Any] = {
    "out": out, "threshold": threshold, "max_detections": max_detections, "max_pixels": max_pixels,
    "part_size": part_size, "batch_images": batch_images, "batch_prompts": batch_prompts,
    "workers": workers, "max_error_rate": max_error_rate, "add": add, "retry_failed": retry_failed,
    "skip_unreadable": skip_unreadable,
  }  # fmt: skip
  from sam3_jax.utils.notes import ListingNotes

  notes = ListingNotes()
  with terminable(DEADLINE) as stopping:
    job, model = _prepare(
      images, prompts, checkpoint, device, dtype, members, settings, quiet, notes, strict
    )

    from sam3_jax.batch.job import StorageError
    from sam3_jax.batch.run import run

    errors = Console(stderr=True)
    try:
      whole = not stopping() and run(
        job, model, Console(quiet=quiet), errors, stopping, stopping.at_deadline
      )
    except StorageError as error:
      print_error(str(error))
      whole = False
    finally:
      if job.process == 0:
        arguments.say_notes(notes, quiet)
  if not whole:
    raise typer.Exit(RESUME)


def _prepare(
  images: str,
  prompts: str | None,
  checkpoint: str,
  device: Device | None,
  dtype: Dtype,
  members: dict[str, Any],
  settings: dict[str, Any],
  quiet: bool,
  notes: "ListingNotes",
  strict: bool,
) -> "tuple[Job, Sam3]":
  """Creates the job, and its model on this process's devices.

  Args:
    images, prompts, checkpoint, device, dtype, quiet: values of the options.
    members: arguments of `processes.initialize`.
    settings: fields of the job.
    notes: counts the files that the listing skips.
    strict: raise if files are skipped.
  """
  from sam3_jax.batch.inputs import check_phrases, list_inputs
  from sam3_jax.batch.processes import initialize

  found, inputs = arguments.find(checkpoint, quiet), list_inputs(images, prompts, notes)
  if strict:
    notes.refuse()
  if device is Device.cpu:
    arguments.use_device(device)
  process, processes = initialize(**members)

  from sam3_jax.batch.job import Job
  from sam3_jax.inference.predictor import Sam3
  from sam3_jax.inference.sharding import make_mesh

  precision = None if dtype is Dtype.auto else dtype.value
  with loading(Console(stderr=True), found, quiet=quiet) as step:
    mesh = make_mesh(_devices(device))
    model = Sam3.from_checkpoint(found, dtype=precision, mesh=mesh, verify=True, progress=step)
  check_phrases(inputs, model.tokenizer)
  return Job(inputs=inputs, process=process, processes=processes, **settings), model


def _merge(out: Path, to: Layout, console: Console) -> None:
  from sam3_jax.batch.formats import write_labelme, write_parquet, write_yolo
  from sam3_jax.batch.merge import ANNOTATIONS, merge
  from sam3_jax.utils.notes import ListingNotes

  counts = merge(out)
  said = ", ".join(f"{number:,} {what}" for what, number in counts.items())
  say(console, f"{out / ANNOTATIONS}: {said}")
  if to is not Layout.coco:
    notes = ListingNotes()
    writers = {
      Layout.labelme: lambda: write_labelme(out, notes),
      Layout.yolo: lambda: write_yolo(out, notes),
      Layout.parquet: lambda: write_parquet(out),
    }
    say(console, f"{writers[to]()}: {counts['images']:,} images")
    arguments.say_notes(notes, console.quiet)


def _devices(device: Device | None) -> list[Any]:
  """The local devices of the given kind; of the default kind if it is None."""
  import jax

  found = arguments.local_devices()
  if device is None or found[0].platform == device.value:
    return found
  arguments.use_device(device)
  return jax.local_devices(backend=device.value)
