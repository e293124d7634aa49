"""Reads and decodes images ahead of their use, in threads or in processes.

An image that cannot be used yields a reason in place of pixels, so one broken file in a million
does not stop the job. Neither does an image that crashes or blocks its reader. Such an image
becomes a suspect. Suspects are read alone, in a process with limits of memory and time; an image
that ends this process too has failed.
"""

import collections
import contextlib
import itertools
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from sam3_jax.batch.image_bytes import ImageFile
from sam3_jax.batch.input_list import Input, image_file
from sam3_jax.batch.job import StorageError
from sam3_jax.batch.journal import Journal
from sam3_jax.batch.load_image import NO_PIXELS, LoadedImage, error_reason, load_image
from sam3_jax.batch.reader_process import ReaderDiedError, ReaderProcess
from sam3_jax.storage.urls import is_url, redact
from sam3_jax.utils.identity import FileIdentity

DECODE_TIMEOUT = 60.0  # seconds to decode the bytes of an image
READ_TIMEOUT = 300.0  # seconds to read the bytes of an image
SUSPECT_MEMORY = 4 * 2**30  # memory limit in bytes for a suspect, to which is added
BYTES_PER_PIXEL = 12  # for each pixel that --max-pixels allows: decoders make several copies
START_ATTEMPTS = 3  # to start the process for suspects, which another failure may have ended
MAX_HUNG_READS = 64  # with more, the storage is probably unavailable
_POLL_INTERVAL = 0.1  # seconds between two checks whether to stop


class StoppedError(Exception):
  """The process was told to stop while it waited for an image, or tracked a video."""


class ReadTask(NamedTuple):
  """An image to read.

  Attributes:
    file: where it is.
    index: of the input in the list.
    journal: of its part.
    isolated: whether it is a suspect, to be read in an isolated process.
  """

  file: ImageFile
  index: int = 0
  journal: Journal | None = None
  isolated: bool = False


def read_task(item: Input, index: int, journal: Journal | None = None) -> ReadTask:
  """The task that reads the image of an input."""
  isolated = journal is not None and index in journal.suspects
  return ReadTask(image_file(item), index, journal, isolated)


@contextlib.contextmanager
def prefetch(
  tasks: Iterable[ReadTask],
  *,
  side: int | None,
  max_pixels: int,
  workers: int,
  threads: int,
  ahead: int,
  stopping: Callable[[], bool] = lambda: False,
) -> Iterator[Iterator[LoadedImage]]:
  """An iterator over the images of tasks, in order.

  Args:
    tasks: are taken as images are consumed.
    side: of the model's square; None to keep the sizes of the images.
    max_pixels: larger images are refused.
    workers: number of processes; 0 for threads of this process.
    threads: number of threads if there are no workers.
    ahead: number of images to keep ready.
    stopping: whether to raise StoppedError instead of waiting.

  Raises:
    StorageError: so many reads hang that the storage is probably unavailable.
    OSError: processes do not start.
  """
  reader = _Reader(side, max_pixels, workers, threads, stopping)
  try:
    yield reader.images(iter(tasks), max(ahead, workers or threads))
  finally:
    reader.close()


class _PendingRead:
  """A task that a thread reads.

  Attributes:
    image: the result; None until there is one.
    began, read: when the task began, and when its bytes were read, by `time.monotonic`; None
      before.
    process: that reads it.
    abandoned: whether the result is no longer used.
  """

  def __init__(self, task: ReadTask):
    self.task = task
    self.image: LoadedImage | None = None
    self.began: float | None = None
    self.read: float | None = None
    self.process: ReaderProcess | None = None
    self.abandoned = False

  def note_read(self, *_: object) -> None:
    self.read = time.monotonic()


