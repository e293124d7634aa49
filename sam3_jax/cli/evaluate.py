"""`sam3-jax evaluate`."""

import enum
from pathlib import Path
from typing import Annotated

import typer

from sam3_jax.cli import arguments
from sam3_jax.cli.options import Computed, Debug, Dtype, MaskOptions, OnDevice, Quiet
from sam3_jax.utils.console import Console


class Ask(enum.StrEnum):
  text = "text"
  box = "box"
  both = "text+box"
  click = "click"
  everything = "everything"


def evaluate(
  data: Annotated[
    list[Path],
    typer.Option(
      metavar="FILE",
      help="Annotations in SA-Co's or COCO's layout. Repeat for the truths of several annotators: "
      "the one that fits best counts.",
    ),
  ],
  images: Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Folder of the images; that of the annotations, if left out."),
  ] = None,
  checkpoint: Annotated[
    str | None,
    typer.Option(metavar="DIR", help="Folder or name of a checkpoint; sam3-tiny, if left out."),
  ] = None,
  predictions: Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Score these, in COCO's results layout, without a model."),
  ] = None,
  prompt: Annotated[
    Ask,
    typer.Option(
      help="What the model is told: the phrase, the largest box of the objects (pairs without "
      "objects are left out), or both. By click it is asked for each object itself, by clicks that "
      "mend and by a box; by everything, nothing."
    ),
  ] = Ask.text,
  option: MaskOptions = None,
  threshold: Annotated[
    float, typer.Option(metavar="0..1", help="Count predictions that score so much or more.")
  ] = 0.5,
  out: Annotated[
    Path, typer.Option(metavar="FILE", help="The figures; predictions.json goes beside it.")
  ] = Path("metrics.json"),
  worst: Annotated[
    int, typer.Option(min=0, metavar="N", help="Draw the N worst pairs, on a page in worst/.")
  ] = 0,
  device: OnDevice = None,
  dtype: Computed = Dtype.auto,
  quiet: Quiet = False,
  debug: Debug = False,
) -> None:
  """Score a checkpoint, or given predictions: cgF1 and its parts, average precision; with --prompt
  click the mean IoU over objects, with everything the share that is found.

  All files appear when everything is done, or none of them.
  """
  arguments.check_share("--threshold", threshold)
  if checkpoint is not None and predictions is not None:
    raise ValueError("--checkpoint and --predictions exclude each other; give one of them.")
  pointing = prompt.value if prompt is Ask.click or prompt is Ask.everything else None
  if pointing and (predictions is not None or worst or len(data) > 1):
    raise ValueError(
      f"--prompt {prompt.value} asks a model about one --data; leave out --predictions and --worst."
    )
  if option and prompt is not Ask.everything:
    raise ValueError(f"--option {option[0]!r} is for --prompt everything; leave it out.")
  arguments.check_writable(out.parent)
  if out.is_dir():
    raise ValueError(f"--out {out} is a folder; name a file in it, {out / 'metrics.json'}.")
  arguments.use_device(device)

  from sam3_jax.evaluation.run import Job, run, run_visual

  job = Job(
    data=data,
    images=images,
    checkpoint=None if predictions else arguments.find(checkpoint or "sam3-tiny", quiet),
    predictions=predictions,
    prompt="text" if prompt is Ask.click or prompt is Ask.everything else prompt.value,
    visual=pointing,
    generation=arguments.mask_generation(option or [], None),
    threshold=threshold,
    out=out,
    worst=worst,
  )
  work, precision = run_visual if pointing else run, None if dtype is Dtype.auto else dtype.value
  work(job, precision, Console(quiet=quiet), Console(stderr=True))
