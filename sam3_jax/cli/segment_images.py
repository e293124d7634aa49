"""The work of `sam3-jax segment`: segments images and writes overlays, JSON and a table."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from rich.table import Table
from rich.text import Text

from sam3_jax.inference.mask_generator import MaskGeneration
from sam3_jax.inference.predictor import Sam3
from sam3_jax.inference.provenance import check_concept
from sam3_jax.inference.refine import add_instance, refine_by_clicks
from sam3_jax.inference.tiled import WINDOWS
from sam3_jax.inputs.concept import ConceptFile
from sam3_jax.inputs.image_limits import InvalidImageError
from sam3_jax.inputs.image_listing import ANNOTATIONS, IMAGE
from sam3_jax.inputs.preprocess import displayed_size, read_image
from sam3_jax.inputs.prompts import Prompt, check_boxes, prompt_as_json
from sam3_jax.inputs.raster import RasterOptions, open_raster
from sam3_jax.inputs.tiling import MIN_TILE, Tiling
from sam3_jax.inputs.visual_prompts import VisualPrompt, check_visual, visual_as_json
from sam3_jax.inputs.windows import open_windows
from sam3_jax.outputs.coco_json import (
  coco,
  json_of,
  output_stems,
  png_of,
  write,
)
from sam3_jax.outputs.geo_features import SUFFIXES
from sam3_jax.outputs.geo_features import features as as_features
from sam3_jax.outputs.geo_features import writer as feature_writer
from sam3_jax.outputs.instances import Instances
from sam3_jax.outputs.visualize import overlay
from sam3_jax.utils.console import Console, loading, print_error, printable, progress, say
from sam3_jax.utils.os_errors import reason

DEFAULT_THRESHOLD = 0.5
LISTED = 10  # images whose output files are listed; the others are counted


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
  """The arguments of a run.

  Attributes:
    images: existing files without duplicates.
    prompts: concept prompts and concepts for every image.
    visual: visual prompts for every image; with a single concept prompt, they refine its result.
    mask_generation: options to segment everything, without prompts.
    tiling: the windows in which to segment each image; None for the image as a whole.
    raster: how to read the images as rasters; None to read them as images.
    features: layout of the file of georeferenced features, a key of `geo_features.SUFFIXES`.
    out: output directory; created when there is something to write.
    threshold: minimum score of instances, exclusive; None for the default of the kind of prompt.
    max_detections: most instances per prompt, those with the highest scores; None for all.
    max_pixels: larger images are rejected.
  """

  images: Sequence[Path]
  prompts: Sequence[Prompt | ConceptFile]
  out: Path
  threshold: float | None
  max_detections: int | None
  max_pixels: int
  visual: Sequence[VisualPrompt] = ()
  mask_generation: MaskGeneration | None = None
  tiling: Tiling | None = None
  raster: RasterOptions | None = None
  features: str | None = None

  @property
  def phrases(self) -> list[str]:
    """The name of each prompt in results; distinct."""
    if self.mask_generation:
      return ["everything"]
    if not self.prompts:
      several = len(self.visual) > 1
      return [_name(prompt, i if several else 0) for i, prompt in enumerate(self.visual, start=1)]
    names: list[str] = []
    for prompt in self.prompts:
      name = _concept_name(prompt)
      numbers = (f"{name} ({number})" for number in range(2, len(self.prompts) + 1))
      names.append(next(one for one in (name, *numbers) if one not in names))
    return names

  @property
  def programs(self) -> dict[str, Any]:
    """The sizes of the programs to compile, as arguments of `Sam3.compile`."""
    if self.tiling or self.raster:
      return {"images": WINDOWS if self.tiling else 1, "prompts": 0}
    return {
      "images": 1,
      "prompts": len(self.boxes),
      "boxes": max(self.boxes, default=0),
      "exemplars": [len(one.concept) for one in self.prompts if isinstance(one, ConceptFile)],
      "max_detections": self.max_detections,
    }

  @property
  def boxes(self) -> list[int]:
    """The number of boxes of each prompt, without the concepts."""
    return [len(prompt.boxes) for prompt in self.prompts if isinstance(prompt, Prompt)]

  @property
  def limit(self) -> float:
    """The threshold in effect."""
    if self.mask_generation:
      return self.mask_generation.pred_iou_thresh
    default = DEFAULT_THRESHOLD if self.prompts else 0.0
    return default if self.threshold is None else self.threshold

  @property
  def outputs(self) -> list[tuple[Path, ...]]:
    """The paths of overlay, JSON and features for each image."""
    suffixes = [IMAGE, ANNOTATIONS]
    if self.features:
      suffixes.append(Path(ANNOTATIONS).stem + SUFFIXES[self.features])
    stems = output_stems(self.images)
    return [tuple(self.out / (stem + suffix) for suffix in suffixes) for stem in stems]

  def check(self) -> None:
    """Raises ValueError if a box lies outside an image, or an output would replace an input."""
    inputs = {path.resolve() for path in self.images}
    for path in (path for paths in self.outputs for path in paths):
      if path.resolve() in inputs:
        raise ValueError(f"{path} is an input and would be overwritten; choose another --out.")
    if self.visual or any(self.boxes):
      for path in self.images:
        if (size := _size(path, self.max_pixels)) is not None:
          for prompt in self.prompts:
            if isinstance(prompt, Prompt):
              check_boxes(prompt, *size)
          for prompt in self.visual:
            check_visual(prompt, *size)


def run(job: Job, checkpoint: Path, dtype: str | None, console: Console, errors: Console) -> int:
  """Runs a job.

  Args:
    job: its arguments.
    checkpoint: directory of the model.
    dtype: as in `Sam3.from_checkpoint`.
    console: for the table and the paths; a quiet one also suppresses progress and notes.
    errors: for progress, notes and errors of single images.

  Returns:
    The number of images that could not be read; each is reported on `errors`.

  Raises:
    ValueError, OSError: any other error. Files written before it are complete.
  """
  job.check()
  failures, done, table, trained = 0, [], _table(), None
  try:
    with loading(errors, checkpoint, quiet=console.quiet) as step:
      model = Sam3.from_checkpoint(checkpoint, dtype=dtype, ahead=job.programs, progress=step)
    model.tokenizer.check(prompt.phrase for prompt in job.prompts)
    for prompt in job.prompts:
      if isinstance(prompt, ConceptFile):
        check_concept(prompt.concept, model.origin, model.config)
    trained = model.info.get("trained")
    table.title = Text(f"{checkpoint.name}, {model.dtype} on {_platform(model)}")
    with progress(errors, bar=bool(job.tiling) or len(job.images) > 1, quiet=console.quiet) as step:
      for i, (path, outputs) in enumerate(zip(job.images, job.outputs, strict=True)):
        wait = "" if done else ", compiling first, which can take a minute"

        def show(fraction: float, i: int = i, what: str = f"{path.name}{wait}") -> None:
          step(what, (i + fraction) / len(job.images))

        show(0)
        try:
          rows = _segment(model, job, path, outputs, show)
        except _BadImageError as error:
          print_error(str(error), errors)
          failures += 1
        else:
          done.append(outputs)
          for row in rows:
            table.add_row(*row)
  finally:  # shows the completed images even after an error
    if done:
      if trained is False and not console.quiet:
        note = f"note: {checkpoint.name} is untrained, its parameters are random: the results are"
        say(errors, f"{note} meaningless. Convert the released weights with `sam3-jax convert`.")
      console.print(table)
      _list_outputs(console, job.out, done)
  return failures


class _BadImageError(Exception):
  """A file that cannot be read as an image; the run continues with the others."""


def _segment(
  model: Sam3,
  job: Job,
  path: Path,
  outputs: tuple[Path, ...],
  show: Callable[[float], object],
) -> list[tuple[str | Text, ...]]:
  """Segments one image and writes its files; returns rows of the table."""
  start = time.perf_counter()
  with contextlib.ExitStack() as stack:
    image: Any
    try:
      if job.raster:
        needed, limit = job.features is not None, job.max_pixels
        image = stack.enter_context(
          open_raster(path, job.raster, georeferenced=needed, max_pixels=limit)
        )
      elif job.tiling:
        image = stack.enter_context(open_windows(path, max_pixels=job.max_pixels))
      else:
        image = read_image(path, max_pixels=job.max_pixels)
    except (ValueError, TypeError, OSError) as error:
      raise _BadImageError(str(error)) from error
    try:
      instances = _instances(model, job, image, show)
    except InvalidImageError as error:  # windows are read while the others are segmented
      raise _BadImageError(str(error)) from error
    return _write(model, job, path, outputs, image, instances, start)


def _write(
  model: Sam3,
  job: Job,
  path: Path,
  outputs: tuple[Path, ...],
  image: Any,
  instances: Sequence[Instances],
  start: float,
) -> list[tuple[str | Text, ...]]:
  """Writes the files of one image; returns rows of the table."""
  info = {
    "description": f"sam3-jax {version('sam3-jax')}",
    "checkpoint": model.info,
    "threshold": job.limit,
    **({"tiling": dataclasses.asdict(job.tiling)} if job.tiling else {}),
    "everything": job.mask_generation and dataclasses.asdict(job.mask_generation),
    "visual_prompts": [visual_as_json(prompt) for prompt in job.visual],
    "prompts": [
      prompt_as_json(prompt) if isinstance(prompt, Prompt) else prompt.to_json()
      for prompt in job.prompts
    ],
  }
  drawing, annotations, *features = outputs
  record = coco(str(path), image.shape[:2], instances, job.phrases, info)
  drawn = overlay(image, instances, job.phrases)
  try:
    files = {annotations: json_of(record), drawing: png_of(drawn)}
    for file in features:
      frame = as_features(instances, job.phrases, image.crs, image.transform)
      files[file] = feature_writer(frame, str(job.features))
    write(files)
  except OSError as error:
    raise OSError(
      f"cannot write {error.filename}: {reason(error)} or choose another --out."
    ) from error
  seconds = f"{time.perf_counter() - start:.1f}"
  return [
    (
      Text(printable(path.name) if i == 0 else ""),
      Text(printable(phrase)),
      str(len(one)),
      f"{max(one.scores):.2f}" if len(one) else "-",
      seconds if i == 0 else "",
    )
    for i, (phrase, one) in enumerate(zip(job.phrases, instances, strict=True))
  ]


def _instances(
  model: Sam3, job: Job, image: Any, show: Callable[[float], object]
) -> list[Instances]:
  """The instances of one image for each of the job's prompts."""
  prompts = [one.concept if isinstance(one, ConceptFile) else one for one in job.prompts]
  if job.tiling or job.raster:
    tiling = job.tiling or Tiling(max(MIN_TILE, *image.size))
    return model.segment_tiled(
      image, prompts, tile=tiling.tile, overlap=tiling.overlap, threshold=job.limit,
      max_detections=job.max_detections, progress=show,
    )  # fmt: skip
  if job.mask_generation:
    found = model.generate_masks(image, job.mask_generation, max_pixels=job.max_pixels)
    return [found[: job.max_detections]]
  embedding = model.encode(image, visual=bool(job.visual), max_pixels=job.max_pixels)
  if not job.prompts:
    found = model.decode_visual(
      embedding, job.visual, multimask=all(one.is_ambiguous for one in job.visual)
    )
    return [one[one.scores > job.limit] for one in found.instances()]
  found = model.decode(embedding, prompts, max_detections=job.max_detections)
  instances = found.instances(job.limit)
  for prompt in job.visual:  # with a single concept prompt
    if prompt.box is not None:
      instances = [add_instance(model, embedding, instances[0], prompt)]
    else:
      refined = refine_by_clicks(model, embedding, instances[0], prompt.points, prompt.point_labels)
      instances = [refined]
  return instances


