"""The work of `sam3-jax batch`: processes the parts of a job that belong to this process."""

import collections
import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from sam3_jax.batch import job_files
from sam3_jax.batch.files import draft_of, drafts, in_parallel, remove_drafts, scratch
from sam3_jax.batch.frozen_inputs import open_job
from sam3_jax.batch.job import BatchJob, Job, check_failures
from sam3_jax.batch.leased_part import LeasedPart
from sam3_jax.batch.part_files import (
  LEASES,
  PARTS,
  begun_path,
  check_job,
  journal_path,
  lease_path,
  manifest_path,
  part_number,
  records_path,
)
from sam3_jax.batch.pipeline import Pipeline
from sam3_jax.batch.run_stats import Reporter, RunStats, VideoStats
from sam3_jax.batch.video_job import VideoJob
from sam3_jax.batch.video_pipeline import VideoPipeline
from sam3_jax.inference.predictor import Sam3
from sam3_jax.storage import retries
from sam3_jax.storage.object_lease import open_lease
from sam3_jax.storage.objects import object_path
from sam3_jax.utils.console import Console, progress, say

_Close = Callable[[], object]


def run(
  job: BatchJob,
  model: Sam3,
  console: Console,
  errors: Console,
  stopping: Callable[[], bool] = lambda: False,
  at_deadline: Callable[[_Close], object] = lambda _: None,
) -> bool:
  """Processes the unfinished parts of a job that belong to this process.

  Args:
    job: what to do.
    model: on a mesh of this process's devices.
    console: for the summary; if it is quiet, no progress is shown either.
    errors: for progress, and for the reasons why parts are unfinished.
    stopping: whether to stop after the current batch (SIGTERM); finished work is kept.
    at_deadline: receives a function that saves finished work and returns soon, whatever this thread
      is doing; to be called when the process must end.

  Returns:
    Whether all parts of this process are done. If not, rerunning the job can finish them.

  Raises:
    TooManyFailuresError: more inputs failed than allowed, in this run or before.
    StorageError: so many inputs cannot be read that the storage is probably unavailable.
    ValueError: `out` holds another job, inputs of it have changed, or the checkpoint cannot do the
      job: there are visual prompts and it has no head for them, or videos and it has no tracker.
    ImportError: there are video files, and PyAV is not installed.
    OSError: the results cannot be written.
  """
  before = retries.totals()
  job.check(model)
  description, inputs = open_job(
    job.out, job.settings(model), job.inputs, noun=job.noun, read_identity=job.read_identity,
    add=job.add, retry_failed=job.retry_failed, frozen_input=job.frozen_input,
  )  # fmt: skip
  if not console.quiet and (more := len(job.inputs) - len(inputs)) > 0:
    what = f"{job.noun} is" if more == 1 else f"{job.noun}s are"
    say(errors, f"{more:,} {what} not in the list of the job; add --add to process them")
  job = dataclasses.replace(job, inputs=inputs)
  remove_drafts(job.out, lambda name: bool(re.match(r"job\.|inputs-|errors\.", name)))
  own = [part for part in range(job_files.part_count(description)) if job.owns(part)]
  prefix = f"process {job.process} of {job.processes}: " if job.processes > 1 else ""
  stats = VideoStats(0) if isinstance(job, VideoJob) else RunStats(0)
  parts = _unfinished(job, description, own, stats)
  at_deadline(lambda: _close(parts))
  if not console.quiet and len(parts) < len(own):
    say(errors, f"{prefix}{len(own) - len(parts):,} of {len(own):,} parts are done already")
  check_failures(job, stats)
  with _saving(job, parts), progress(errors, bar=True, quiet=console.quiet) as step:
    reporter = Reporter(stats, errors, step, prefix, console.quiet)
    _pipeline(job, model, stats, reporter).run(parts, stopping)
  finished = job_files.finished_parts(job.out)
  complete = all(part in finished or job_files.is_finished(job.out, part) for part in own)
  if complete or not stopping():  # a process that must stop has no time to read all manifests
    job_files.write_errors(job.out, own if complete else ())
  _count_requests(stats, before, in_process=not (isinstance(job, Job) and job.workers))
  if not console.quiet:
    for line in stats.summary():
      say(console, prefix + line)
  if not complete:
    for line in _reasons(parts, stats, stopping(), job.noun):
      say(errors, prefix + line)
  check_failures(job, stats, at_end=complete)
  return complete


