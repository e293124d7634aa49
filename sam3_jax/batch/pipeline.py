"""Three overlapping stages: reading of images, work of the devices, writing of results.

Threads or processes read ahead. The main thread dispatches batches to the devices. Another thread
waits for the devices, has further threads encode masks, and writes. At most `AHEAD` batches are
between two stages, so memory does not grow with the job.
"""

import collections
import itertools
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from sam3_jax.batch.engine import Engine, PendingBatch, Slot
from sam3_jax.batch.inputs import Input
from sam3_jax.batch.job import Job, check_failures
from sam3_jax.batch.leased_part import LeasedPart
from sam3_jax.batch.load_image import NO_PIXELS, LoadedImage
from sam3_jax.batch.part_files import Failure
from sam3_jax.batch.prefetch import ReadTask, StoppedError, prefetch, read_task
from sam3_jax.batch.prompt_schema import check_coordinates, concept_prompts
from sam3_jax.batch.records import make_record
from sam3_jax.batch.run_stats import Reporter, RunStats
from sam3_jax.batch.tiled_engine import PendingImage, TiledEngine
from sam3_jax.inference.predictor import Sam3

AHEAD = 2  # batches queued for the devices, and batches of images read ahead
BACKOFF = (1.0, 2.0, 4.0)  # seconds, approximately, before another attempt to read inputs


class _Batch(NamedTuple):
  """Inputs that the devices work on together.

  Attributes:
    part: to which they belong.
    first: index of the input in the first slot; batches always begin at the same inputs, so that
      the bytes of the results are always the same.
    inputs: indices of the inputs to process; the slots between them are empty.
    last: whether it is the last batch of the part in this pass.
  """

  part: LeasedPart
  first: int
  inputs: list[int]
  last: bool


class _Dispatched(NamedTuple):
  batch: _Batch
  images: list[LoadedImage]
  faults: list[str]
  pending: PendingBatch | PendingImage


