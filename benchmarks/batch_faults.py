"""Ends batch jobs at random moments, resumes them, and compares them with an uninterrupted job.

  python benchmarks/batch_faults.py --kills 30 --terms 30 --renames 6 --out benchmarks/results

Jobs are killed by SIGKILL at a random moment, or while files are renamed, in the job or in merging;
or stopped by SIGTERM or SIGHUP, every second time while reads hang as on an unavailable network
mount. Then the same command is run again. All files must equal those of the uninterrupted job, with
no temporary file left. After SIGTERM the exit status must be 75 (0 if the job was already done)
within 10 seconds, and no process may be left. A signal in the first second, while the interpreter
starts, ends the command like any other program.

`batch_job.py` replaces the model by a fake one, so starting takes only as long as the imports.
"""

import argparse
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import batch_job
from batch_job import batches
from timing import machine

IMAGES = 40
ARGUMENTS = ("--images", "images", "--prompts", "cat, dog")
LIMIT = 10.0  # seconds from SIGTERM to the end
PAUSE = 0.05  # seconds per batch


class Jobs:
  """Runs one job in a directory, each time with another `--out`."""

  def __init__(self, folder: Path, rng: random.Random, log: Callable[[str], object]):
    self.folder, self._rng, self._log, self.faults = folder, rng, log, list[str]()
    self.slowest = 0.0
    images = batches.write_images(folder / "images", IMAGES)
    for i in range(3):
      (images / f"{10 * i:03}.png").rename(images / f"hang-{i}.png")
    (images / "broken.png").write_bytes(b"broken")
    self._hang = folder / "hang"
    self.wanted = self.result("uninterrupted")

  def start(self, out: str, **settings: Any) -> Any:
    workers = str(self._rng.choice([0, 0, 2]))
    return batch_job.start(self.folder, *ARGUMENTS, "--workers", workers, "--out", out, **settings)

  def result(self, out: str) -> dict[str, bytes]:
    """Resumes and merges a job in this process; returns all its files."""
    self._hang.unlink(missing_ok=True)
    status = batch_job.run_inline(self.folder, *ARGUMENTS, "--out", out)
    merged = batch_job.run_inline(self.folder, "--merge", "--out", out)
    if status or merged:
      self.faults.append(f"{out}: exit status {status}, merging {merged}")
    return batch_job.results(self.folder / out)

  def compare(self, out: str) -> None:
    files = self.result(out)
    if names := sorted(n for n in files | self.wanted if files.get(n) != self.wanted.get(n)):
      self.faults.append(f"{out}: differs from the uninterrupted job: {', '.join(names)}")
    self._log(f"{out} done, faults so far: {self.faults}")

  def wait(self, process: Any, out: str) -> bool:
    """Waits for a random moment after the start of the job, or after it has begun to write."""
    if self._rng.random() < 0.3:
      time.sleep(self._rng.uniform(0, 5))
    else:
      while not (self.folder / out / "leases").exists() and process.poll() is None:
        time.sleep(0.01)
      time.sleep(self._rng.uniform(0, 1.5))
    return process.poll() is None

  def kill(self, out: str) -> None:
    process = self.start(out, pause=PAUSE)
    self.wait(process, out)
    started = batch_job.children(process.pid)
    process.kill()
    process.communicate()
    if left := batch_job.alive(started):
      self.faults.append(f"{out}: processes {left} are left")
    self.compare(out)

  def stop(self, out: str, number: int, hang: bool) -> None:
    if hang:
      self._hang.touch()
    process = self.start(out, pause=PAUSE, hang=self._hang if hang else None)
    self.wait(process, out)
    begun = (self.folder / out / "job.json").exists()
    started = batch_job.children(process.pid)
    if process.poll() is None:
      process.send_signal(number)
    status, errors, seconds = batch_job.finish(process, 30)
    self.slowest = max(self.slowest, seconds)
    allowed = {75} if hang and begun else {75, 0} if begun else {75, 0, -number}
    if status not in allowed:
      self.faults.append(f"{out}: exit status {status} after signal {number}: {errors}")
    if seconds > LIMIT:
      self.faults.append(f"{out}: it took {seconds:.1f} s to end")
    if left := batch_job.alive(started):
      self.faults.append(f"{out}: processes {left} are left")
    self.compare(out)

  def rename(self, out: str, number: int, merging: bool) -> None:
    """Kills the job, or its merging, before the rename or link of this number."""
    flag = self.folder / "renaming"
    if merging:
      self.result(out)
      process = batch_job.start(self.folder, "--merge", "--out", out, rename=number)
    else:
      process = self.start(out, rename=number)
    while not flag.exists() and process.poll() is None:
      time.sleep(0.01)
    process.kill()
    process.communicate()
    flag.unlink(missing_ok=True)
    self.compare(out)


def campaign(
  kills: int, terms: int, renames: int, seed: int, log: Callable[[str], object] = lambda _: None
) -> tuple[list[str], float]:
  """Runs all trials; returns the faults, and the longest time to stop in seconds."""
  rng = random.Random(seed)
  signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup, the jobs would ignore it too
  with tempfile.TemporaryDirectory() as temporary:
    jobs = Jobs(Path(temporary), rng, log)
    for i in range(terms):
      number = signal.SIGHUP if i % 6 == 5 else signal.SIGTERM
      jobs.stop(f"term{i}", number, hang=i % 2 == 0)
    for i in range(kills):
      jobs.kill(f"kill{i}")
    for i in range(renames):
      jobs.rename(f"rename{i}", rng.randrange(0, 2 if i % 3 == 0 else 12), merging=i % 3 == 0)
  return jobs.faults, jobs.slowest


def _say(line: str) -> None:
  print(line, flush=True)


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--kills", type=int, default=30, help="jobs killed at random moments")
  parser.add_argument("--terms", type=int, default=30, help="jobs stopped at random moments")
  parser.add_argument("--renames", type=int, default=6, help="jobs killed while renaming")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--out", type=Path, help="output directory, for batch-faults.md")
  arguments = parser.parse_args()
  faults, slowest = campaign(
    arguments.kills, arguments.terms, arguments.renames, arguments.seed, _say
  )
  text = (
    f"{arguments.kills} jobs killed at random, {arguments.renames} while renaming, and "
    f"{arguments.terms} stopped, which took at most {slowest:.1f} s: {len(faults)} faults "
    f"({IMAGES + 1} images); {machine()}."
  )
  print("\n".join([*faults, text]))
  if arguments.out:
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "batch-faults.md").write_text(text + "\n")
  return int(bool(faults))


if __name__ == "__main__":
  sys.exit(main())
