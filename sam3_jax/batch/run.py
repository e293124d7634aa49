"""The work of `sam3-jax batch`: one process's share of a job."""

import collections
import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from sam3_jax.batch import parts
from sam3_jax.batch.files import draft_of, drafts, remove_drafts
from sam3_jax.batch.freeze import agree
from sam3_jax.batch.job import Job, check_failures
from sam3_jax.batch.part_files import (
  LEASES,
  PARTS,
  begun_path,
  check_job,
  journal_path,
  lease_path,
  manifest_path,
  number,
)
from sam3_jax.batch.pipeline import Pipeline
from sam3_jax.batch.run_stats import Reporter, Tally
from sam3_jax.batch.share import Share
from sam3_jax.inference.predictor import Sam3
from sam3_jax.utils.console import Console, progress, say
from sam3_jax.utils.lease import Lease

_Closing = Callable[[], object]


def run(
  job: Job,
  model: Sam3,
  console: Console,
  errors: Console,
  stopping: Callable[[], bool] = lambda: False,
  at_deadline: Callable[[_Closing], object] = lambda _: None,
) -> bool:
  """Does what is not done yet of this process's share of a job.

  Args:
    job: what to do.
    model: on a mesh of this process's devices.
    console: for the summary; if it is quiet, there is no progress either.
    errors: for progress, and for what keeps the share from being done.
    stopping: whether to stop after the batch in work (SIGTERM); what is done is kept.
    at_deadline: takes a function that keeps what is done and returns soon, whatever this thread is
      doing; to be called where the process must end.

  Returns:
    Whether all parts of the share are done. If not, running the job again can do them.

  Raises:
    TooManyFailuresError: more inputs failed than allowed, in this run or before.
    StorageError: so many inputs cannot be read that the storage must be away.
    ValueError: `out` holds another job, inputs of it have changed, or there are visual prompts and
      no head for them.
    OSError: the results cannot be written.
  """
  if job.visual:
    model.visual_params()  # raises before anything is written
  described, inputs = agree(
    job.out, job.describe(model), job.inputs, add=job.add, retry_failed=job.retry_failed
  )
  job = dataclasses.replace(job, inputs=inputs)
  remove_drafts(job.out, lambda name: bool(re.match(r"job\.|inputs-|errors\.", name)))
  mine = [part for part in range(parts.count(described)) if job.is_mine(part)]
  who = f"process {job.process} of {job.processes}: " if job.processes > 1 else ""
  tally = Tally(0)
  shares = _shares(job, described, mine, tally)
  at_deadline(lambda: _close(shares))
  if not console.quiet and len(shares) < len(mine):
    say(errors, f"{who}{len(mine) - len(shares):,} of {len(mine):,} parts are done already")
  check_failures(job, tally)
  try:
    with progress(errors, bar=True, quiet=console.quiet) as step:
      reporter = Reporter(tally, errors, step, who, console.quiet)
      Pipeline(job, model, tally, reporter).run(shares, stopping)
  except BaseException:
    with contextlib.suppress(OSError):  # the disk may be full: then that is what went wrong
      _close(shares)
      parts.write_errors(job.out)
    raise
  _close(shares)
  whole = parts.done(job.out).issuperset(mine)
  if whole or not stopping():  # who is told to stop has no time to read all manifests
    parts.write_errors(job.out)
  if not console.quiet:
    for line in tally.summary():
      say(console, who + line)
  if not whole:
    for line in _open_ends(shares, tally, stopping()):
      say(errors, who + line)
  check_failures(job, tally, at_end=whole)
  return whole


def _shares(job: Job, described: dict, mine: Iterable[int], tally: Tally) -> list[Share]:
  """The parts to do. The tally learns of the others."""
  finished, left = parts.done(job.out), _drafts(job.out)
  _remove_leases(job.out, finished)
  shares = []
  for part in mine:
    # Another process may have opened it again since: then it is not done.
    if part in finished and manifest_path(job.out, part).exists():
      entry = parts.manifest(job.out, part)
      check_job(entry, parts.job_digest(described, part), job.out, part)
      if not (job.retry_failed and entry["failed"]):
        tally.done_before += entry["done"]
        tally.failed_before += len(entry["failed"])
        continue
    shares.append(Share(job, part, described, left[part]))
    tally.total += len(shares[-1].inputs)
  return shares


def _remove_leases(out: Path, finished: set[int]) -> None:
  """Of parts that are done, with their beginnings: their process was killed before it could give
  them back. And what processes were writing when they were killed."""
  remove_drafts(out / LEASES, lambda _: True)
  left = {number(path.name) for path in (out / LEASES).glob("part-*")}
  left |= {number(path.name) for path in (out / PARTS).glob("part-*.begun.*")}
  for part in finished.intersection(left):
    if (lease := Lease(lease_path(out, part))).acquire():
      if manifest_path(out, part).exists():  # no other process has opened it again
        begun = begun_path(out, part)
        for path in (journal_path(out, part), begun, begun.with_suffix(".jsonl")):
          path.unlink(missing_ok=True)
      lease.release()


def _drafts(out: Path) -> dict[int, list[Path]]:
  """What processes, alive or not, were writing of each part."""
  found: dict[int, list[Path]] = collections.defaultdict(list)
  for path in drafts(out / PARTS):
    if (part := number(draft_of(path))) is not None:
      found[part].append(path)
  return found


def _close(shares: Sequence[Share]) -> None:
  for share in shares:
    share.close()


def _open_ends(shares: Sequence[Share], tally: Tally, stopped: bool) -> Iterable[str]:
  """Why the share is not done."""
  if stopped:
    yield "stopped as asked; rerun the same command to resume"
  held = sum(share.held and not share.finished for share in shares)
  if held:
    yield (
      f"{held:,} {'part is' if held == 1 else 'parts are'} being done by another process; rerun "
      "the same command when it has ended"
    )
  if tally.unreadable and not stopped:
    count = len(tally.unreadable)
    yield (
      f"{count:,} {'image' if count == 1 else 'images'} could not be read "
      f"({tally.some_unreadable()}); rerun the same command to retry, or add --skip-unreadable to "
      "count what cannot be read as failed"
    )