class Pipeline:
  """Runs an engine together with the reading and writing stages."""

  def __init__(self, job: Job, model: Sam3, stats: RunStats, reporter: Reporter):
    self._job, self._stats, self._reporter = job, stats, reporter
    self._engine = _engine(job, model)
    self._side = None if job.tiling else model.config.image_size
    self._threads = max(1, (os.cpu_count() or 1) // 2)
    self._ready = 0.0  # when the devices finished the previous batch
    self._failed = False  # a batch could not be written; later batches must not be written either
    self._last_pass = False

  def run(self, parts: Sequence[LeasedPart], stopping: Callable[[], bool]) -> None:
    """Processes parts, in several passes: each pass retries unreadable inputs, and parts that
    another process holds."""
    wanted = (self._job.inputs[i] for part in parts for i in part.inputs)
    self._engine.encode_phrases(
      prompt for item in wanted for prompt in concept_prompts(item.prompts)
    )
    with ThreadPoolExecutor(self._threads) as self._pool, ThreadPoolExecutor(1) as finisher:
      for left, self._last_pass in passes(parts, stopping):
        self._pass(left, finisher, stopping)

  def _pass(
    self, parts: Sequence[LeasedPart], finisher: ThreadPoolExecutor, stopping: Callable[[], bool]
  ) -> None:
    batches: collections.deque[_Batch] = collections.deque()
    writing: collections.deque[Future[None]] = collections.deque()
    with prefetch(
      self._tasks(parts, batches, stopping), side=self._side, max_pixels=self._job.max_pixels,
      workers=self._job.workers, threads=self._threads, ahead=AHEAD * self._engine.batch_size,
      stopping=stopping,
    ) as images:  # fmt: skip
      while not stopping():
        start = time.perf_counter()
        try:
          loaded = list(itertools.islice(images, 1))
          if not loaded:
            break
          loaded += itertools.islice(images, len(batches[0].inputs) - 1)
        except StoppedError:
          break
        self._stats.wait_seconds += time.perf_counter() - start
        writing.append(finisher.submit(self._finish, self._dispatch(batches.popleft(), loaded)))
        if len(writing) > AHEAD:
          writing.popleft().result()
        self._reporter.show()
      for future in writing:
        future.result()
        self._reporter.show()

  def _tasks(
    self,
    parts: Sequence[LeasedPart],
    batches: collections.deque[_Batch],
    stopping: Callable[[], bool],
  ) -> Iterator[ReadTask]:
    """The images to read; acquires each part when its first image is to be read."""
    for part in parts:
      if stopping():
        return
      if not acquire(part, self._stats):
        continue
      journal = part.journal
      for batch in _batches(part, self._engine.batch_size):
        batches.append(batch)
        for index in batch.inputs:
          yield read_task(self._job.inputs[index], index, journal)

  def _dispatch(self, batch: _Batch, images: list[LoadedImage]) -> _Dispatched:
    items = [self._job.inputs[i] for i in batch.inputs]
    faults = [
      image.reason or _prompt_fault(item, image) for item, image in zip(items, images, strict=True)
    ]
    slots: list[Slot | None] = [None] * (batch.inputs[-1] - batch.first + 1)
    for i, item, image, fault in zip(batch.inputs, items, images, faults, strict=True):
      if not fault:
        slots[i - batch.first] = Slot(image.pixels, image.size, item.prompts)
    without_pixels = [image._replace(pixels=NO_PIXELS) for image in images]
    return _Dispatched(batch, without_pixels, faults, self._engine.start(slots))

  def _finish(self, dispatched: _Dispatched) -> None:
    """Waits for the devices, and writes."""
    if self._failed:
      return
    self._failed = True
    self._write(dispatched)
    self._failed = False

  def _write(self, dispatched: _Dispatched) -> None:
    batch, images, pending = dispatched.batch, dispatched.images, dispatched.pending
    results = pending.instances()
    self._stats.device_seconds += pending.ready - max(pending.started, self._ready)
    self._ready = pending.ready
    good = [i for i, fault in enumerate(dispatched.faults) if not fault]

    def encode(i: int) -> tuple[bytes, float]:
      start, index = time.perf_counter(), batch.inputs[i]
      item, image = self._job.inputs[index], images[i]
      found = results[index - batch.first]
      line = make_record(index, item.name, image.size, item.prompts, found, image.identity)
      return line, time.perf_counter() - start

    encoded = list(self._pool.map(encode, good))
    identities = {batch.inputs[i]: images[i].identity for i in good}
    failures = self._failures(dispatched)
    resolved = [*identities, *(failure.input for failure in failures)]
    start = time.perf_counter()
    batch.part.add([line for line, _ in encoded], failures, resolved, identities)
    if batch.last and not batch.part.finished:
      batch.part.close()
    stats = self._stats
    stats.write_seconds += time.perf_counter() - start
    stats.mask_seconds += sum(seconds for _, seconds in encoded)
    stats.read_seconds += sum(image.seconds for image in images)
    stats.requests += sum(image.requests[0] for image in images)
    stats.repeated += sum(image.requests[1] for image in images)
    stats.done += len(good)
    stats.failed += len(failures)
    written = [results[index - batch.first] for index in identities]
    stats.prompts += sum(len(prompts) for prompts in written)
    stats.instances += sum(len(instances) for prompts in written for instances in prompts)
    check_failures(self._job, stats)

  def _failures(self, dispatched: _Dispatched) -> list[Failure]:
    """The inputs of a batch that failed; unreadable inputs stay pending until the last pass."""
    failures = []
    outcomes = zip(dispatched.batch.inputs, dispatched.images, dispatched.faults, strict=True)
    for index, image, fault in outcomes:
      name = self._job.inputs[index].name
      self._stats.unreadable.pop((index, name), None)
      if not fault:
        continue
      if image.unreadable and not (self._job.skip_unreadable and self._last_pass):
        self._stats.unreadable[index, name] = fault
      else:
        failures.append(Failure(index, name, fault, image.identity))
    return failures


def passes(
  parts: Sequence[LeasedPart], stopping: Callable[[], bool]
) -> Iterator[tuple[Sequence[LeasedPart], bool]]:
  """The unfinished parts again and again, after increasing waits, and whether it is the last time.

  Each pass retries unreadable inputs, and parts that another process holds.
  """
  for retry in range(len(BACKOFF) + 1):
    if retry and not _sleep(BACKOFF[retry - 1] * random.uniform(0.75, 1.25), stopping):
      return
    yield parts, retry == len(BACKOFF)
    parts = [part for part in parts if not part.finished]
    if stopping() or not parts:
      return


def acquire(part: LeasedPart, stats: RunStats) -> bool:
  """Acquires the lease of a part; false if it is done or another process holds it. Counts the
  inputs that were done before."""
  first_time = part.resumed is None
  acquired = part.acquire()
  if first_time and part.resumed is not None:
    done, failed = part.resumed
    stats.done_before += done
    stats.failed_before += failed
    stats.total -= done + failed
  return acquired


def _engine(job: Job, model: Sam3) -> Engine | TiledEngine:
  if job.tiling:
    return TiledEngine(
      model, job.tiling, threshold=job.threshold, max_detections=job.max_detections
    )
  return Engine(
    model, threshold=job.threshold, images=job.batch_images, prompts=job.batch_prompts,
    max_detections=job.max_detections, visual=job.has_visual_prompts,
  )  # fmt: skip


def _batches(part: LeasedPart, batch_size: int) -> Iterator[_Batch]:
  """The batches of a part. They begin at the start of the part and end with it, so they are always
  the same."""
  left = set(part.left)
  starts = range(part.inputs.start, part.inputs.stop, batch_size)
  groups = [(first, [i for i in range(first, first + batch_size) if i in left]) for first in starts]
  groups = [(first, inputs) for first, inputs in groups if inputs]
  for number, (first, inputs) in enumerate(groups, start=1):
    yield _Batch(part, first, inputs, number == len(groups))


def _sleep(seconds: float, stopping: Callable[[], bool]) -> bool:
  """False if the process is to stop."""
  end = time.monotonic() + seconds
  while (left := end - time.monotonic()) > 0:
    if stopping():
      return False
    time.sleep(min(left, 0.1))
  return not stopping()


def _prompt_fault(item: Input, image: LoadedImage) -> str:
  """Why the prompts do not fit an image of this size; empty if they do."""
  try:
    check_coordinates(item.prompts, *image.size)
  except ValueError as error:
    return str(error)
  return ""
