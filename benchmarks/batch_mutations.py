"""Changes the images of a batch job between its runs, and checks for mixed or stale results.

  python benchmarks/batch_mutations.py --count 200 --seed 0

Each trial runs a job on a directory, a list or tar files with one or three processes, until it is
done or stopped. Then it changes the images, and runs the job again. The job must either be refused
with a message that names the change, or every record must equal that of a new job on the current
images. Images that are unreadable now may be missing.
"""

import argparse
import contextlib
import json
import os
import random
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from batch_job import batches, records
from PIL import Image

from sam3_jax.batch import pipeline
from sam3_jax.batch.inputs import list_inputs
from sam3_jax.batch.job import Job
from sam3_jax.batch.merge import merge
from sam3_jax.batch.run import run

COUNT = 13  # images
KINDS = ("folder", "list", "tar")


class World:
  """The images of a job."""

  def __init__(self, folder: Path, kind: str, rng: random.Random):
    self.folder, self.kind, self.rng = folder, kind, rng
    self.images = folder / "images"
    self.images.mkdir(parents=True)
    self.prompts = "cat, dog"
    self.changed: list[str] = []  # names; an error message must contain one of them
    self.clock = 1_700_000_000
    for i in range(COUNT):
      self.paint(f"{i:02}.bmp")
    self.names = sorted(path.name for path in self.images.iterdir())
    self.pack()

  def paint(self, name: str, size: int = 8) -> None:
    """Writes an image of random pixels; all images of one size have the same number of bytes."""
    pixels = np.frombuffer(self.rng.randbytes(size * size * 3), np.uint8).reshape(size, size, 3)
    Image.fromarray(pixels).save(self.images / name)
    self.touch(name)

  def touch(self, name: str) -> None:
    self.clock += 10
    os.utime(self.images / name, (self.clock, self.clock))

  def pack(self, order: Callable[[list[str]], list[str]] = sorted) -> None:
    """Writes the tar files, or the list."""
    present = order([path.name for path in self.images.iterdir()])
    if self.kind == "list":
      lines = [json.dumps({"image": f"images/{name}"}) for name in self.names]
      (self.folder / "list.jsonl").write_text("\n".join(lines) + "\n")
    elif self.kind == "tar":
      self.clock += 10
      for number in range(2):
        path = self.folder / f"{number}.tar"
        with tarfile.open(path, "w") as tar:
          for name in present[number::2] if order is sorted else present[: len(present) // 2]:
            tar.add(self.images / name, name)
          present = present if order is sorted else present[len(present) // 2 :]
        os.utime(path, (self.clock, self.clock))

  def mutate(self) -> str:
    """Changes something; returns what."""
    kinds = [
      "rename", "replace", "replace larger", "truncate", "touch", "add", "remove", "prompts",
      "nothing", "swap", "break",
    ]  # fmt: skip
    kind = self.rng.choice([*kinds, "repack"] if self.kind == "tar" else kinds)
    names = sorted(path.name for path in self.images.iterdir())
    one, other = self.rng.sample(names, 2)
    path = self.images / one
    self.changed = [one]
    match kind:
      case "rename":
        path.rename(self.images / f"z{one}")
        self.changed.append(f"z{one}")
      case "replace":
        self.paint(one)
      case "replace larger":
        self.paint(one, 9)
      case "truncate":
        os.truncate(path, path.stat().st_size // 3)
        self.touch(one)
      case "break":
        path.write_bytes(b"x" * path.stat().st_size)
        self.touch(one)
      case "touch":
        self.touch(one)
      case "add":
        self.paint(f"a{one}")
        self.names = sorted([*self.names, f"a{one}"])
        self.changed = [f"a{one}"]
      case "remove":
        path.unlink()
      case "swap":
        path.rename(self.images / "x")
        (self.images / other).rename(path)
        (self.images / "x").rename(self.images / other)
        self.changed.append(other)
      case "prompts":
        self.prompts = "cat, bird"
        self.changed = names
      case "nothing":
        self.changed = []
      case "repack":
        order = self.rng.choice(["other order", "one replaced"])
        if order == "one replaced":
          self.paint(one)
        self.changed = names
        self.pack(lambda names: self.rng.sample(names, len(names)))
        return f"repack, {order}"
    if kind != "nothing" and (kind != "touch" or self.rng.random() < 0.5):
      self.pack()
    if self.kind == "tar" and kind not in ("nothing", "prompts"):
      self.changed = [*self.changed, *names]  # all members of a new tar file have a new time
    return kind

  def run(self, out: Path, processes: int, stop: int = 10**9, **settings: Any) -> bool:
    """Runs the job, at most `stop` batches in each process; returns whether it is done."""
    images = {"folder": self.images, "list": self.folder / "list.jsonl"}.get(
      self.kind, self.folder / "*.tar"
    )
    complete = []
    for process in range(processes):
      before = batches.Engine.started
      job = Job(
        inputs=list_inputs(str(images), self.prompts), out=out, part_size=3, batch_images=2,
        max_error_rate=1.0, process=process, processes=processes, **settings,
      )  # fmt: skip
      stopping = lambda before=before: batches.Engine.started - before >= stop  # noqa: E731
      complete.append(run(job, batches.MODEL, batches.QUIET, batches.QUIET, stopping))
    return all(complete)


def failed(out: Path) -> set[str]:
  return {json.loads(line)["image"] for line in (out / "errors.jsonl").read_text().splitlines()}


def trial(folder: Path, rng: random.Random) -> tuple[str, str, str]:
  """Runs a job, changes its images, and runs it again.

  Returns:
    What was changed, the outcome, and the fault, if any.
  """
  world = World(folder, rng.choice(KINDS), rng)
  processes, out = rng.choice([1, 3]), folder / "out"
  if rng.random() < 0.3:  # an image that fails from the start
    (world.images / world.names[3]).write_bytes(b"broken")
    world.touch(world.names[3])
    world.pack()
  stop = rng.choice([0, 1, 2, 3, 10**9])
  world.run(out, rng.choice([1, 3]), stop)
  before = records(out)
  flags = {"add": rng.random() < 0.5, "retry_failed": rng.random() < 0.5}
  what = f"{world.kind}, {processes} processes, stopped after {stop}: {world.mutate()}, {flags}"
  try:
    complete = world.run(out, processes, **flags)
  except ValueError as error:
    if not world.changed:
      return what, "refused", f"nothing changed, but the job was refused: {error}"
    if not any(name in str(error) for name in world.changed):
      return what, "refused", f"the message names no change: {error}"
    if records(out) != before:
      return what, "refused", "results changed although the job was refused"
    return what, "refused", ""
  fresh = folder / "fresh"
  with contextlib.suppress(ValueError):
    world.run(fresh, 1)
  wanted, got = records(fresh), records(out)
  gone = {name for name in got if name not in wanted and name not in failed(fresh)}
  if stale := [
    name for name, record in got.items() if name not in gone and wanted.get(name) != record
  ]:
    return what, "done", f"stale: {stale}"
  if complete:
    if set(wanted) - set(got):
      return what, "done", f"missing: {sorted(set(wanted) - set(got))}"
    if failed(out) != failed(fresh):
      return what, "done", f"failed: {sorted(failed(out))}, instead of {sorted(failed(fresh))}"
    if merge(out)["images"] != len(got):
      return what, "done", "the merged file has another number of images"
    return what, "done", ""
  if world.kind != "list":
    return what, "unfinished", "it is not done"
  return what, "unfinished", ""


def campaign(count: int, seed: int, log: Callable[[str], object] = lambda _: None) -> list[str]:
  """Runs trials; returns the faults."""
  pipeline.Engine, pipeline.BACKOFF = batches.Engine, (0.0,)
  faults, outcomes = [], dict[str, int]()
  for number in range(seed, seed + count):
    with tempfile.TemporaryDirectory() as temporary:
      what, outcome, fault = trial(Path(temporary), random.Random(number))
    outcomes[outcome] = outcomes.get(outcome, 0) + 1
    if fault:
      faults.append(f"seed {number}: {what}: {fault}")
      log(faults[-1])
  log(f"{count} changes: {outcomes}; {len(faults)} faults")
  return faults


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--count", type=int, default=200, help="number of trials")
  parser.add_argument("--seed", type=int, default=0, help="seed of the first trial")
  arguments = parser.parse_args()
  return int(bool(campaign(arguments.count, arguments.seed, print)))


if __name__ == "__main__":
  sys.exit(main())
