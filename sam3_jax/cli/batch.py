"""Declares `sam3-jax batch`."""

import enum
from pathlib import Path
from typing import Annotated, Any

import typer

from sam3_jax.cli import arguments
from sam3_jax.cli.options import Computed, Debug, Dtype, OnDevice, Overlap, Quiet, Strict, Tile
from sam3_jax.cli.prompt_arguments import parse_tiling
from sam3_jax.utils.signals import RESUME


class Layout(enum.StrEnum):
  coco = "coco"
  labelme = "labelme"
  yolo = "yolo"
  parquet = "parquet"
  ytvis = "ytvis"
  tracks = "tracks"


# Options for images only, by the names of their parameters.
_OF_IMAGES = (
  "concept", "image_column", "name_column", "prompts_column", "split", "threshold",
  "max_detections", "max_pixels", "tile", "overlap", "batch_images", "batch_prompts", "workers",
)  # fmt: skip


def batch(
  context: typer.Context,
  out: Annotated[
    Path,
    typer.Option(
      metavar="DIR",
      help="Output directory, or gs:// or s3://. Rerun with the same directory to resume.",
    ),
  ],
  images: Annotated[
    str | None,
    typer.Option(
      metavar="DIR|GLOB|FILE|DATASET",
      help="Images: a directory, a quoted pattern, a WebDataset .tar, a .jsonl file with lines "
      '{"image": PATH, "prompts": [...]}, a Parquet, Arrow, ArrayRecord or TFRecord file, '
      "tfds://NAME[/CONFIG][:VERSION], or datasets://[ORG/]NAME[:CONFIG]. May be a URL: gs://, "
      "s3://, hf://datasets/, https://.",
    ),
  ] = None,
  videos: Annotated[
    str | None,
    typer.Option(
      metavar="DIR|GLOB|LIST",
      help="Videos instead of images: a directory of video files and of directories of frames, a "
      "quoted pattern, a .txt file with one path or URL per line, or a .jsonl file with lines "
      '{"video": PATH, "prompts": [PHRASE, ...]}. May be a URL, as for --images.',
    ),
  ] = None,
  text: Annotated[
    list[str] | None,
    typer.Option(
      metavar="PHRASE",
      help="Phrase for images or videos without prompts of their own. May be repeated.",
    ),
  ] = None,
  prompts: Annotated[
    str | None,
    typer.Option(
      metavar='FILE|"A, B"',
      help="Phrases for images or videos without prompts of their own: a file with one phrase per "
      "line, or phrases separated by commas.",
    ),
  ] = None,
  concept: Annotated[
    list[str] | None,
    typer.Option(
      metavar="FILE",
      help="Concept for images without prompts of their own: exemplars of other images, from "
      "`sam3-jax concept`. May be repeated.",
    ),
  ] = None,
  image_column: Annotated[
    str | None,
    typer.Option(
      metavar="NAME",
      help="Column or feature with the images, in files of records. Default: found by its type.",
    ),
  ] = None,
  name_column: Annotated[
    str | None,
    typer.Option(
      metavar="NAME", help="Column or feature with the names for the results. Default: FILE#ROW."
    ),
  ] = None,
  prompts_column: Annotated[
    str | None,
    typer.Option(
      metavar="NAME", help="Column or feature with the phrases or prompts of each image."
    ),
  ] = None,
  split: Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Split of a tfds:// or datasets:// dataset."),
  ] = None,
  merge: Annotated[
    bool,
    typer.Option("--merge", metavar="", help="Merge all part files, without running the model."),
  ] = False,
  add: Annotated[
    bool,
    typer.Option("--add", metavar="", help="Add new images or videos to the job in DIR."),
  ] = False,
  retry_failed: Annotated[
    bool, typer.Option("--retry-failed", metavar="", help="Process failed inputs again.")
  ] = False,
  skip_unreadable: Annotated[
    bool,
    typer.Option(
      "--skip-unreadable",
      metavar="",
      help="Count unreadable inputs as failed, so that the job can finish without them.",
    ),
  ] = False,
  to: Annotated[
    Layout | None,
    typer.Option(
      help="With --merge, also write the results in this format: coco (always written), labelme, "
      "yolo or parquet for images; ytvis (always written) or tracks for videos."
    ),
  ] = None,
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
  tile: Tile = None,
  overlap: Overlap = None,
  max_error_rate: Annotated[
    float,
    typer.Option(metavar="0..1", help="Stop when a larger fraction of the inputs fails."),
  ] = 0.05,
  part_size: Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Inputs per part file. Default: 256 images, or 1 video."),
  ] = None,
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
  allow_https: Annotated[
    bool,
    typer.Option("--allow-https", metavar="", help="Allow inputs on web servers, also in lists."),
  ] = False,
  strict: Strict = False,
  quiet: Quiet = False,
  debug: Debug = False,
) -> None:
  """Segment a dataset of any size, or track phrases in many videos. Writes part files, which
  --merge combines.

  The command may be stopped or killed at any time. Rerun it to resume, with any number of
  processes. Inputs that fail are listed in errors.jsonl; the others are processed.

  Exit status: 0, all parts of this process are done. 75, work remains, rerun the same command: the
  process was stopped, inputs could not be read, or another process works on some parts. 2, an
  error, or more inputs failed than --max-error-rate allows. 130, interrupted.
  """
  if merge:
    from sam3_jax.cli.batch_images import merge_parts

    merge_parts(out, to, quiet)
    return
  if to not in (None, Layout.coco, Layout.ytvis):
    raise ValueError(f"--to {to.value} needs --merge; leave out --to until the inputs are done.")
  if images is None and videos is None:
    raise ValueError("--images is required: a directory, a pattern, a file or a dataset.")
  if images is not None and videos is not None:
    raise ValueError("--images and --videos are two jobs: give one of them.")
  arguments.check_fraction("--threshold", threshold)
  arguments.check_fraction("--max-error-rate", max_error_rate)
  out = arguments.output(out)

  members: dict[str, Any] = {
    "coordinator": coordinator, "processes": processes, "process": process,
    "distributed": distributed, "timeout": start_timeout,
  }  # fmt: skip
  settings: dict[str, Any] = {
    "out": out, "max_error_rate": max_error_rate, "add": add, "retry_failed": retry_failed,
    "skip_unreadable": skip_unreadable,
  }  # fmt: skip
  if part_size is not None:
    settings["part_size"] = part_size
  common: dict[str, Any] = {
    "texts": text or [], "device": device, "dtype": None if dtype is Dtype.auto else dtype.value,
    "members": members, "settings": settings, "quiet": quiet, "strict": strict,
    "allow_https": allow_https,
  }  # fmt: skip
  if videos is not None:
    _refuse_options_of_images(context)
    from sam3_jax.cli.batch_videos import process_videos

    done = process_videos(videos, prompts, checkpoint, **common)
  else:
    settings |= {
      "threshold": threshold, "max_detections": max_detections, "max_pixels": max_pixels,
      "batch_images": batch_images, "batch_prompts": batch_prompts, "workers": workers,
      "tiling": parse_tiling(tile, overlap),
    }  # fmt: skip
    from sam3_jax.batch.record_files.columns import Columns
    from sam3_jax.cli.batch_images import process_images

    columns = Columns(image_column, name_column, prompts_column, split)
    done = process_images(
      str(images), prompts, concept or [], checkpoint, columns=columns, **common
    )
  if not done:
    raise typer.Exit(RESUME)


def _refuse_options_of_images(context: typer.Context) -> None:
  """Raises ValueError if an option for images only is given."""
  for name in _OF_IMAGES:
    source = context.get_parameter_source(name)
    if source is not None and source.name == "COMMANDLINE":
      raise ValueError(f"--{name.replace('_', '-')} is for --images; leave it out for videos.")
