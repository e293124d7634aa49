"""`sam3-jax concept`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from sam3_jax.cli import arguments
from sam3_jax.cli.options import Computed, Debug, Dtype, OnDevice, Quiet
from sam3_jax.cli.prompt_arguments import parse_prompts
from sam3_jax.utils.console import Console, loading, say
from sam3_jax.utils.paths import require_local


def concept(
  image: Annotated[Path, typer.Argument(metavar="IMAGE", help="Image with the exemplars.")],
  out: Annotated[
    Path,
    typer.Option(
      metavar="FILE", help="Output file, such as NAME.safetensors. NAME is the name of the concept."
    ),
  ],
  box: Annotated[
    list[str] | None,
    typer.Option(
      metavar="X0,Y0,X1,Y1[,0|1]",
      help="Exemplar box, positive (1, the default) or negative (0), in pixels of the image as "
      "displayed. Required; may be repeated.",
    ),
  ] = None,
  text: Annotated[
    str | None,
    typer.Option(
      metavar="PHRASE", help="A short noun phrase, to find instances of it that look like these."
    ),
  ] = None,
  join: Annotated[
    list[str] | None,
    typer.Option(
      metavar="FILE", help="Add the exemplars of this concept, of other images. May be repeated."
    ),
  ] = None,
  checkpoint: Annotated[
    str, typer.Option(metavar="DIR", help="Directory or name of a checkpoint.")
  ] = "sam3-tiny",
  device: OnDevice = None,
  dtype: Computed = Dtype.auto,
  max_pixels: Annotated[
    int, typer.Option(min=1, metavar="N", help="Reject images with more than N pixels.")
  ] = 300_000_000,  # preprocess.MAX_PIXELS, whose import would import JAX
  quiet: Quiet = False,
  debug: Debug = False,
) -> None:
  """Save exemplars of an image as a concept, to find the same in other images.

  `segment --concept FILE` and `batch --concept FILE` use it, with the checkpoint that made it.
  """
  if not box:
    raise ValueError("a concept needs exemplars: give --box X0,Y0,X1,Y1.")
  require_local(image, "the image of the exemplars")
  if not image.is_file():
    raise FileNotFoundError(f"there is no image {image}; check the path.")
  if out.is_dir() or out.resolve() == image.resolve():
    raise ValueError(f"--out {out} must be a file other than the image.")
  arguments.check_writable(out.parent)
  arguments.use_device(device)

  from sam3_jax.inference.predictor import Sam3
  from sam3_jax.inference.provenance import check_concept
  from sam3_jax.inputs.concept import Concept, ConceptFile

  prompt: Any = parse_prompts([] if text is None else [text], box, [], False, False).prompts
  others = [ConceptFile.read(path).concept for path in join or []]
  directory = arguments.find(checkpoint, quiet)
  precision = None if dtype is Dtype.auto else dtype.value
  with loading(Console(stderr=True), directory, quiet=quiet) as step:
    model = Sam3.from_checkpoint(directory, dtype=precision, progress=step)
  for other in others:
    check_concept(other, model.origin, model.config)
  made: Any = model.concept(model.encode(image, max_pixels=max_pixels), prompt)
  made = Concept.join([*others, made])
  made.save(out)
  count, positive = len(made), int(made.positive.sum())
  labels = f"{count} exemplar{'s' * (count > 1)}, {count - positive} negative"
  phrase = "" if made.text is None else f", phrase {made.text!r}"
  say(Console(quiet=quiet), f"{out}: {labels}{phrase}")
