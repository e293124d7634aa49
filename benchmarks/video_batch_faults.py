"""Kills batch jobs of videos at random moments, resumes them, and compares them with an undisturbed
one.

  python benchmarks/video_batch_faults.py --kills 30 --out benchmarks/results

`sam3-jax batch --videos` runs over moving scenes of `sam3-jax scenes --video`, half of them as
files and half as directories of frames, with two phrases each. Each job is killed by SIGKILL up to
six times, sometimes with two processes of which one is killed, and is then run to its end and
merged.
All of its files must equal those of the undisturbed job, and nothing else may be left.

With --stub, a model of the tests replaces sam3-tiny: starting takes only as long as the imports.
"""

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from timing import machine

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import clips  # noqa: E402
import numpy as np  # noqa: E402
import video_batches  # noqa: E402
from PIL import Image  # noqa: E402

VIDEOS, FRAMES = 6, 10
PHRASES = 2  # of each video
PAUSE = 0.1  # seconds added to each frame of the stub
EACH = 6  # kills of a job
STARTING, TRACKING = (
  20.0,
  1.5,
)  # seconds: longest wait after the start, and while a video is tracked
TYPED = ("batch", "--videos", "list.jsonl", "--quiet", "--max-error-rate", "1")
_PROGRAMS = "JAX_COMPILATION_CACHE_DIR"
_COMMAND = "from sam3_jax.cli.main import entry; entry()"


