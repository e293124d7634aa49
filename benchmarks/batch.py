"""Throughput of batch inference, stage by stage, and memory over many images.

  python benchmarks/batch.py --images 400 --out benchmarks/results        # with sam3-tiny
  python benchmarks/batch.py --images 10000 --memory --out benchmarks/results

The first stage is a bare loop of the jitted programs on arrays that lie ready; each further one
adds a stage of the pipeline: masks and records, reading of JPEGs, writing of part files, and then
the whole job, which also checks, reports and syncs. All run one after another in one process, on
the same images (JPEG, 448 x 800, with two phrases each), after every program has been compiled.
"""

import argparse
import collections
import contextlib
import itertools
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import batch_scenes
from rich.console import Console
from timing import machine

from sam3_jax import Sam3, find_checkpoint
from sam3_jax.batch import job_files, pipeline
from sam3_jax.batch import run as runs
from sam3_jax.batch.engine import Engine, Slot
from sam3_jax.batch.inputs import list_inputs
from sam3_jax.batch.job import Job
from sam3_jax.batch.part_writer import PartWriter
from sam3_jax.batch.prompt_schema import concept_prompts
from sam3_jax.batch.records import make_record
from sam3_jax.inference import sharding

PHRASES = 2  # of an image
PART = 256  # images of a part file, about: parts end with a batch
WATCHED = 250  # with --memory, so that a thousand ends a part
READY = 50  # batches that lie in memory for the first stages


def device_only(engine: Engine, slots: Iterator[list[Slot]]) -> None:
  waiting: collections.deque[Any] = collections.deque()
  for batch in slots:
    waiting.append(engine.start(batch))
    if len(waiting) > pipeline.AHEAD:
      waiting.popleft().wait()
  for work in waiting:
    work.wait()


