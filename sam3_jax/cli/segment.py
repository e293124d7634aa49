"""Declares `sam3-jax segment`."""

from pathlib import Path
from typing import Annotated

import typer

from sam3_jax.cli import arguments
from sam3_jax.cli.options import (
  Computed,
  Debug,
  Dtype,
  MaskOptions,
  OnDevice,
  Overlap,
  Quiet,
  Strict,
  Tile,
)
from sam3_jax.cli.prompt_arguments import parse_mask_generation, parse_prompts, parse_tiling
from sam3_jax.cli.raster_arguments import FeatureLayout, parse_raster
from sam3_jax.utils.console import FAILED, Console


def segment(
  images: Annotated[
    list[Path],
    typer.Argument(metavar="IMAGE", help="Images, directories of images, or quoted patterns."),
  ],
  text: Annotated[
    list[str] | None,
    typer.Option(metavar="PHRASE", help="Text prompt: a short noun phrase. May be repeated."),
  ] = None,
  box: Annotated[
    list[str] | None,
    typer.Option(
      metavar="X0,Y0,X1,Y1[,0|1]",
      help="Exemplar box, positive (1, the default) or negative (0), in pixels of the image as "
      "displayed. May be repeated. Can be combined with a single --text; without --text, finds all "
      "instances that look like the exemplar. With --visual, segments the object in the box.",
    ),
  ] = None,
  concept: Annotated[
    list[str] | None,
    typer.Option(
      metavar="FILE",
      help="Concept: exemplars of other images, from `sam3-jax concept`. May be repeated, and "
      "combined with --text and --box, which are prompts of their own.",
    ),
  ] = None,
  point: Annotated[
    list[str] | None,
    typer.Option(
      metavar="X,Y[,0|1]",
      help="Point prompt on the object (1, the default) or off it (0), in pixels. Repeat to add "
      "points on or off the same object. With a single --text, refines the instance under the "
      "points, or adds an instance.",
    ),
  ] = None,
  visual: Annotated[
    bool,
    typer.Option(
      "--visual", metavar="", help="--box is a box prompt on an object, not an exemplar."
    ),
  ] = False,
  everything: Annotated[
    bool,
    typer.Option(
      "--everything",
      metavar="",
      help="Segment everything in the image, using a grid of point prompts.",
    ),
  ] = False,
  option: MaskOptions = None,
  checkpoint: Annotated[
    str, typer.Option(metavar="DIR", help="Directory or name of a checkpoint.")
  ] = "sam3-tiny",
  threshold: Annotated[
    float | None,
    typer.Option(
      metavar="0..1",
      help="Keep instances with a score above this value. [default: 0.5; 0.8 with --everything; 0 "
      "with --point or --visual without --text]",
    ),
  ] = None,
  out: Annotated[
    Path,
    typer.Option(metavar="DIR", help="Output directory, for NAME.sam3.png and NAME.sam3.json."),
  ] = Path("out"),
  device: OnDevice = None,
  dtype: Computed = Dtype.auto,
  max_detections: Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Keep at most N instances per prompt.")
  ] = None,
  tile: Tile = None,
  overlap: Overlap = None,
  to: Annotated[
    FeatureLayout | None,
    typer.Option(
      help="Also write the instances of georeferenced rasters (GeoTIFF, COG) in their coordinates, "
      "with areas in square meters. Needs the extra geo."
    ),
  ] = None,
  bands: Annotated[
    str | None,
    typer.Option(
      metavar="R,G,B",
      help="Bands of a raster for red, green and blue, from 1, or one for gray. [default: 1,2,3]",
    ),
  ] = None,
  stretch: Annotated[
    str | None,
    typer.Option(
      metavar="LOW,HIGH",
      help="Percentiles of a raster's values that become black and white, such as 2,98; 0,100 for "
      "minimum and maximum. Required for values of more than 8 bits.",
    ),
  ] = None,
  max_pixels: Annotated[
    int, typer.Option(min=1, metavar="N", help="Reject images with more than N pixels.")
  ] = 300_000_000,  # preprocess.MAX_PIXELS, whose import would import JAX
  strict: Strict = False,
  quiet: Quiet = False,
  debug: Debug = False,
) -> None:
  """Segment images: all instances of a concept, or single objects.

  --text, --box and --concept describe a concept; all its instances are segmented. --point, and
  --box with --visual, select a single object.

  All arguments are checked before any work. Files that are not images, or are damaged, are reported
  and skipped; the others are processed, and the exit status is 2. If several images have the same
  name, the results of the second one are called NAME-2, and so on.
  """
  arguments.check_fraction("--threshold", threshold)
  arguments.check_writable(out)
  tiling, raster = parse_tiling(tile, overlap), parse_raster(to, bands, stretch)

  from sam3_jax.utils.notes import ListingNotes

  notes = ListingNotes()
  images = arguments.images(images, notes)
  if strict:
    notes.refuse()
  arguments.use_device(device)

  from sam3_jax.cli.segment_images import Job, run

  given = parse_prompts(text or [], box or [], point or [], visual, everything, concept or [])
  if option and not everything:
    raise ValueError(f"--option {option[0]!r} needs --everything; add it, or leave out --option.")
  if (tiling or raster) and (given.visual or everything):
    raise ValueError(
      f"{'--tile' if tiling else 'a raster'} takes --text, --concept and exemplar boxes only; "
      "leave out --point, --visual and --everything, or the options for tiles and rasters."
    )
  job = Job(
    images=images,
    prompts=given.prompts,
    visual=given.visual,
    mask_generation=parse_mask_generation(option or [], threshold) if everything else None,
    out=out,
    threshold=threshold,
    max_detections=max_detections,
    max_pixels=max_pixels,
    tiling=tiling,
    raster=raster,
    features=to and to.value,
  )
  directory = arguments.find(checkpoint, quiet)
  precision = None if dtype is Dtype.auto else dtype.value
  try:
    failed = run(job, directory, precision, Console(quiet=quiet), Console(stderr=True))
  finally:
    arguments.say_notes(notes, quiet)
  if failed:
    raise typer.Exit(FAILED)
