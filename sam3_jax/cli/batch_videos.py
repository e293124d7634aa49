"""The work of `sam3-jax batch --videos`: creates the job and its model, and runs it."""

from collections.abc import Sequence
from typing import Any

from sam3_jax.batch.inputs import check_phrases, common_phrases
from sam3_jax.batch.processes import initialize
from sam3_jax.batch.run import run
from sam3_jax.batch.video_inputs import frozen_video, list_videos
from sam3_jax.batch.video_job import VideoJob
from sam3_jax.cli import arguments
from sam3_jax.cli.batch_images import DEADLINE, passing_faults
from sam3_jax.inference.predictor import Sam3
from sam3_jax.utils.console import Console, loading
from sam3_jax.utils.notes import ListingNotes
from sam3_jax.utils.signals import terminable


def process_videos(
  videos: str,
  prompts: str | None,
  checkpoint: str,
  *,
  texts: Sequence[str],
  device: str | None,
  dtype: str | None,
  members: dict[str, Any],
  settings: dict[str, Any],
  quiet: bool,
  strict: bool,
  allow_https: bool,
) -> bool:
  """Runs a job, or the rest of it; returns whether all parts of this process are done.

  Args:
    videos, prompts, checkpoint, texts, device, quiet: values of the options.
    dtype: of the computation; None for the default of the device.
    members: arguments of `processes.initialize`.
    settings: fields of the job.
    strict: raise if the listing skips files.
    allow_https: whether videos may be on web servers.
  """
  notes = ListingNotes()
  with passing_faults() as unfinished, terminable(DEADLINE) as stopping:
    found, phrases = arguments.find(checkpoint, quiet), common_phrases(prompts, texts)
    inputs = list_videos(videos, phrases, notes, allow_https=allow_https)
    if strict:
      notes.refuse()
    if device == "cpu":
      arguments.use_device(device)
    process, processes = initialize(**members)
    if device != "cpu":
      arguments.use_device(device)
    with loading(Console(stderr=True), found, quiet=quiet) as step:
      model = Sam3.from_checkpoint(found, dtype=dtype, verify=True, progress=step)
    check_phrases(inputs, model.tokenizer)
    job = VideoJob(
      inputs=inputs, process=process, processes=processes,
      frozen_input=frozen_video(videos, phrases), **settings,
    )  # fmt: skip
    try:
      return not stopping() and run(
        job, model, Console(quiet=quiet), Console(stderr=True), stopping, stopping.at_deadline
      )
    finally:
      if process == 0:
        arguments.say_notes(notes, quiet)
  return not unfinished