class Parts:
  """Part files of `rows` records at a time, one after another."""

  def __init__(self, out: Path, rows: int):
    self._out, self._size = out, max(1, PART // rows) * rows
    self._writer: PartWriter | None = None
    self._next = 0

  def add(self, lines: list[bytes]) -> None:
    if self._writer is None:
      inputs = range(self._next, self._next + self._size)
      self._writer = PartWriter(self._out, self._next // self._size, inputs)
    first, self._next = self._next, self._next + len(lines)
    self._writer.add(lines, [], range(first, self._next))
    if self._next % self._size == 0:
      self.finish()

  def finish(self) -> None:
    if self._writer is not None:
      self._writer.finish()
      self._writer = None


def with_masks(
  engine: Engine, slots: Iterator[list[Slot]], threads: int, written: Parts | None = None
) -> None:
  """The devices, and one thread that waits for them, has others make records, and writes these
  if there are parts to write."""

  def finish(work: Any, batch: list[Slot]) -> None:
    found = work.instances()
    jobs = [(i, "a.jpg", one.size, one.prompts, found[i]) for i, one in enumerate(batch)]
    lines = list(makers.map(lambda job: make_record(*job), jobs))
    if written is not None:
      written.add(lines)

  with ThreadPoolExecutor(threads) as makers, ThreadPoolExecutor(1) as finisher:
    waiting: collections.deque[Any] = collections.deque()
    for batch in slots:
      waiting.append(finisher.submit(finish, engine.start(batch), batch))
      if len(waiting) > pipeline.AHEAD:
        waiting.popleft().result()
    for future in waiting:
      future.result()
  if written is not None:
    written.finish()


def resident() -> int:
  """Bytes of this process that are in memory now."""
  return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@contextlib.contextmanager
def watching(job: Job, memory: dict[int, list[int]]) -> Iterator[None]:
  """Notes what is in memory, by the number of parts of a job that are done."""
  over = threading.Event()

  def watch() -> None:
    while not over.wait(0.25):
      memory.setdefault(len(job_files.finished_parts(job.out)), []).append(resident())

  thread = threading.Thread(target=watch)
  thread.start()
  try:
    yield
  finally:
    over.set()
    thread.join()


def means(memory: dict[int, list[int]], job: Job) -> dict[str, int]:
  """What was in memory, on an average while the last part before each thousand images was done;
  of a shorter job, while each part was."""
  rows = {
    min((done + 1) * job.part_size, len(job.inputs)): sum(sizes) // len(sizes)
    for done, sizes in sorted(memory.items())
    if done * job.part_size < len(job.inputs)
  }
  thousands = {end: size for end, size in rows.items() if end % 1000 == 0}
  return {f"{end:,} images": size for end, size in (thousands or rows).items()}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
  model = Sam3.from_checkpoint(find_checkpoint(arguments.checkpoint), mesh=sharding.make_mesh())
  engine = Engine(model, threshold=arguments.threshold, images=arguments.images)
  rows, side = engine.batch_size, model.config.image_size
  batches = max(1, arguments.images // rows)
  seconds: dict[str, float] = {}

  def take(name: str, function: Callable[[], Any]) -> None:
    start = time.perf_counter()
    function()
    seconds[name] = time.perf_counter() - start

  with tempfile.TemporaryDirectory() as temporary:
    folder, quiet = Path(temporary) / "images", Console(quiet=True)
    inputs = list_inputs(str(batch_scenes.write(folder, batches * rows, scale=2, phrases=PHRASES)))

    def job(name: str, count: int) -> Job:
      return Job(
        inputs=inputs[:count], out=Path(temporary) / name,
        threshold=arguments.threshold, images=arguments.images, workers=arguments.workers,
        part_size=WATCHED if arguments.memory else PART,
      )  # fmt: skip

    def read(count: int) -> Iterator[list[Slot]]:
      source = Source(inputs[: count * rows], side, 10**8)
      with reading(source, workers=arguments.workers, threads=1, ahead=2 * rows) as images:
        slots = map(lambda x, one: Slot(x.pixels, x.size, one.prompts), images, inputs)
        for _ in range(count):
          yield list(itertools.islice(slots, rows))

    engine.encode_phrases(prompt for one in inputs for prompt in concept_prompts(one.prompts))
    ready = list(read(1 if arguments.memory else min(batches, READY)))
    engine.start(ready[0]).instances()

    def again() -> Iterator[list[Slot]]:
      return itertools.islice(itertools.cycle(ready), batches)

    if not arguments.memory:
      take("devices only", lambda: device_only(engine, again()))
      take("+ masks", lambda: with_masks(engine, again(), 1))
      take("+ reading", lambda: with_masks(engine, read(batches), 1))
      written = Parts(Path(temporary) / "written", rows)
      take("+ writing", lambda: with_masks(engine, read(batches), 1, written))
    whole, memory = job("all", len(inputs)), {}
    with watching(whole, memory) if arguments.memory else contextlib.nullcontext():
      take("whole job", lambda: runs.run(whole, model, quiet, quiet))
  return {
    "machine": machine(),
    "what": f"{arguments.checkpoint}, {len(inputs)} images, {PHRASES} phrases each, "
    f"{engine.batch_size} images a batch, {arguments.workers} workers, threshold {arguments.threshold}",
    "images_a_second": {name: len(inputs) / value for name, value in seconds.items()},
    "resident_bytes": means(memory, whole),
  }


def markdown(report: dict[str, Any]) -> str:
  rates = report["images_a_second"]
  first = next(iter(rates.values()))
  lines = [
    f"{report['what']}; {report['machine']}.", "", "| stages | images/s | of the first |",
    "|---|---|---|",
  ]  # fmt: skip
  lines += [f"| {name} | {rate:.1f} | {rate / first:.0%} |" for name, rate in rates.items()]
  if sizes := list(report["resident_bytes"].values()):
    lines += ["", "| in memory at | MB | of the first |", "|---|---|---|"]
    lines += [
      f"| {name} | {size / 1e6:.0f} | {size / sizes[0]:.1%} |"
      for name, size in report["resident_bytes"].items()
    ]
  return "\n".join(lines)


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--checkpoint", default="sam3-tiny")
  parser.add_argument("--images", type=int, default=400)
  parser.add_argument("--images", type=int, default=4, help="images of a batch on each device")
  parser.add_argument("--workers", type=int, default=0, help="processes that read; 0: a thread")
  parser.add_argument("--threshold", type=float, default=0.5)
  parser.add_argument("--memory", action="store_true", help="the whole job only, watched")
  parser.add_argument("--out", type=Path, help="folder for batch.md and batch.json")
  arguments = parser.parse_args()
  report = measure(arguments)
  print(markdown(report))
  if arguments.out:
    name = "batch-memory" if arguments.memory else "batch"
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"{name}.md").write_text(markdown(report) + "\n")
    (arguments.out / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n")
  return 0


if __name__ == "__main__":
  sys.exit(main())
