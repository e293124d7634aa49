"""What the command shows: lines, progress and errors."""

import contextlib
import io
import logging
import os
import select
import signal
import sys
import threading
import time
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import rich.console
from rich.console import ConsoleOptions, RenderableType
from rich.progress import (
  BarColumn,
  Progress,
  ProgressColumn,
  SpinnerColumn,
  TaskProgressColumn,
  TextColumn,
)
from rich.segment import Segment

from sam3_jax.utils.os_errors import reason
from sam3_jax.utils.paths import file_sizes

LARGE = 256 * 2**20  # bytes of a checkpoint from which on reading it takes a while
FAILED = 2  # exit status of every error
RESUME = 75  # of a command that stopped before the end: the same command resumes it (EX_TEMPFAIL)
INTERRUPTED = 130  # 128 + SIGINT, as shells have it
CLOSING = 2.0  # seconds in which what is done must be kept, once a process has to end

Step = Callable[[str, float], None]  # what is being done, and which fraction was done before that

_JOINERS = "\u200c\u200d"  # within words of some scripts, and between the parts of an emoji
_interrupted = threading.Event()


def printable(text: str, keep: str = "") -> str:
  """Text that changes nothing on a terminal but the letters on it, in one line.

  Control characters (escape sequences, line breaks, C1), formatting characters (the direction of
  writing, invisible ones) and bytes that are no text become what Python writes for them, `\\x1b`.

  Args:
    text: from anywhere: a file's name, a licence in a checkpoint, a phrase, an error.
    keep: characters that stay.
  """
  if text.isprintable():
    return text
  return "".join(
    character if character in keep or character in _JOINERS or _is_visible(character)
    else repr(character)[1:-1]
    for character in text
  )  # fmt: skip


def _is_visible(character: str) -> bool:
  return unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp")


class Console(rich.console.Console):
  """Rich's console, with `printable` applied to all that is shown on it, styles and moves aside."""

  def render(
    self, renderable: RenderableType, options: ConsoleOptions | None = None
  ) -> Iterator[Segment]:
    for segment in super().render(renderable, options):
      if segment.control:
        yield segment
      else:
        yield Segment(printable(segment.text, keep="\n\t"), segment.style)


def say(console: rich.console.Console, line: str) -> None:
  """Prints one line, however narrow the terminal; `printable`, line breaks included."""
  console.print(printable(line), soft_wrap=True, markup=False, highlight=False)


def complain(message: str, console: rich.console.Console | None = None) -> None:
  """Reports a fault in one line, on stderr if not on a console that shows progress there."""
  say(console or Console(stderr=True), f"sam3-jax: error: {' '.join(message.split())}")


def one_line(error: Exception) -> str:
  """An exception in words; those that no one foresaw with their kind."""
  if isinstance(error, OSError) and error.strerror:
    return f"{error.filename}: {reason(error)}" if error.filename else reason(error)
  if isinstance(error, MemoryError):
    return "there is not enough memory; give smaller or fewer images at a time."
  said = str(error)
  if isinstance(error, ValueError | TypeError | OSError | ImportError) and said:
    return said
  return f"{type(error).__name__}: {said} (--debug shows where)"


@contextlib.contextmanager
def progress(console: rich.console.Console, *, bar: bool, quiet: bool) -> Iterator[Step]:
  """A spinner, and a bar if asked for, on a terminal that is not to be quiet; gone at the end."""
  columns = [SpinnerColumn(), TextColumn("{task.description}", markup=False)]
  columns += [BarColumn(), TaskProgressColumn()] if bar else []
  with live(console, *columns, quiet=quiet, total=1.0) as update:
    yield lambda what, fraction: update(description=what, completed=fraction)


@contextlib.contextmanager
def loading(console: rich.console.Console, folder: Path, *, quiet: bool = False) -> Iterator[Step]:
  """What `Sam3.from_checkpoint` tells of its progress; with a bar if the checkpoint is large."""
  large = sum(file_sizes(folder / "params").values()) >= LARGE
  with progress(console, bar=large, quiet=quiet) as step:
    step(f"loading {folder.name}", 0)
    yield lambda what, fraction: step(f"loading {folder.name}: {what}", fraction)


@contextlib.contextmanager
def live(
  console: rich.console.Console, *columns: ProgressColumn, quiet: bool = False, **fields: Any
) -> Iterator[Callable[..., None]]:
  """A line that changes, on a terminal that is not to be quiet; gone at the end.

  Args:
    console: where it is shown, unless that is quiet.
    columns: what it is made of.
    quiet: show nothing.
    fields: what the columns show at first: rich's `total`, `completed`, and others.

  Yields:
    Changes fields; raises KeyboardInterrupt if Ctrl-C was pressed, see `interruptible`.
  """
  hidden = quiet or console.quiet or not console.is_terminal
  with Progress(*columns, console=console, transient=True, disable=hidden) as shown:
    task = shown.add_task("", **fields)

    def update(**fields: Any) -> None:
      if _interrupted.is_set():
        raise KeyboardInterrupt
      shown.update(task, **fields)

    yield update


@contextlib.contextmanager
def interruptible() -> Iterator[threading.Event]:
  """Notes Ctrl-C beside raising it: in a callback of XLA's the exception would be lost.

  `progress` and `live` raise it again at their next step.

  Yields:
    Is set once Ctrl-C was pressed.
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

  def report_before(lost: Any) -> None:
    if not _interrupted.is_set():  # after it: the interruption, and what it broke
      report(lost)

  signal.signal(signal.SIGINT, interrupt)
  sys.unraisablehook = report_before
  try:
    yield _interrupted
  finally:
    _interrupted.clear()
    sys.unraisablehook = report
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Termination:
  """Whether this process was told to end; calling it tells."""

  def __init__(self):
    self._told = threading.Event()
    self._closing: list[Callable[[], object]] = []

  def __call__(self) -> bool:
    return self._told.is_set()

  def tell(self, *_: object) -> None:
    self._told.set()

  def at_deadline(self, close: Callable[[], object]) -> None:
    """Has a function called, in another thread, before the process is ended at the deadline."""
    self._closing.append(close)

  def end(self) -> None:
    """Ends the process at once, whatever its threads are doing."""
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
  """Notes SIGTERM and SIGHUP, with which a scheduler preempts a job, instead of dying of them.

  A signal that is ignored, as SIGHUP under nohup, stays so.

  Args:
    deadline: seconds after which, or at a second signal, the process ends with `RESUME` whatever it
      is doing, also while it is blocked in a call to C or the kernel; None for never.

  Yields:
    Tells whether one came.
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
  before = {number: signal.signal(number, termination.tell) for number in handled}
  # Python calls handlers in the main thread once that is back in Python. The wakeup descriptor is
  # written to at once.
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
      termination.tell()
      if end is not None:
        termination.end()
      end = None if deadline is None else time.monotonic() + deadline


@contextlib.contextmanager
def silence(debug: bool) -> Iterator[None]:
  """Keeps warnings and logs of the libraries off the terminal, unless `debug`."""
  if debug:
    yield
    return
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's own
  before = logging.root.manager.disable
  logging.disable(logging.ERROR)
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      yield
  finally:
    logging.disable(before)


def forgive_encodings() -> None:
  """Has stdout and stderr replace what they cannot encode, such as an odd file name."""
  for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, io.TextIOWrapper):
      stream.reconfigure(errors="replace")
