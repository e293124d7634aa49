"""Signals: Ctrl-C inside callbacks of XLA, and SIGTERM or SIGHUP from a scheduler."""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

RESUME = 75  # EX_TEMPFAIL: exit status of an interrupted command; rerun it to resume
CLOSING = 2.0  # seconds that `Termination.end` waits for its close functions

_interrupted = threading.Event()


def raise_if_interrupted() -> None:
  """Raises KeyboardInterrupt if Ctrl-C was pressed, see `interruptible`."""
  if _interrupted.is_set():
    raise KeyboardInterrupt


@contextlib.contextmanager
def interruptible() -> Iterator[threading.Event]:
  """Records Ctrl-C as well as raising KeyboardInterrupt, which a callback of XLA may swallow.

  `console.progress` and `console.live` raise it again at their next update.

  Yields:
    An event that is set once Ctrl-C was pressed.
  """
  _interrupted.clear()
  handled = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not with nohup
  if not handled or threading.current_thread() is not threading.main_thread():
    yield _interrupted
    return
  report = sys.unraisablehook

  def interrupt(*_: object) -> None:
    _interrupted.set()
    raise KeyboardInterrupt

  def report_unless_interrupted(unraisable: Any) -> None:
    if not _interrupted.is_set():  # exceptions that follow an interruption are its consequences
      report(unraisable)

  signal.signal(signal.SIGINT, interrupt)
  sys.unraisablehook = report_unless_interrupted
  try:
    yield _interrupted
  finally:
    _interrupted.clear()
    sys.unraisablehook = report
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Termination:
  """Whether this process was asked to terminate: call it to find out."""

  def __init__(self):
    self._requested = threading.Event()
    self._closing: list[Callable[[], object]] = []

  def __call__(self) -> bool:
    return self._requested.is_set()

  def request(self, *_: object) -> None:
    """Requests termination; usable as a signal handler."""
    self._requested.set()

  def at_deadline(self, close: Callable[[], object]) -> None:
    """Registers a function that another thread calls before the process ends at the deadline."""
    self._closing.append(close)

  def end(self) -> None:
    """Ends the process at once, without waiting for its threads."""
    closer = threading.Thread(target=self._close, daemon=True)
    closer.start()
    closer.join(CLOSING)
    with contextlib.suppress(OSError):
      os.write(2, b"sam3-jax: stopped; rerun the same command to resume\n")
    os._exit(RESUME)

  def _close(self) -> None:
    for close in self._closing:
      with contextlib.suppress(Exception):
        close()


@contextlib.contextmanager
def terminable(deadline: float | None = None) -> Iterator[Termination]:
  """Records SIGTERM and SIGHUP, which schedulers send to preempt a job, instead of dying of them.

  Ignored signals, such as SIGHUP under nohup, stay ignored.

  Args:
    deadline: seconds after the first signal at which the process ends with status `RESUME`, even
      if it is blocked in a call to C or the kernel; a second signal ends it at once. None for
      never.

  Yields:
    A `Termination`.
  """
  termination = Termination()
  if threading.current_thread() is not threading.main_thread():
    yield termination
    return
  handled = [
    number
    for number in (signal.SIGTERM, signal.SIGHUP)
    if signal.getsignal(number) not in (signal.SIG_IGN, None)
  ]
  before = {number: signal.signal(number, termination.request) for number in handled}
  # Python calls handlers only once the main thread is back in Python. It writes to the wakeup
  # descriptor at once.
  ours, theirs = os.pipe()
  os.set_blocking(theirs, False)
  descriptor = signal.set_wakeup_fd(theirs, warn_on_full_buffer=False)
  watcher = threading.Thread(
    target=_watch_signals, args=(ours, handled, termination, deadline), daemon=True
  )
  watcher.start()
  try:
    yield termination
  finally:
    signal.set_wakeup_fd(descriptor)
    os.close(theirs)
    watcher.join()
    os.close(ours)
    for number, handler in before.items():
      signal.signal(number, handler)


def _watch_signals(
  pipe: int, handled: list[signal.Signals], termination: Termination, deadline: float | None
) -> None:
  end: float | None = None
  while True:
    left = None if end is None else max(0.0, end - time.monotonic())
    if not select.select([pipe], [], [], left)[0]:
      termination.end()
    data = os.read(pipe, 64)
    if not data:
      return
    for _ in (number for number in data if number in handled):
      termination.request()
      if end is not None:
        termination.end()
      end = None if deadline is None else time.monotonic() + deadline
