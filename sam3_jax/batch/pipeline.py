"""Three stages that overlap: images are read, the devices work, results are written.

Threads or processes read ahead; the main thread sets the devices to work, batch after batch; a
thread waits for them, has others turn masks into run lengths, and writes. At most `AHEAD` batches
are between the stages, so memory does not grow with the job.
"""

import collections
import itertools
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from sam3_jax.batch.engine import Engine, Slot, Work
from sam3_jax.batch.inputs import Input
from sam3_jax.batch.job import Job, check_failures
from sam3_jax.batch.loading import NO_PIXELS, Image
from sam3_jax.batch.part_files import Failure
from sam3_jax.batch.prompt_schema import check_places, concepts
from sam3_jax.batch.reading import Source, StoppedError, Task, reading, task_of
from sam3_jax.batch.records import record
from sam3_jax.batch.run_stats import Reporter, Tally
from sam3_jax.batch.share import Share
from sam3_jax.inference.predictor import Sam3

AHEAD = 2  # batches that the devices have before them, and batches of images read ahead
BACKOFF = (1.0, 2.0, 4.0)  # seconds, about, before what could not be read is tried again


class _Batch(NamedTuple):
  """Inputs that the devices work on at a time.

  Attributes:
    share: the part that they are of.
    first: index of the input in the first slot; a batch always begins at the same inputs, so the
      results are the same to the byte.
    inputs: indices of those to do; the slots between them are empty.
    last: whether it is the part's last in this pass.
  """

  share: Share
  first: int
  inputs: list[int]
  last: bool


class _Started(NamedTuple):
  batch: _Batch
  images: list[Image]
  faults: list[str]
  work: Work