class Jobs:
  """Runs one job in a directory, each time with another `--out`."""

  def __init__(self, folder: Path, rng: random.Random, stub: bool, log: Callable[[str], object]):
    self.folder, self._rng, self._stub, self._log = folder, rng, stub, log
    self.faults: list[str] = []
    self.moments: dict[str, int] = {}
    self._write_videos()
    self.finish("whole")  # compiles
    self.wanted = files(folder / "whole")
    self._log(f"undisturbed job done, faults so far: {self.faults}")

  def _write_videos(self) -> None:
    """Writes the scenes, and the list of videos with their phrases."""
    typed = ("scenes", "--video", "--size", "160x120", "--out", "scenes", "--quiet")
    self._run_to_end(*typed, "--count", str(VIDEOS), "--frames", str(FRAMES))
    data = json.loads((self.folder / "scenes" / "annotations.json").read_bytes())
    lines = []
    for number, video in enumerate(data["videos"]):
      phrases = [pair for pair in data["video_np_pairs"] if pair["video_id"] == video["id"]]
      phrases.sort(key=lambda pair: not pair["num_masklets"])
      path = self.folder / "scenes" / "JPEGImages" / video["video_name"]
      if number % 2:
        path = _encoded(path, path.with_suffix(".mp4"))
      name = str(path.relative_to(self.folder))
      lines.append({"video": name, "prompts": [one["noun_phrase"] for one in phrases[:PHRASES]]})
    (self.folder / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

  def _run_to_end(self, *typed: str) -> tuple[int, str]:
    """Runs the command; returns its exit status and errors. A stub runs in this process."""
    if not self._stub:
      process = self._run(*typed)
      _, said = process.communicate()
      return process.returncode, said
    from sam3_jax.cli.main import main

    with video_batches.patched(), contextlib.chdir(self.folder):
      return main(typed), ""

  def _run(self, *typed: str) -> Any:
    environment = os.environ | {
      "JAX_PLATFORMS": "cpu",
      "JAX_COMPILATION_CACHE_DIR": os.environ.get(_PROGRAMS, str(self.folder / "programs")),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      video_batches.PAUSE: str(PAUSE),
    }
    program = [video_batches.__file__] if self._stub else ["-c", _COMMAND]
    return subprocess.Popen(
      [sys.executable, *program, *typed], cwd=self.folder, env=environment,
      stderr=subprocess.PIPE, text=True,
    )  # fmt: skip

  def start(self, out: str, *typed: str) -> Any:
    return self._run(*TYPED, "--out", out, *typed)

  def kill(self, out: str) -> bool:
    """Kills the job at a random moment, mostly while it tracks; false if it ended before."""
    members: Sequence[tuple[str, ...]] = ((),)
    if self._rng.random() < 0.3:
      members = tuple(("--processes", "2", "--process", str(i)) for i in range(2))
    processes = [self.start(out, *member) for member in members]
    killed, parts = self._rng.choice(processes), self.folder / out / "parts"
    if self._rng.random() < 0.2:
      time.sleep(self._rng.uniform(0, STARTING))
    else:  # while one of the next videos is tracked
      before, more = _newest(parts), self._rng.randrange(3)
      done = _done(parts) + more
      while killed.poll() is None and (_newest(parts) == before or _done(parts) < done):
        time.sleep(0.005)
      time.sleep(self._rng.uniform(0, TRACKING))
    if running := killed.poll() is None:
      moment = self._moment(parts)
      self.moments[moment] = self.moments.get(moment, 0) + 1
    killed.kill()
    for process in processes:
      process.communicate()
    return running

  def finish(self, out: str) -> None:
    """Runs a job to its end and merges it."""
    for typed in (TYPED, ("batch", "--merge", "--quiet")):
      status, said = self._run_to_end(*typed, "--out", out)
      if status:
        self.faults.append(f"{out}: exit status {status} of {typed[1]}: {said}")

  def compare(self, out: str) -> None:
    found = files(self.folder / out)
    if names := sorted(n for n in found | self.wanted if found.get(n) != self.wanted.get(n)):
      self.faults.append(f"{out}: differs from the undisturbed job: {', '.join(names)}")
    self._log(f"{out} done, kills so far {self.moments}, faults so far: {self.faults}")

  def _moment(self, parts: Path) -> str:
    """What the job is doing, by its files."""
    if not parts.exists():
      return "starting"
    return "tracking" if list(parts.glob(".*.tracks.jsonl.*")) else "between two videos"


def files(out: Path) -> dict[str, bytes]:
  """The content of all files of a job, by relative path."""
  found = [path for path in sorted(out.rglob("*")) if path.is_file()]
  return {str(path.relative_to(out)): path.read_bytes() for path in found}


def _done(parts: Path) -> int:
  """The number of finished parts."""
  return len(list(parts.glob("part-??????.json")))


def _newest(parts: Path) -> int:
  """The latest change of the directory of parts."""
  return parts.stat().st_mtime_ns if parts.exists() else 0


def _encoded(frames: Path, path: Path) -> Path:
  """A video file of a directory of frames."""
  images = [np.asarray(Image.open(frame).convert("RGB")) for frame in sorted(frames.iterdir())]
  return clips.write_clip(
    path, len(images), images[0].shape[:2], image=lambda i, *_: images[i], options={"crf": "12"}
  )


def campaign(
  kills: int, seed: int, stub: bool, log: Callable[[str], object] = lambda _: None
) -> tuple[list[str], dict[str, int]]:
  """Runs all trials; returns the faults, and the number of kills by what the job was doing."""
  rng = random.Random(seed)
  with tempfile.TemporaryDirectory() as temporary:
    jobs, number = Jobs(Path(temporary), rng, stub, log), 0
    while sum(jobs.moments.values()) < kills:
      out = f"job{number}"
      for _ in range(min(EACH, kills - sum(jobs.moments.values()))):
        if not jobs.kill(out):
          break
      jobs.finish(out)
      jobs.compare(out)
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
  parser.add_argument("--stub", action="store_true", help="run a stub in place of sam3-tiny")
  parser.add_argument("--out", type=Path, help="output directory, for video-batch-faults.md")
  arguments = parser.parse_args()
  faults, moments = campaign(arguments.kills, arguments.seed, arguments.stub, _say)
  when = ", ".join(f"{count} while {moment}" for moment, count in sorted(moments.items()))
  text = (
    f"{sum(moments.values())} kills by SIGKILL ({when}) of jobs with {VIDEOS} videos of {FRAMES} "
    f"frames and {PHRASES} phrases each, with {'a stub' if arguments.stub else 'sam3-tiny'}: "
    f"{len(faults)} faults; {machine()}."
  )
  print("\n".join([*faults, text]))
  if arguments.out:
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "video-batch-faults.md").write_text(text + "\n")
  return int(bool(faults))


if __name__ == "__main__":
  sys.exit(main())
