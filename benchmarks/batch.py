"""Measures the throughput of batch inference stage by stage, and its memory over many images.

  python benchmarks/batch.py --images 400 --out benchmarks/results        # with sam3-tiny
  python benchmarks/batch.py --images 10000 --memory --out benchmarks/results

The first measurement is a loop over the jitted programs on arrays in memory. Each of the next ones
adds a stage of the pipeline: masks and records, reading of JPEGs, writing of part files. The last
one is the complete job, which also verifies, reports and syncs. All run in one process, on the same
images (JPEG, 448 x 800, two phrases each), after every program has been compiled.
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
from sam3_jax.batch.engine import Engine, Slot
from sam3_jax.batch.inputs import list_inputs
from sam3_jax.batch.job import Job
from sam3_jax.batch.part_writer import PartWriter
from sam3_jax.batch.prefetch import prefetch, read_task
from sam3_jax.batch.prompt_schema import concept_prompts
from sam3_jax.batch.records import make_record
from sam3_jax.batch.run import run
from sam3_jax.inference import sharding

PHRASES = 2  # per image
PART = 256  # approximate number of images per part: parts end with a batch
WATCHED = 250  # images per part with --memory, so that a part ends at each thousand
READY = 50  # batches in memory for the first two measurements


def device_only(engine: Engine, slots: Iterator[list[Slot]]) -> None:
  """Runs the device programs on batches in memory, without converting their results."""
  waiting: collections.deque[Any] = collections.deque()
  for batch in slots:
    waiting.append(engine.start(batch))
    if len(waiting) > pipeline.AHEAD:
      waiting.popleft().wait()
  for work in waiting:
    work.wait()


class Parts:
  """Writes part files, one after another."""

  def __init__(self, out: Path, batch_size: int):
    self._out, self._size = out, max(1, PART // batch_size) * batch_size
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
  """Also makes the masks and records, in other threads, and writes the records if `written` is
  given."""

  def finish(pending: Any, batch: list[Slot]) -> None:
    found = pending.instances()
    results = [(i, "a.jpg", slot.size, slot.prompts, found[i]) for i, slot in enumerate(batch)]
    lines = list(makers.map(lambda result: make_record(*result), results))
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
  """Resident memory of this process in bytes."""
  return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@contextlib.contextmanager
def watching(job: Job, memory: dict[int, list[int]]) -> Iterator[None]:
  """Records the resident memory, by the number of finished parts of a job."""
  stop = threading.Event()

  def watch() -> None:
    while not stop.wait(0.25):
      memory.setdefault(len(job_files.finished_parts(job.out)), []).append(resident())

  thread = threading.Thread(target=watch)
  thread.start()
  try:
    yield
  finally:
    stop.set()
    thread.join()


def means(memory: dict[int, list[int]], job: Job) -> dict[str, int]:
  """Mean resident memory during the last part before each thousand images; in a shorter job, during
  each part."""
  sizes_by_end = {
    min((done + 1) * job.part_size, len(job.inputs)): sum(sizes) // len(sizes)
    for done, sizes in sorted(memory.items())
    if done * job.part_size < len(job.inputs)
  }
  thousands = {end: size for end, size in sizes_by_end.items() if end % 1000 == 0}
  return {f"{end:,} images": size for end, size in (thousands or sizes_by_end).items()}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
  model = Sam3.from_checkpoint(find_checkpoint(arguments.checkpoint), mesh=sharding.make_mesh())
  engine = Engine(model, threshold=arguments.threshold, images=arguments.batch_images)
  batch_size, side = engine.batch_size, model.config.image_size
  batches = max(1, arguments.images // batch_size)
  seconds: dict[str, float] = {}

  def take(name: str, function: Callable[[], Any]) -> None:
    start = time.perf_counter()
    function()
    seconds[name] = time.perf_counter() - start

  with tempfile.TemporaryDirectory() as temporary:
    folder, quiet = Path(temporary) / "images", Console(quiet=True)
    inputs = list_inputs(
      str(batch_scenes.write(folder, batches * batch_size, scale=2, phrases=PHRASES))
    )

    def job(name: str, count: int) -> Job:
      return Job(
        inputs=inputs[:count], out=Path(temporary) / name,
        threshold=arguments.threshold, batch_images=arguments.batch_images,
        workers=arguments.workers,
        part_size=WATCHED if arguments.memory else PART,
      )  # fmt: skip

    def read(count: int) -> Iterator[list[Slot]]:
      tasks = map(read_task, inputs[: count * batch_size], itertools.count())
      with prefetch(
        tasks, side=side, max_pixels=10**8, workers=arguments.workers, threads=1,
        ahead=2 * batch_size,
      ) as images:  # fmt: skip
        slots = map(lambda x, item: Slot(x.pixels, x.size, item.prompts), images, inputs)
        for _ in range(count):
          yield list(itertools.islice(slots, batch_size))

    engine.encode_phrases(prompt for item in inputs for prompt in concept_prompts(item.prompts))
    ready = list(read(1 if arguments.memory else min(batches, READY)))
    engine.start(ready[0]).instances()

    def repeated() -> Iterator[list[Slot]]:
      return itertools.islice(itertools.cycle(ready), batches)

    if not arguments.memory:
      take("devices only", lambda: device_only(engine, repeated()))
      take("+ masks", lambda: with_masks(engine, repeated(), 1))
      take("+ reading", lambda: with_masks(engine, read(batches), 1))
      written = Parts(Path(temporary) / "written", batch_size)
      take("+ writing", lambda: with_masks(engine, read(batches), 1, written))
    complete, memory = job("all", len(inputs)), {}
    with watching(complete, memory) if arguments.memory else contextlib.nullcontext():
      take("complete job", lambda: run(complete, model, quiet, quiet))
  return {
    "machine": machine(),
    "what": f"{arguments.checkpoint}, {len(inputs)} images, {PHRASES} phrases each, "
    f"{batch_size} images per batch, {arguments.workers} workers, "
    f"threshold {arguments.threshold}",
    "images_per_second": {name: len(inputs) / value for name, value in seconds.items()},
    "resident_bytes": means(memory, complete),
  }


def markdown(report: dict[str, Any]) -> str:
  rates = report["images_per_second"]
  first = next(iter(rates.values()))
  lines = [
    f"{report['what']}; {report['machine']}.", "",
    "| stages | images/s | relative to the first |",
    "|---|---|---|",
  ]  # fmt: skip
  lines += [f"| {name} | {rate:.1f} | {rate / first:.0%} |" for name, rate in rates.items()]
  if sizes := list(report["resident_bytes"].values()):
    lines += ["", "| memory at | MB | relative to the first |", "|---|---|---|"]
    lines += [
      f"| {name} | {size / 1e6:.0f} | {size / sizes[0]:.1%} |"
      for name, size in report["resident_bytes"].items()
    ]
  return "\n".join(lines)


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--checkpoint", default="sam3-tiny", help="directory or name")
  parser.add_argument("--images", type=int, default=400, help="images in the job")
  parser.add_argument("--batch-images", type=int, default=4, help="images per batch and device")
  parser.add_argument("--workers", type=int, default=0, help="reader processes; 0: a thread")
  parser.add_argument("--threshold", type=float, default=0.5)
  parser.add_argument(
    "--memory", action="store_true", help="measure only the memory of the complete job"
  )
  parser.add_argument("--out", type=Path, help="output directory, for batch.md and batch.json")
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
