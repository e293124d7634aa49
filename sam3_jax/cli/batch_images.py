"""The work of `sam3-jax batch`: creates the job and its model, runs or merges it."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from sam3_jax.batch.formats import write_labelme, write_parquet, write_yolo
from sam3_jax.batch.inputs import check_phrases, frozen_input, list_inputs
from sam3_jax.batch.job import Job, StorageError
from sam3_jax.batch.job_files import noun_of, read_job
from sam3_jax.batch.merge import ANNOTATIONS, EMPTY, merge
from sam3_jax.batch.merge_videos import merge_videos, write_tracks
from sam3_jax.batch.processes import initialize
from sam3_jax.batch.record_files.columns import Columns
from sam3_jax.batch.run import run
from sam3_jax.cli import arguments
from sam3_jax.inference.predictor import Sam3
from sam3_jax.inference.provenance import check_concept
from sam3_jax.inference.sharding import make_mesh
from sam3_jax.inputs.concept import ConceptFile
from sam3_jax.storage.faults import is_transient
from sam3_jax.storage.objects import resolve
from sam3_jax.storage.urls import is_url
from sam3_jax.utils.console import Console, loading, one_line, print_error, say
from sam3_jax.utils.notes import ListingNotes
from sam3_jax.utils.signals import terminable

# Formats of a merged job, by what its inputs are called; the first is always written.
LAYOUTS = {"image": ("coco", "labelme", "yolo", "parquet"), "video": ("ytvis", "tracks")}
_SINGULAR = {
  "images": "image", "videos": "video", "annotations": "annotation", "categories": "category",
  EMPTY: EMPTY.replace("instances", "instance"),
}  # fmt: skip
DEADLINE = 5.0  # seconds after SIGTERM to finish the current batches


def process_images(
  images: str,
  prompts: str | None,
  concepts: Sequence[str],
  checkpoint: str,
  *,
  texts: Sequence[str],
  columns: Columns,
  device: str | None,
  dtype: str | None,
  members: dict[str, Any],
  settings: dict[str, Any],
  quiet: bool,
  strict: bool,
  allow_https: bool,
) -> bool:
  """Runs a job, or the rest of it; returns whether all parts of this process are done.

  An error of a store that may pass is printed: rerunning the command can finish the job.

  Args:
    images, prompts, concepts, checkpoint, texts, device, quiet: values of the options.
    columns: to read of files of records.
    dtype: of the computation; None for the default of the device.
    members: arguments of `processes.initialize`.
    settings: fields of the job.
    strict: raise if the listing skips files.
    allow_https: whether images may be on web servers.
  """
  notes = ListingNotes()
  with passing_faults() as unfinished, terminable(DEADLINE) as stopping:
    files = [ConceptFile.read(path) for path in concepts]
    found = arguments.find(checkpoint, quiet)
    inputs = list_inputs(
      images, prompts, notes, concepts=files, texts=texts, columns=columns, allow_https=allow_https
    )
    if strict:
      notes.refuse()
    if device == "cpu":
      arguments.use_device(device)
    process, processes = initialize(**members)
    with loading(Console(stderr=True), found, quiet=quiet) as step:
      mesh = make_mesh(_devices(device))
      model = Sam3.from_checkpoint(found, dtype=dtype, mesh=mesh, verify=True, progress=step)
    check_phrases(inputs, model.tokenizer)
    for file in files:
      check_concept(file.concept, model.origin, model.config)
    job = Job(
      inputs=inputs, process=process, processes=processes,
      frozen_input=frozen_input(images, prompts, files, texts), **settings,
    )  # fmt: skip
    errors = Console(stderr=True)
    try:
      return not stopping() and run(
        job, model, Console(quiet=quiet), errors, stopping, stopping.at_deadline
      )
    finally:
      if process == 0:
        arguments.say_notes(notes, quiet)
  return not unfinished


@contextlib.contextmanager
def passing_faults() -> Iterator[list[str]]:
  """Prints errors of the storage that may pass, and yields a list that then contains them."""
  found: list[str] = []
  try:
    yield found
  except (OSError, ValueError) as error:
    if not isinstance(error, StorageError) and not is_transient(error):
      raise
    found.append(one_line(error))
    resume = "" if "to resume" in found[0] else " Rerun the same command to resume."
    print_error(f"{found[0].rstrip('.')}.{resume}")


def merge_parts(out: Path, to: str | None, quiet: bool) -> None:
  """Merges the part files of a job, and also writes the results in the format `to`, if given."""
  console, out = Console(quiet=quiet), resolve(out) if is_url(out) else out
  noun = noun_of(read_job(out))
  to = to or LAYOUTS[noun][0]
  if to not in LAYOUTS[noun]:
    raise ValueError(
      f"--to {to} is not for {noun}s; choose one of {', '.join(LAYOUTS[noun])}, or leave it out."
    )
  counts = merge_videos(out) if noun == "video" else merge(out)
  said = ", ".join(_count_of(number, what) for what, number in counts.items())
  say(console, f"{out / ANNOTATIONS}: {said}")
  if to == "tracks":
    say(console, f"{write_tracks(out)}: {_count_of(counts['videos'], 'videos')}")
  elif to not in ("coco", "ytvis"):
    notes = ListingNotes()
    writers = {
      "labelme": lambda: write_labelme(out, notes),
      "yolo": lambda: write_yolo(out, notes),
      "parquet": lambda: write_parquet(out),
    }
    say(console, f"{writers[to]()}: {_count_of(counts['images'], 'images')}")
    arguments.say_notes(notes, quiet)


def _count_of(number: int, what: str) -> str:
  """A number and its noun, which is given in the plural."""
  if number == 1:
    what = _SINGULAR.get(what, what)
  return f"{number:,} {what}"


def _devices(device: str | None) -> list[Any]:
  """The local devices of the given kind; of the default kind if it is None."""
  found = arguments.local_devices()
  if device is None or found[0].platform == device:
    return found
  arguments.use_device(device)
  return jax.local_devices(backend=device)
