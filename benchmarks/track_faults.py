"""Kills tracking jobs at random moments, resumes them, and compares them with an uninterrupted one.

  python benchmarks/track_faults.py --kills 30 --out benchmarks/results

`sam3-jax track` runs with the small random model of the tests. Each job is killed three times by
SIGKILL, while it starts, tracks, draws or converts, and is then run to its end. Its lines, its
record and its MOT file must equal those of the uninterrupted job, the video must have all frames,
and nothing else may be left.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from timing import machine

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import tracking_jobs  # noqa: E402

FRAMES = 80
SAVED = 10  # frames between two saved sessions
PAUSE = 0.02  # seconds added to each frame
EACH = 3  # kills of a job
TYPED = ("track", "clip.mp4", *tracking_jobs.POINTS, "--to", "mot", "--quiet")
FILES = ["clip.mot.txt", "clip.sam3.mp4", "clip.track.json", "clip.tracks.jsonl"]


class Jobs:
  """Runs one job in a directory, each time with another `--out`."""

  def __init__(self, folder: Path, rng: random.Random, log: Callable[[str], object]):
    self.folder, self._rng, self._log = folder, rng, log
    self.faults: list[str] = []
    self.moments: dict[str, int] = {}
    tracking_jobs.write_video(folder / "clip.mp4", FRAMES)
    self.start("whole").wait()  # compiles
    started = time.monotonic()
    self.start("again").wait()
    self._seconds = time.monotonic() - started
    self.wanted = self.check("whole")
    self.compare("again")

  def start(self, out: str) -> Any:
    environment = os.environ | {
      "JAX_PLATFORMS": "cpu",
      "JAX_COMPILATION_CACHE_DIR": str(self.folder / "programs"),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      tracking_jobs.SAVED: str(SAVED),
      tracking_jobs.PAUSE: str(PAUSE),
    }
    command = [sys.executable, tracking_jobs.__file__, *TYPED, "--out", out]
    return subprocess.Popen(command, cwd=self.folder, env=environment)

  def kill(self, out: str) -> None:
    """Kills the job at a random moment, mostly after it has begun to write."""
    process, lines = self.start(out), self.folder / out / "clip.tracks.jsonl"
    if self._rng.random() < 0.2:
      time.sleep(self._rng.uniform(0, self._seconds))
    else:
      before = lines.stat().st_mtime_ns if lines.exists() else 0
      while process.poll() is None and not (lines.exists() and lines.stat().st_mtime_ns > before):
        time.sleep(0.005)
      time.sleep(self._rng.uniform(0, FRAMES * PAUSE * 2))
    if process.poll() is None:
      self._count(self._moment(out))
    process.kill()
    process.wait()

  def finish(self, out: str) -> None:
    if status := self.start(out).wait():
      self.faults.append(f"{out}: exit status {status}")
    self.compare(out)

  def compare(self, out: str) -> None:
    found = self.check(out)
    if names := [n for n in FILES if n != "clip.sam3.mp4" and found.get(n) != self.wanted.get(n)]:
      self.faults.append(f"{out}: differs from the uninterrupted job: {', '.join(names)}")
    self._log(f"{out} done, kills so far {self.moments}, faults so far: {self.faults}")

  def check(self, out: str) -> dict[str, bytes]:
    """The files of a job, which must be complete."""
    found = tracking_jobs.results(self.folder / out)
    if sorted(found) != FILES:
      self.faults.append(f"{out}: it left {', '.join(sorted(found))}")
    if (count := len(tracking_jobs.frame_times(self.folder / out / "clip.sam3.mp4"))) != FRAMES:
      self.faults.append(f"{out}: the video has {count} frames")
    return found

  def _moment(self, out: str) -> str:
    """What the job is doing, by its files."""
    directory = self.folder / out
    if not (directory / "clip.tracks.jsonl").exists():
      return "starting"
    if (directory / "clip.sam3.mp4").exists():
      return "converting"
    pieces = (directory / "clip.sam3.mp4.pieces").exists()
    return "drawing" if pieces else "tracking"

  def _count(self, moment: str) -> None:
    self.moments[moment] = self.moments.get(moment, 0) + 1


def campaign(
  kills: int, seed: int, log: Callable[[str], object] = lambda _: None
) -> tuple[list[str], dict[str, int]]:
  """Runs all trials; returns the faults, and the number of kills by what the job was doing."""
  rng = random.Random(seed)
  with tempfile.TemporaryDirectory() as temporary:
    jobs, number = Jobs(Path(temporary), rng, log), 0
    while sum(jobs.moments.values()) < kills:
      out = f"job{number}"
      for _ in range(min(EACH, kills - sum(jobs.moments.values()))):
        jobs.kill(out)
      jobs.finish(out)
      number += 1
  return jobs.faults, jobs.moments


def _say(line: str) -> None:
  print(line, flush=True)


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--kills", type=int, default=30)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--out", type=Path, help="output directory, for track-faults.md")
  arguments = parser.parse_args()
  faults, moments = campaign(arguments.kills, arguments.seed, _say)
  when = ", ".join(f"{count} while {moment}" for moment, count in sorted(moments.items()))
  text = (
    f"{sum(moments.values())} kills by SIGKILL ({when}) of jobs with {FRAMES} frames, which save "
    f"the session every {SAVED} frames: {len(faults)} faults; {machine()}."
  )
  print("\n".join([*faults, text]))
  if arguments.out:
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "track-faults.md").write_text(text + "\n")
  return int(bool(faults))


if __name__ == "__main__":
  sys.exit(main())
