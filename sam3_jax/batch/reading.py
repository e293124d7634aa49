"""Reads and decodes images ahead of their turn, in threads, or in processes.

An image that cannot be used is a row with a reason in place of pixels: one broken file in a million
must not stop the others. Nor must one that ends or blocks whatever reads it. Such an image is a
suspect, and suspects are read alone, in a process with limits of memory and time: an image that
ends this process, too, is at fault.
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

from sam3_jax.batch.children import Child, DiedError
from sam3_jax.batch.fetch import File
from sam3_jax.batch.inputs import Input
from sam3_jax.batch.job import StorageError
from sam3_jax.batch.journal import Journal
from sam3_jax.batch.loading import NO_PIXELS, Image, load, reason_of
from sam3_jax.utils.identity import FileIdentity

__all__ = ["Image", "Source", "reading", "reason_of"]

DECODING = 60.0  # seconds in which an image's bytes must be decoded
FETCHING = 300.0  # seconds in which an image's bytes must be there
MEMORY = 4 * 2**30  # bytes that reading a suspect may take, and
BYTES_A_PIXEL = 12  # more for each pixel that --max-pixels allows: copies in several modes
START_TRIES = 3  # of a process for suspects; one may be ended by what ended the process before
LOST = 64  # readers that hang, at which the storage is taken to be away
_POLL = 0.1  # seconds between two looks at whether to stop


class StoppedError(Exception):
  """The process was told to stop while it waited for an image."""


class Task(NamedTuple):
  """An image to read.

  Attributes:
    file: where it is.
    index: in the list.
    journal: of its part.
    alone: it is a suspect.
  """

  file: File
  index: int = 0
  journal: Journal | None = None
  alone: bool = False


class Source:
  """Images to read, one after another, and what they should become."""

  def __init__(self, images: Iterable[Input | Task], side: int, max_pixels: int):
    self.side, self.max_pixels, self._images = side, max_pixels, images

  def __iter__(self) -> Iterator[Task]:
    for index, one in enumerate(self._images):
      yield one if isinstance(one, Task) else task_of(one, index)


def task_of(one: Input, index: int, journal: Journal | None = None) -> Task:
  alone = journal is not None and index in journal.suspects
  return Task(File(one.name, one.path, one.span, one.identity), index, journal, alone)


@contextlib.contextmanager
def reading(
  source: Source,
  *,
  workers: int,
  threads: int,
  ahead: int,
  stopping: Callable[[], bool] = lambda: False,
) -> Iterator[Iterator[Image]]:
  """An iterator over all images of a source, in order.

  Args:
    source: what to read; is asked for more as images are taken.
    workers: processes; 0 for threads of this one.
    threads: if there are no workers.
    ahead: images that are kept ready.
    stopping: whether to raise StoppedError instead of waiting.

  Raises:
    StorageError: so many reads hang that the storage must be away.
    OSError: processes do not start.
  """
  reader = _Reader(source, workers, threads, stopping)
  try:
    yield reader.images(max(ahead, workers or threads))
  finally:
    reader.close()


class _Turn:
  """A task on its way through a thread.

  Attributes:
    image: what came of it; None until then.
    began, fetched: when, by `time.monotonic`; None before.
    child: that reads it.
    lost: nobody waits for it any more.
  """

  def __init__(self, task: Task):
    self.task = task
    self.image: Image | None = None
    self.began: float | None = None
    self.fetched: float | None = None
    self.child: Child | None = None
    self.lost = False

  def note_fetched(self, *_: object) -> None:
    self.fetched = time.monotonic()


class _Reader:
  """Threads that read, each by itself or by a process of its own.

  The threads are daemons: one that hangs in a call to the kernel cannot be ended, and must not keep
  this process from ending.
  """

  def __init__(self, source: Source, workers: int, threads: int, stopping: Callable[[], bool]):
    self._source, self._stopping = source, stopping
    self._queue: queue.SimpleQueue[_Turn | None] = queue.SimpleQueue()
    self._came, self._closed, self._hanging = threading.Condition(), False, 0
    self._children: set[Child] = set()
    self._quarantine: Child | None = None
    self._workers, self._threads = workers, workers or threads
    self._started = False

  def images(self, ahead: int) -> Iterator[Image]:
    turns: collections.deque[_Turn] = collections.deque()
    tasks = iter(self._source)
    while True:
      for task in itertools.islice(tasks, ahead + 1 - len(turns)):
        turns.append(_Turn(task))
        if not task.alone:
          self._queue.put(turns[-1])
      if not turns:
        return
      if not self._started:
        self._started = True
        for _ in range(self._threads):
          self._start()
      yield self._wait(turns.popleft())

  def close(self) -> None:
    self._closed = True
    for _ in range(self._threads):
      self._queue.put(None)
    for child in list(self._children):
      child.close()
    if self._quarantine is not None:
      self._quarantine.close()

  def _start(self) -> None:
    threading.Thread(target=self._work, name="reader", daemon=True).start()

  def _work(self) -> None:
    """A thread."""
    child: Child | None = None
    while (turn := self._queue.get()) is not None and not self._closed:
      task, turn.began = turn.task, time.monotonic()
      if task.journal is not None:
        task.journal.begin(task.index)
      try:
        if self._workers:
          child = child or self._start_child()
          image = self._read_in(child, turn)
          child = None if image.suspect else child
        else:
          source = self._source
          image = load(task.file, source.side, source.max_pixels, turn.note_fetched)
      except Exception as error:  # what no one foresaw; the thread must go on
        image = _failed(reason_of(error), unreadable=True)
      if turn.lost:
        return  # another thread took its place
      if task.journal is not None and not image.suspect:
        task.journal.end(task.index)
      with self._came:
        turn.image = image
        self._came.notify_all()

  def _start_child(self) -> Child:
    child = Child(self._source.side, self._source.max_pixels)
    self._children.add(child)
    if self._closed:  # meanwhile: nobody else ends it
      child.kill()
    return child

  def _read_in(self, child: Child, turn: _Turn) -> Image:
    turn.child = child
    try:
      return child.read(turn.task.file, turn.note_fetched)
    except (DiedError, OSError) as died:
      child.close()
      self._children.discard(child)
      return _failed(str(died), suspect=True)

  def _wait(self, turn: _Turn) -> Image:
    while not turn.task.alone and turn.image is None and not turn.lost:
      if self._stopping():
        raise StoppedError
      with self._came:
        self._came.wait_for(lambda: turn.image is not None, _POLL)
      if turn.image is None and (image := self._late(turn)) is not None:
        return image
    if turn.image is not None and not turn.image.suspect:
      return turn.image
    journal = turn.task.journal
    if journal is not None:
      journal.suspects.add(turn.task.index)
    image = self._read_alone(turn.task)
    if journal is not None:
      journal.end(turn.task.index)
    return image

  def _late(self, turn: _Turn) -> Image | None:
    """Gives up a reader that takes too long: the bytes do not come, so another try may read them;
    or decoding does not end, so the image is a suspect (and None is returned)."""
    now = time.monotonic()
    if turn.began is None:
      return None
    if now - (turn.fetched or turn.began) < (FETCHING if turn.fetched is None else DECODING):
      return None
    turn.lost = True
    self._hanging += 1
    if turn.child is not None:
      turn.child.kill()
    if self._hanging > LOST:
      raise StorageError(
        f"{self._hanging} images could not be read in {FETCHING:.0f} s each; check the storage "
        "and rerun the same command to resume."
      )
    self._start()
    if turn.fetched is not None:
      return None
    if turn.task.journal is not None:
      turn.task.journal.end(turn.task.index)
    return _failed(
      f"{turn.task.file.path} cannot be read (no answer in {FETCHING:.0f} s)", unreadable=True
    )

  def _limited_child(self) -> Child:
    source, tries = self._source, START_TRIES
    while self._quarantine is None:
      memory = MEMORY + BYTES_A_PIXEL * source.max_pixels
      child, tries = Child(source.side, source.max_pixels, memory), tries - 1
      try:
        child.wait(self._check_stop)
        self._quarantine = child
      except (OSError, StoppedError) as error:
        child.close()
        if not tries or isinstance(error, StoppedError):
          raise
    return self._quarantine

  def _check_stop(self) -> None:
    if self._stopping():
      raise StoppedError

  def _read_alone(self, task: Task) -> Image:
    """Reads a suspect in a process with limits."""
    start = time.monotonic()
    child, since, late = self._limited_child(), [0.0, 0.0], [False]  # began, fetched

    def check() -> None:
      self._check_stop()
      since[0] = since[0] or time.monotonic()
      began, limit = (since[1], DECODING) if since[1] else (since[0], FETCHING)
      if began and time.monotonic() - began > limit:
        late[0] = True
        child.kill()

    def fetched() -> None:
      since[1] = time.monotonic()

    if task.journal is not None:
      task.journal.begin(task.index)
    try:
      return child.read(task.file, fetched, check)._replace(suspect=False)
    except DiedError as died:
      self._quarantine = None
      child.close()
      seconds, why = time.monotonic() - start, str(died)
      if late[0]:
        why = f"time limit of {DECODING:.0f} s"
        if died.identity is None:
          return _failed(f"{task.file.path} cannot be read (no answer in time)", unreadable=True)
      elif died.told:
        time.sleep(_POLL)  # who told it tells this process, too
        if self._stopping():
          raise StoppedError from None
        return _failed("the process that read it was told to stop", unreadable=True)
      reason = f"{task.file.name}: it ends the process that reads it ({why})"
      identity = died.identity or _examine(task.file)
      return _failed(reason, identity, seconds=seconds)


def _failed(
  reason: str,
  identity: FileIdentity | None = None,
  *,
  unreadable: bool = False,
  suspect: bool = False,
  seconds: float = 0.0,
) -> Image:
  return Image(NO_PIXELS, (0, 0), reason, seconds, identity, unreadable, suspect)


def _examine(file: File) -> FileIdentity | None:
  try:
    status = os.stat(file.path)
  except OSError:
    return None
  size = status.st_size if file.span is None else file.span[1]
  return FileIdentity(size, status.st_mtime_ns)