def _concept_name(prompt: Prompt | ConceptFile) -> str:
  if isinstance(prompt, ConceptFile):
    return prompt.category
  return prompt.text or ("exemplar box" if len(prompt.boxes) == 1 else "exemplar boxes")


def _name(prompt: VisualPrompt, number: int) -> str:
  kind = "clicks" if len(prompt.points) > 1 else "click" if prompt.points else "box"
  return f"{kind} {number}" if number else kind


def _list_outputs(console: Console, out: Path, done: Sequence[tuple[Path, ...]]) -> None:
  for path in (path for paths in done[:LISTED] for path in paths):
    say(console, str(path))
  if more := sum(map(len, done[LISTED:])):
    say(console, f"... and {more} more files in {out}")


def _table() -> Table:
  table = Table(caption="The time of the first image includes compilation.")
  table.add_column("Image", overflow="fold")
  table.add_column("Prompt", overflow="fold")
  for heading in ("Instances", "Best score", "Seconds"):
    table.add_column(heading, justify="right")
  return table


def _platform(model: Sam3) -> str:
  return jax.tree.leaves(model.params)[0].devices().pop().platform


def _size(path: Path, max_pixels: int) -> tuple[int, int] | None:
  """Height and width of an image; None if it is damaged, which `read_image` will report."""
  try:
    return displayed_size(path, max_pixels=max_pixels)
  except (OSError, ValueError):
    return None