class _Reader:
  """Threads that read images, directly or each through a process.

  The threads are daemons: a thread that hangs in a system call cannot be ended, and must not keep
  this process from ending.
  """

  def __init__(
    self,
    side: int | None,
    max_pixels: int,
    workers: int,
    threads: int,
    stopping: Callable[[], bool],
  ):
    self._side, self._max_pixels, self._stopping = side, max_pixels, stopping
    self._queue: queue.SimpleQueue[_PendingRead | None] = queue.SimpleQueue()
    self._arrived, self._closed, self._hung = threading.Condition(), False, 0
    self._processes: set[ReaderProcess] = set()
    self._quarantine: ReaderProcess | None = None
    self._workers, self._threads = workers, workers or threads
    self._started = False

  def images(self, tasks: Iterator[ReadTask], ahead: int) -> Iterator[LoadedImage]:
    pending: collections.deque[_PendingRead] = collections.deque()
    while True:
      for task in itertools.islice(tasks, ahead + 1 - len(pending)):
        pending.append(_PendingRead(task))
        if not task.isolated:
          self._queue.put(pending[-1])
      if not pending:
        return
      if not self._started:
        self._started = True
        for _ in range(self._threads):
          self._start_thread()
      yield self._wait(pending.popleft())

  def close(self) -> None:
    self._closed = True
    for _ in range(self._threads):
      self._queue.put(None)
    for process in list(self._processes):
      process.close()
    if self._quarantine is not None:
      self._quarantine.close()

  def _start_thread(self) -> None:
    threading.Thread(target=self._work, name="reader", daemon=True).start()

  def _work(self) -> None:
    """Runs in a thread: reads the images in the queue."""
    process: ReaderProcess | None = None
    while (pending := self._queue.get()) is not None and not self._closed:
      task, pending.began = pending.task, time.monotonic()
      if task.journal is not None:
        task.journal.begin(task.index)
      try:
        if self._workers:
          process = process or self._start_process()
          image = self._read_in(process, pending)
          process = None if image.suspect else process
        else:
          image = load_image(task.file, self._side, self._max_pixels, pending.note_read)
      except Exception as error:  # an unforeseen error must not end the thread
        image = _failed(error_reason(error), unreadable=True)
      if pending.abandoned:
        return  # another thread has replaced this one
      if task.journal is not None and not image.suspect:
        task.journal.end(task.index)
      with self._arrived:
        pending.image = image
        self._arrived.notify_all()

  def _start_process(self) -> ReaderProcess:
    process = ReaderProcess(self._side, self._max_pixels)
    self._processes.add(process)
    if self._closed:  # `close` may have missed this process
      process.kill()
    return process

  def _read_in(self, process: ReaderProcess, pending: _PendingRead) -> LoadedImage:
    pending.process = process
    try:
      return process.read(pending.task.file, pending.note_read)
    except (ReaderDiedError, OSError) as error:
      process.close()
      self._processes.discard(process)
      return _failed(str(error), suspect=True)

  def _wait(self, pending: _PendingRead) -> LoadedImage:
    while not pending.task.isolated and pending.image is None and not pending.abandoned:
      if self._stopping():
        raise StoppedError
      with self._arrived:
        self._arrived.wait_for(lambda: pending.image is not None, _POLL_INTERVAL)
      if pending.image is None and (image := self._check_timeout(pending)) is not None:
        return image
    if pending.image is not None and not pending.image.suspect:
      return pending.image
    journal = pending.task.journal
    if journal is not None:
      journal.suspects.add(pending.task.index)
    image = self._read_isolated(pending.task)
    if journal is not None:
      journal.end(pending.task.index)
    return image

  def _check_timeout(self, pending: _PendingRead) -> LoadedImage | None:
    """Abandons a read that takes too long.

    If the bytes do not arrive, the image is unreadable. If decoding does not end, the image is a
    suspect, and None is returned.
    """
    now = time.monotonic()
    if pending.began is None:
      return None
    limit = READ_TIMEOUT if pending.read is None else DECODE_TIMEOUT
    if now - (pending.read or pending.began) < limit:
      return None
    pending.abandoned = True
    self._hung += 1
    if pending.process is not None:
      pending.process.kill()
    if self._hung > MAX_HUNG_READS:
      raise StorageError(
        f"{self._hung} images could not be read in {READ_TIMEOUT:.0f} s each; check the storage "
        "and rerun the same command to resume."
      )
    self._start_thread()
    if pending.read is not None:
      return None
    if pending.task.journal is not None:
      pending.task.journal.end(pending.task.index)
    return _failed(
      f"{redact(pending.task.file.path)} cannot be read (no answer in {READ_TIMEOUT:.0f} s)",
      unreadable=True,
    )

  def _limited_process(self) -> ReaderProcess:
    """The process for suspects."""
    attempts = START_ATTEMPTS
    while self._quarantine is None:
      memory = SUSPECT_MEMORY + BYTES_PER_PIXEL * self._max_pixels
      process, attempts = ReaderProcess(self._side, self._max_pixels, memory), attempts - 1
      try:
        process.wait(self._check_stop)
        self._quarantine = process
      except (OSError, StoppedError) as error:
        process.close()
        if not attempts or isinstance(error, StoppedError):
          raise
    return self._quarantine

  def _check_stop(self) -> None:
    if self._stopping():
      raise StoppedError

  def _read_isolated(self, task: ReadTask) -> LoadedImage:
    """Reads a suspect in a process with limits of memory and time."""
    start = time.monotonic()
    process, began, read, timed_out = self._limited_process(), 0.0, 0.0, False

    def check() -> None:
      nonlocal began, timed_out
      self._check_stop()
      began = began or time.monotonic()
      since, limit = (read, DECODE_TIMEOUT) if read else (began, READ_TIMEOUT)
      if time.monotonic() - since > limit:
        timed_out = True
        process.kill()

    def on_read() -> None:
      nonlocal read
      read = time.monotonic()

    if task.journal is not None:
      task.journal.begin(task.index)
    try:
      return process.read(task.file, on_read, check)._replace(suspect=False)
    except ReaderDiedError as error:
      self._quarantine = None
      process.close()
      seconds, why = time.monotonic() - start, str(error)
      if timed_out:
        why = f"time limit of {DECODE_TIMEOUT:.0f} s"
        if error.identity is None:
          where = redact(task.file.path)
          return _failed(f"{where} cannot be read (no answer in time)", unreadable=True)
      elif error.was_terminated:
        time.sleep(_POLL_INTERVAL)  # the same signal reaches this process
        if self._stopping():
          raise StoppedError from None
        return _failed("the process that read it was told to stop", unreadable=True)
      reason = f"{task.file.name}: it crashes the process that reads it ({why})"
      return _failed(reason, error.identity or _identity(task.file), seconds=seconds)


def _failed(
  reason: str,
  identity: FileIdentity | None = None,
  *,
  unreadable: bool = False,
  suspect: bool = False,
  seconds: float = 0.0,
) -> LoadedImage:
  return LoadedImage(NO_PIXELS, (0, 0), reason, seconds, identity, unreadable, suspect)


def _identity(file: ImageFile) -> FileIdentity | None:
  if is_url(file.path):
    return file.expected
  try:
    status = os.stat(file.path)
  except OSError:
    return None
  size = status.st_size if file.span is None else file.span[1]
  return FileIdentity(size, status.st_mtime_ns)
