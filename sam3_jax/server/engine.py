"""The thread that owns the device: encodes images and decodes prompts of all clients.

Requests wait in one bounded queue and take turns, so a request with many prompts does not delay the
others. The prompts of a turn are decoded in one call of `Sam3.decode` or `Sam3.decode_visual`. A
CPU decodes concept prompts one by one, as it decodes no faster in batches (`prompts_at_once`); a
batch takes what waits, and never waits for more.
"""

import collections
import dataclasses
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

from sam3_jax.server.device_work import Unit
from sam3_jax.server.errors import ApiError, busy

# Kinds of requests; points: everything.
IMAGES, PROMPTS, POINTS, VIDEOS = "images", "prompts", "points", "videos"
_FIRST_SECONDS = 0.1  # of a unit, before one was measured


class Work(Protocol):
  """What the thread computes."""

  def limit(self, key: Hashable) -> int: ...
  def joins_images(self, key: Hashable) -> bool: ...
  def compute(self, units: Sequence[Unit]) -> list[Any]: ...


class Meter(Protocol):
  """What the engine reports to; `metrics.Metrics`."""

  def batch(self, kind: str, size: int, seconds: float) -> None: ...
  def dropped(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What the device made of a request.

  Attributes:
    values: one for each unit, in their order.
    queue, device: milliseconds that it waited, and that its batches took.
  """

  values: list[Any]
  queue: float
  device: float


class _Request:
  """Units of one request, of which some may be done."""

  def __init__(self, kind: str, units: Sequence[Unit]):
    self.kind, self.future = kind, Future()
    # Units of the same batch follow each other.
    order = sorted(range(len(units)), key=lambda i: _order(units[i].key))
    self.waiting = collections.deque((i, units[i]) for i in order)
    self.values: list[Any] = [None] * len(units)
    self.left, self.added = len(units), time.perf_counter()
    self.started: float | None = None
    self.device = 0.0

  @property
  def key(self) -> Hashable:
    return self.waiting[0][1].key


class Engine:
  """The queue and its thread.

  Attributes:
    error: what stopped the thread from getting ready; None if nothing did.
  """

  def __init__(
    self,
    work: Work,
    *,
    max_images: int = 32,
    max_prompts: int = 512,
    meter: Meter | None = None,
    log: Callable[[BaseException], None] = lambda _: None,
  ):
    """Starts nothing yet.

    Args:
      work: computes batches; `device_work.DeviceWork`.
      max_images, max_prompts: that may wait, beyond which `submit` refuses.
      meter: is told of batches.
      log: is told of unexpected errors.
    """
    self._work = work
    self._limits = {IMAGES: max_images, PROMPTS: max_prompts, VIDEOS: max_prompts}
    self._waiting = collections.Counter[str]()  # units by kind
    self._requests: collections.deque[_Request] = collections.deque()
    self._changed = threading.Condition()
    self._ready, self._stopping = threading.Event(), False
    self._computing, self._last = False, time.monotonic()
    self._seconds: dict[str, float] = {}  # of a unit by kind, a moving average
    self._meter, self._log = meter, log
    self._thread: threading.Thread | None = None
    self.error: BaseException | None = None

  @property
  def is_ready(self) -> bool:
    """Whether the programs are compiled, and work is accepted."""
    return self._ready.is_set() and not self._stopping

  def wait_ready(self, timeout: float) -> bool:
    """Waits until the programs are compiled; returns whether they are."""
    return self._ready.wait(timeout)

  @property
  def is_running(self) -> bool:
    """Whether the thread exists, even after `stop`, if it still compiles."""
    return self._thread is not None and self._thread.is_alive()

  @property
  def idle_seconds(self) -> float:
    """How long nothing was computed; 0 if something is."""
    busy = self._computing or self._requests
    return 0.0 if busy else time.monotonic() - self._last

  def waiting(self, kind: str) -> int:
    """The number of units of a kind in the queue."""
    return self._waiting[kind]

  def start(
    self,
    prepare: Callable[[], object] = lambda: None,
    ready: Callable[[], object] = lambda: None,
    failed: Callable[[], object] = lambda: None,
  ) -> None:
    """Starts the thread, which first calls `prepare`, to compile programs.

    Once work is accepted it calls `ready`, or after an error of `prepare`, `failed`.
    """
    arguments = (prepare, ready, failed)
    self._thread = threading.Thread(
      target=self._run, args=arguments, name="sam3-device", daemon=True
    )
    self._thread.start()

  def stop(self, timeout: float | None = 30.0) -> None:
    """Refuses new requests, finishes those that wait, and ends the thread, or after `timeout`
    seconds lets it finish. A thread that still calls `prepare` has nothing to finish."""
    with self._changed:
      self._stopping = True
      self._changed.notify_all()
    if self._thread is not None and (timeout is None or self._ready.is_set()):
      self._thread.join(timeout)

  def submit(self, kind: str, units: Sequence[Unit]) -> "Future[Outcome]":
    """Queues the units of a request. To cancel the future drops those that were not begun.

    Raises:
      ApiError: the programs are not compiled yet, the server is stopping, or too many units wait.
    """
    request = _Request(kind, units)
    with self._changed:
      if not self.is_ready:
        what = "stopping" if self._stopping else "compiling its programs"
        raise ApiError("not_ready", f"the server is {what}; retry later.", {"Retry-After": "5"})
      limit = self._limits.get(kind)
      if limit is not None and self._waiting[kind] + len(units) > limit and self._waiting[kind]:
        wait = self._waiting[kind] * self._seconds.get(kind, _FIRST_SECONDS)
        raise busy(wait, f"{self._waiting[kind]} {kind} are waiting, and at most {limit} may")
      self._waiting[kind] += len(units)
      self._requests.append(request)
      self._changed.notify()
    return request.future

  def _run(
    self,
    prepare: Callable[[], object],
    ready: Callable[[], object],
    failed: Callable[[], object],
  ) -> None:
    try:
      prepare()
    except BaseException as error:
      self.error = error
      self._log(error)
      failed()
      return
    self._ready.set()
    self._last = time.monotonic()
    ready()
    while batch := self._next():
      self._computing = True
      self._compute(batch)
      self._computing, self._last = False, time.monotonic()

  def _next(self) -> list[tuple[_Request, int, Unit]]:
    """The next batch; empty once the engine is stopped and nothing waits."""
    with self._changed:
      while True:
        self._drop_cancelled()
        if self._requests:
          break
        if self._stopping:
          return []
        self._changed.wait()
      first = self._requests.popleft()
      key, batch, turns = first.key, [], [first]
      limit = self._work.limit(key)
      self._take(first, key, limit, batch)
      if self._work.joins_images(key):
        for other in list(self._requests):
          if len(batch) < limit and other.key == key:
            self._requests.remove(other)
            self._take(other, key, limit, batch)
            turns.append(other)
      self._requests.extend(one for one in turns if one.waiting)
      return batch

  def _take(self, request: _Request, key: Hashable, limit: int, batch: list) -> None:
    now = time.perf_counter()
    request.started = request.started or now
    while request.waiting and request.key == key and len(batch) < limit:
      index, unit = request.waiting.popleft()
      batch.append((request, index, unit))
      self._waiting[request.kind] -= 1

  def _drop_cancelled(self) -> None:
    for request in [one for one in self._requests if one.future.cancelled()]:
      self._requests.remove(request)
      self._waiting[request.kind] -= len(request.waiting)
      if self._meter:
        self._meter.dropped()

  def _compute(self, batch: list[tuple[_Request, int, Unit]]) -> None:
    kind = batch[0][0].kind
    start = time.perf_counter()
    try:
      values = self._work.compute([unit for _, _, unit in batch])
    except Exception as error:
      self._fail(batch, error)
      return
    seconds = time.perf_counter() - start
    before = self._seconds.get(kind, seconds / len(batch))
    self._seconds[kind] = 0.8 * before + 0.2 * seconds / len(batch)
    if self._meter:
      self._meter.batch(kind, len(batch), seconds)
    for request in {id(request): request for request, _, _ in batch}.values():
      request.device += seconds
    for (request, index, _), value in zip(batch, values, strict=True):
      request.values[index] = value
      request.left -= 1
      if not request.left and request.future.set_running_or_notify_cancel():
        queued = (request.started or start) - request.added
        request.future.set_result(Outcome(request.values, 1000 * queued, 1000 * request.device))

  def _fail(self, batch: list[tuple[_Request, int, Unit]], error: Exception) -> None:
    """Fails the requests of a batch; of several, each is tried alone, as one may be at fault."""
    if len({id(request) for request, _, _ in batch}) > 1:
      for item in batch:
        if not item[0].future.done():
          self._compute([item])
      return
    request = batch[0][0]
    self._log(error)
    with self._changed:
      self._waiting[request.kind] -= len(request.waiting)
      request.waiting.clear()
      if request in self._requests:
        self._requests.remove(request)
    if not request.future.done() and request.future.set_running_or_notify_cancel():
      request.future.set_exception(ApiError("internal", "the server failed; see its log."))


def _order(key: Hashable) -> str:
  return repr(key)
