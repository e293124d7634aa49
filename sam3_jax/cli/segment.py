"""`sam3-jax segment`."""

from pathlib import Path
from typing import Annotated

import typer

from sam3_jax.cli import arguments
from sam3_jax.cli.options import Computed, Debug, Dtype, MaskOptions, OnDevice, Quiet, Strict
from sam3_jax.utils.console import FAILED, Console


def segment(
  images: Annotated[
    list[Path],
    typer.Argument(metavar="IMAGE", help="Images, directories of images, or patterns in quotes."),
  ],
  text: Annotated[
    list[str] | None,
    typer.Option(metavar="PHRASE", help="What to find: a short noun phrase. Repeat for several."),
  ] = None,
  box: Annotated[
    list[str] | None,
    typer.Option(
      metavar="X0,Y0,X1,Y1[,0|1]",
      help="An example in pixels of the image as displayed (1, the default) or a counterexample "
      "(0). Repeat for several. Joins a single --text; alone it finds all that looks like it; with "
      "--visual it finds the one thing in it.",
    ),
  ] = None,
  point: Annotated[
    list[str] | None,
    typer.Option(
      metavar="X,Y[,0|1]",
      help="A click on the one thing that is wanted (1, the default) or off it (0), in pixels. "
      "Repeat for several. With a single --text it mends what the phrase found: the instance that "
      "it lies on, or a new one.",
    ),
  ] = None,
  visual: Annotated[
    bool, typer.Option("--visual", metavar="", help="A --box is around one thing, no example.")
  ] = False,
  everything: Annotated[
    bool,
    typer.Option("--everything", metavar="", help="Segment all there is, by a grid of clicks."),
  ] = False,
  option: MaskOptions = None,
  checkpoint: Annotated[
    str, typer.Option(metavar="DIR", help="Folder or name of a checkpoint.")
  ] = "sam3-tiny",
  threshold: Annotated[
    float | None,
    typer.Option(
      metavar="0..1",
      help="Keep instances that score above it. [default: 0.5; 0.8 with --everything; with --point "
      "or --visual alone, all]",
    ),
  ] = None,
  out: Annotated[
    Path,
    typer.Option(metavar="DIR", help="Where NAME.sam3.png and NAME.sam3.json of an image go."),
  ] = Path("out"),
  device: OnDevice = None,
  dtype: Computed = Dtype.auto,
  max_detections: Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Keep the best N of each prompt.")
  ] = None,
  max_pixels: Annotated[
    int, typer.Option(min=1, metavar="N", help="Refuse images of more pixels.")
  ] = 300_000_000,  # preprocess.MAX_PIXELS, which would cost JAX's import
  strict: Strict = False,
  quiet: Quiet = False,
  debug: Debug = False,
) -> None:
  """Find, box and mask all instances of phrases or example boxes in images, or what is clicked.

  A --box is an example: everything that looks like it is found. A --point is a click: the one thing
  under it is found, and with --visual a --box likewise means the one thing in it.

  Everything given is checked before any work, and a fault stops the run. A file that turns out to
  be no image, or a damaged one, is reported and left out; the others are done, and the exit
  status is 2. Of images with the same name the second's results are called NAME-2, and so on.
  """
  arguments.check_share("--threshold", threshold)
  arguments.check_writable(out)

  from sam3_jax.utils.notes import ListingNotes

  notes = ListingNotes()
  images = arguments.images(images, notes)
  if strict:
    notes.refuse()
  arguments.use_device(device)

  from sam3_jax.cli.segment_images import Job, run

  asked = arguments.asked(text or [], box or [], point or [], visual, everything)
  if option and not everything:
    raise ValueError(f"--option {option[0]!r} is for --everything; add it, or leave it out.")
  job = Job(
    images=images,
    prompts=asked.prompts,
    visual=asked.visual,
    everything=arguments.mask_generation(option or [], threshold) if everything else None,
    out=out,
    threshold=threshold,
    max_detections=max_detections,
    max_pixels=max_pixels,
  )
  found = arguments.find(checkpoint, quiet)
  precision = None if dtype is Dtype.auto else dtype.value
  try:
    failed = run(job, found, precision, Console(quiet=quiet), Console(stderr=True))
  finally:
    arguments.say_notes(notes, quiet)
  if failed:
    raise typer.Exit(FAILED)