def _pipeline(
  job: BatchJob, model: Sam3, stats: RunStats, reporter: Reporter
) -> Pipeline | VideoPipeline:
  if isinstance(job, VideoJob) and isinstance(stats, VideoStats):
    return VideoPipeline(job, model, stats, reporter)
  if isinstance(job, Job):
    return Pipeline(job, model, stats, reporter)
  raise TypeError(f"there is no pipeline for a {type(job).__name__}.")


def _count_requests(stats: RunStats, before: tuple[int, int], *, in_process: bool) -> None:
  """Sets the counts of requests that were not for inputs.

  Args:
    stats: with the counts for inputs.
    before: counts of this process before the run.
    in_process: whether threads of this process read the inputs.
  """
  requests, repeated = (now - then for now, then in zip(retries.totals(), before, strict=True))
  stats.other_requests = max(0, requests - in_process * stats.requests)
  stats.other_repeated = max(0, repeated - in_process * stats.repeated)


@contextlib.contextmanager
def _saving(job: BatchJob, parts: Sequence[LeasedPart]):
  """Saves the parts in the end; after an error, collects the failures too."""
  try:
    yield
  except BaseException:
    with contextlib.suppress(OSError):  # the first error counts; the disk may be full
      _close(parts)
      job_files.write_errors(job.out)
    raise
  _close(parts)


def _unfinished(
  job: BatchJob, description: dict, own: Iterable[int], stats: RunStats
) -> list[LeasedPart]:
  """The parts to process; adds the counts of the other ones to `stats`."""
  finished, part_drafts = job_files.finished_parts(job.out), _part_drafts(job.out)
  _remove_leases(job.out, finished)
  own, parts = list(own), []

  def read(part: int) -> dict | None:
    # Another process may have reopened the part since the listing; then it is not done.
    return job_files.find_manifest(job.out, part) if part in finished else None

  for part, manifest in zip(own, in_parallel(job.out, read, own), strict=True):
    if manifest is not None:
      check_job(manifest, job_files.job_digest(description, part), job.out, part)
      if not (job.retry_failed and manifest["failed"]):
        stats.done_before += manifest["done"]
        stats.failed_before += len(manifest["failed"])
        continue
    parts.append(LeasedPart(job, part, description, part_drafts[part]))
    stats.total += len(parts[-1].inputs)
  return parts


def _remove_leases(out: Path, finished: set[int]) -> None:
  """Removes what killed processes left: leases and `.begun.` files of finished parts, and drafts
  of leases."""
  remove_drafts(out / LEASES if object_path(out) is None else scratch(), lambda _: True)
  found = {part_number(path.name) for path in (out / LEASES).glob("part-*")}
  found |= {part_number(path.name) for path in (out / PARTS).glob("part-*.begun.*")}
  for part in finished.intersection(found):
    if (lease := open_lease(lease_path(out, part))).acquire():
      manifest = job_files.find_manifest(out, part)
      if manifest is not None:  # no other process has reopened it
        begun, used = begun_path(out, part), records_path(manifest_path(out, part), manifest).name
        journal_path(out, part).unlink(missing_ok=True)
        for path in (begun, *(out / PARTS).glob(f"part-{part:06}.*.jsonl")):
          if path.name != used:
            path.unlink(missing_ok=True)
      lease.release()


def _part_drafts(out: Path) -> dict[int, list[Path]]:
  """Drafts of the files of each part, of running and of killed processes."""
  found: dict[int, list[Path]] = collections.defaultdict(list)
  for path in drafts(out / PARTS):
    if (part := part_number(draft_of(path))) is not None:
      found[part].append(path)
  return found


def _close(parts: Sequence[LeasedPart]) -> None:
  for part in parts:
    part.close()


def _reasons(
  parts: Sequence[LeasedPart], stats: RunStats, stopped: bool, noun: str
) -> Iterable[str]:
  """Why parts are unfinished."""
  if stopped:
    yield "stopped; rerun the same command to resume"
  leased = sum(part.leased_elsewhere and not part.finished for part in parts)
  if leased:
    yield (
      f"{leased:,} {'part is' if leased == 1 else 'parts are'} being processed by another process; "
      "rerun the same command when it has ended"
    )
  if stats.unreadable and not stopped:
    count = len(stats.unreadable)
    yield (
      f"{count:,} {noun if count == 1 else noun + 's'} could not be read "
      f"({stats.describe_unreadable()}); rerun the same command to retry, or add "
      f"--skip-unreadable to count unreadable {noun}s as failed"
    )
