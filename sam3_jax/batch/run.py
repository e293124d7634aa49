"""The work of `sam3-jax batch`: one process's share of a job."""

import contextlib
from collections.abc import Callable, Sequence

from sam3_jax.batch import parts
from sam3_jax.batch.job import Job, check_failures
from sam3_jax.batch.pipeline import Pipeline, Share
from sam3_jax.batch.tally import Reporter, Tally
from sam3_jax.inference import Sam3
from sam3_jax.terminal import Console, progress, say


def run(
  job: Job,
  model: Sam3,
  console: Console,
  errors: Console,
  stopping: Callable[[], bool] = lambda: False,
) -> bool:
  """Does what is not done yet of this process's share of a job.

  Args:
    job: what to do.
    model: on a mesh of this process's devices.
    console: for the summary; if it is quiet, there is no progress either.
    errors: for progress.
    stopping: whether to stop after the batch in work (SIGTERM); what is done is kept.

  Returns:
    Whether the share is done.

  Raises:
    TooManyFailuresError: more inputs failed than allowed.
    ValueError: `out` holds another job, or there are visual prompts and no head for them.
    OSError: the results cannot be written.
  """
  if job.visual:
    model.visual_params()  # raises before anything is written
  described = job.describe(model)
  parts.begin(job.out, described)
  parts.clean(job.out, job.is_mine)
  finished = parts.done(job.out)
  mine = [part for part in range(parts.count(described)) if job.is_mine(part)]
  who = f"process {job.process} of {job.processes}: " if job.processes > 1 else ""
  shares = [Share(job, part, described) for part in mine if part not in finished]
  tally = Tally(sum(len(share.left) for share in shares))
  if not console.quiet and len(shares) < len(mine):
    say(errors, f"{who}{len(mine) - len(shares):,} of {len(mine):,} parts are done already")
  try:
    with progress(errors, bar=True, quiet=console.quiet) as step:
      reporter = Reporter(tally, errors, step, who, console.quiet)
      Pipeline(job, model, tally, reporter).run(shares, stopping)
  except BaseException:
    with contextlib.suppress(OSError):  # the disk may be full: then that is what went wrong
      _close(job, shares)
    raise
  _close(job, shares)
  whole = tally.done + tally.failed == tally.total
  if not console.quiet:
    for line in tally.summary():
      say(console, who + line)
  check_failures(job, tally, at_end=whole)
  return whole


def _close(job: Job, shares: Sequence[Share]) -> None:
  for share in shares:
    share.close()
  parts.write_errors(job.out)
