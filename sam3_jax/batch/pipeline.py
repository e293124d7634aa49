"""Three stages that overlap: pictures are read, the devices work, results are written.

Grain reads ahead; the main thread sets the devices to work, batch after batch; a thread waits for
them, has others turn masks into run lengths, and writes. At most `AHEAD` batches are between the
stages, so memory does not grow with the job.
"""

import collections
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from sam3_jax.batch import parts
from sam3_jax.batch.asked import check_places, concepts
from sam3_jax.batch.engine import Engine, Slot, Work
from sam3_jax.batch.inputs import Input
from sam3_jax.batch.job import Job, check_failures
from sam3_jax.batch.parts import Failure, PartWriter
from sam3_jax.batch.reading import Picture, Source, reading
from sam3_jax.batch.records import record
from sam3_jax.batch.tally import Reporter, Tally
from sam3_jax.heap import trim
from sam3_jax.inference import Sam3

AHEAD = 2  # batches that the devices have before them, and batches of pictures read ahead


class Share:
  """A part that is to be done; its writer is there while it is in work.

  Attributes:
    left: places in the list of the inputs to do.
  """

  def __init__(self, job: Job, part: int, described: dict[str, Any]):
    self._job, self._part = job, part
    self._inputs = parts.bounds(part, described)
    self.left = range(parts.resumed(job.out, part, self._inputs), self._inputs.stop)
    self._writer: PartWriter | None = None

  def add(self, records: Sequence[bytes], failures: Sequence[Failure], inputs: range) -> None:
    if self._writer is None:
      self._writer = PartWriter(self._job.out, self._part, self._inputs)
    try:
      self._writer.add(records, failures, inputs)
      if inputs.stop == self._inputs.stop:
        self._writer.finish()
        trim()
    except BaseException:  # perhaps there is half a record
      self._writer.discard()
      self._writer = None
      raise
    if inputs.stop == self._inputs.stop:
      self._writer = None

  def close(self) -> None:
    """Keeps what there is of it."""
    if self._writer is not None:
      writer, self._writer = self._writer, None
      try:
        writer.pause()
      finally:
        writer.discard()


_NONE = np.zeros((0, 0, 3), np.uint8)


class _Batch(NamedTuple):
  share: Share
  inputs: range
  pictures: list[Picture]
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

  def run(self, shares: Sequence[Share], stopping: Callable[[], bool]) -> None:
    rows = self._engine.rows
    wanted = [self._job.inputs[i] for share in shares for i in share.left]
    self._engine.learn(prompt for one in wanted for prompt in concepts(one.prompts))
    source = Source(wanted, self._side, self._job.max_pixels)
    with (
      reading(
        source, workers=self._job.workers, threads=self._threads, ahead=AHEAD * rows
      ) as pictures,
      ThreadPoolExecutor(self._threads) as self._pool,
      ThreadPoolExecutor(1) as finisher,
    ):
      waiting: collections.deque[Future[None]] = collections.deque()
      for share, inputs in _batches(shares, rows):
        if stopping():
          break
        start = time.perf_counter()
        try:
          taken = list(itertools.islice(pictures, len(inputs)))
        except Exception:
          if stopping():  # a signal to all processes of a group ended the workers, too
            break
          raise
        self._tally.waiting += time.perf_counter() - start
        waiting.append(finisher.submit(self._finish, self._start(share, inputs, taken)))
        if len(waiting) > AHEAD:
          waiting.popleft().result()
        self._reporter.show()
      for future in waiting:
        future.result()
        self._reporter.show()

  def _start(self, share: Share, inputs: range, pictures: list[Picture]) -> _Batch:
    faults = [
      picture.reason or _fault(self._job.inputs[i], picture)
      for i, picture in zip(inputs, pictures, strict=True)
    ]
    slots = [
      None if fault else Slot(picture.pixels, picture.size, self._job.inputs[i].prompts)
      for i, picture, fault in zip(inputs, pictures, faults, strict=True)
    ]
    kept = [picture._replace(pixels=_NONE) for picture in pictures]
    return _Batch(share, inputs, kept, faults, self._engine.start(slots))

  def _finish(self, batch: _Batch) -> None:
    """Waits for the devices, and writes."""
    if self._broken:
      return
    self._broken = True
    self._write(batch)
    self._broken = False

  def _write(self, batch: _Batch) -> None:
    found = batch.work.instances()
    self._tally.device += batch.work.ready - max(batch.work.started, self._ready)
    self._ready = batch.work.ready
    good = [place for place, fault in enumerate(batch.faults) if not fault]

    def make(place: int) -> tuple[bytes, float]:
      start, number = time.perf_counter(), batch.inputs[place]
      one, size = self._job.inputs[number], batch.pictures[place].size
      line = record(number, one.name, size, one.prompts, found[place])
      return line, time.perf_counter() - start

    made = list(self._pool.map(make, good))
    failures = [
      Failure(number, self._job.inputs[number].name, fault)
      for number, fault in zip(batch.inputs, batch.faults, strict=True)
      if fault
    ]
    start = time.perf_counter()
    batch.share.add([line for line, _ in made], failures, batch.inputs)
    tally = self._tally
    tally.writing += time.perf_counter() - start
    tally.processing += sum(seconds for _, seconds in made)
    tally.reading += sum(picture.seconds for picture in batch.pictures)
    tally.done += len(good)
    tally.failed += len(failures)
    tally.prompts += sum(len(found[place]) for place in good)
    tally.instances += sum(len(one) for place in good for one in found[place])
    check_failures(self._job, tally)


def _batches(shares: Sequence[Share], rows: int) -> Iterator[tuple[Share, range]]:
  """Batches never reach over a part's end, and begin at its start: they are always the same."""
  for share in shares:
    for first in range(share.left.start, share.left.stop, rows):
      yield share, range(first, min(first + rows, share.left.stop))


def _fault(one: Input, picture: Picture) -> str:
  """What is wrong with the prompts of a picture of this size."""
  try:
    check_places(one.prompts, *picture.size)
  except ValueError as error:
    return str(error)
  return ""