class Pipeline:
  """An engine, and what is before and behind it."""

  def __init__(self, job: Job, model: Sam3, tally: Tally, reporter: Reporter):
    self._job, self._tally, self._reporter = job, tally, reporter
    self._engine = Engine(
      model, threshold=job.threshold, images=job.images, prompts=job.prompts,
      most=job.max_detections, visual=job.visual,
    )  # fmt: skip
    self._side = model.config.image_size
    self._threads = max(1, (os.cpu_count() or 1) // 2)
    self._ready = 0.0  # when the devices were done with the batch before
    self._broken = False  # a batch could not be written: those behind it must not be
    self._last_pass = False

  def run(self, shares: Sequence[Share], stopping: Callable[[], bool]) -> None:
    """Does parts, in passes: inputs that cannot be read, and parts that another process holds, are
    tried again in the next one."""
    wanted = (self._job.inputs[i] for share in shares for i in share.inputs)
    self._engine.learn(prompt for one in wanted for prompt in concepts(one.prompts))
    with ThreadPoolExecutor(self._threads) as self._pool, ThreadPoolExecutor(1) as finisher:
      for retry in range(len(BACKOFF) + 1):
        if retry and not _sleep(BACKOFF[retry - 1] * random.uniform(0.75, 1.25), stopping):
          return
        self._last_pass = retry == len(BACKOFF)
        self._pass(shares, finisher, stopping)
        shares = [share for share in shares if not share.finished]
        if stopping() or not shares:
          return

  def _pass(
    self, shares: Sequence[Share], finisher: ThreadPoolExecutor, stopping: Callable[[], bool]
  ) -> None:
    rows = self._engine.rows
    batches: collections.deque[_Batch] = collections.deque()
    waiting: collections.deque[Future[None]] = collections.deque()
    source = Source(self._tasks(shares, batches, stopping), self._side, self._job.max_pixels)
    with reading(
      source, workers=self._job.workers, threads=self._threads, ahead=AHEAD * rows,
      stopping=stopping,
    ) as images:  # fmt: skip
      while not stopping():
        start = time.perf_counter()
        try:
          taken = list(itertools.islice(images, 1))
          if not taken:
            break
          taken += itertools.islice(images, len(batches[0].inputs) - 1)
        except StoppedError:
          break
        self._tally.waiting += time.perf_counter() - start
        waiting.append(finisher.submit(self._finish, self._start(batches.popleft(), taken)))
        if len(waiting) > AHEAD:
          waiting.popleft().result()
        self._reporter.show()
      for future in waiting:
        future.result()
        self._reporter.show()

  def _tasks(
    self,
    shares: Sequence[Share],
    batches: collections.deque[_Batch],
    stopping: Callable[[], bool],
  ) -> Iterator[Task]:
    """What to read; claims each part when its turn to be read comes."""
    for share in shares:
      if stopping():
        return
      new = share.resumed is None
      claimed = share.claim()
      if new and share.resumed is not None:
        done, failed = share.resumed
        self._tally.done_before += done
        self._tally.failed_before += failed
        self._tally.total -= done + failed
      if not claimed:
        continue
      journal = share.journal
      for batch in _batches(share, self._engine.rows):
        batches.append(batch)
        for index in batch.inputs:
          yield task_of(self._job.inputs[index], index, journal)

  def _start(self, batch: _Batch, images: list[Image]) -> _Started:
    inputs = [self._job.inputs[i] for i in batch.inputs]
    faults = [image.reason or _fault(one, image) for one, image in zip(inputs, images, strict=True)]
    slots: list[Slot | None] = [None] * (batch.inputs[-1] - batch.first + 1)
    for i, one, image, fault in zip(batch.inputs, inputs, images, faults, strict=True):
      if not fault:
        slots[i - batch.first] = Slot(image.pixels, image.size, one.prompts)
    kept = [image._replace(pixels=NO_PIXELS) for image in images]
    return _Started(batch, kept, faults, self._engine.start(slots))

  def _finish(self, started: _Started) -> None:
    """Waits for the devices, and writes."""
    if self._broken:
      return
    self._broken = True
    self._write(started)
    self._broken = False

  def _write(self, started: _Started) -> None:
    batch, images, work = started.batch, started.images, started.work
    found = work.instances()
    self._tally.device += work.ready - max(work.started, self._ready)
    self._ready = work.ready
    good = [place for place, fault in enumerate(started.faults) if not fault]

    def make(place: int) -> tuple[bytes, float]:
      start, index = time.perf_counter(), batch.inputs[place]
      one, image = self._job.inputs[index], images[place]
      results = found[index - batch.first]
      line = record(index, one.name, image.size, one.prompts, results, image.identity)
      return line, time.perf_counter() - start

    made = list(self._pool.map(make, good))
    identities = {batch.inputs[place]: images[place].identity for place in good}
    failures = self._failures(started)
    resolved = [*identities, *(failure.input for failure in failures)]
    start = time.perf_counter()
    batch.share.add([line for line, _ in made], failures, resolved, identities)
    if batch.last and not batch.share.finished:
      batch.share.close()
    tally = self._tally
    tally.writing += time.perf_counter() - start
    tally.processing += sum(seconds for _, seconds in made)
    tally.reading += sum(image.seconds for image in images)
    tally.done += len(good)
    tally.failed += len(failures)
    results = [found[index - batch.first] for index in identities]
    tally.prompts += sum(len(one) for one in results)
    tally.instances += sum(len(one) for prompts in results for one in prompts)
    check_failures(self._job, tally)

  def _failures(self, started: _Started) -> list[Failure]:
    """Of a batch, the inputs that failed; those that could not be read stay pending."""
    failures = []
    rows = zip(started.batch.inputs, started.images, started.faults, strict=True)
    for index, image, fault in rows:
      name = self._job.inputs[index].name
      self._tally.unreadable.pop((index, name), None)
      if not fault:
        continue
      if image.unreadable and not (self._job.skip_unreadable and self._last_pass):
        self._tally.unreadable[index, name] = fault
      else:
        failures.append(Failure(index, name, fault, image.identity))
    return failures


def _batches(share: Share, rows: int) -> Iterator[_Batch]:
  """Batches never reach over a part's end, and begin at its start: they are always the same."""
  left = set(share.left)
  starts = range(share.inputs.start, share.inputs.stop, rows)
  cut = [(first, [i for i in range(first, first + rows) if i in left]) for first in starts]
  cut = [(first, inputs) for first, inputs in cut if inputs]
  for number, (first, inputs) in enumerate(cut, start=1):
    yield _Batch(share, first, inputs, number == len(cut))


def _sleep(seconds: float, stopping: Callable[[], bool]) -> bool:
  """False if the process is to stop."""
  end = time.monotonic() + seconds
  while (left := end - time.monotonic()) > 0:
    if stopping():
      return False
    time.sleep(min(left, 0.1))
  return not stopping()


def _fault(one: Input, image: Image) -> str:
  """What is wrong with the prompts of an image of this size."""
  try:
    check_places(one.prompts, *image.size)
  except ValueError as error:
    return str(error)
  return ""
