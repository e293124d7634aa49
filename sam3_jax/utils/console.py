"""Terminal output of the command: lines, progress and errors."""

import contextlib
import io
import logging
import os
import sys
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
from sam3_jax.utils.signals import raise_if_interrupted

LARGE = 256 * 2**20  # bytes; a bar shows the progress of loading a checkpoint of this size or more
FAILED = 2  # exit status after an error
INTERRUPTED = 130  # 128 + SIGINT, the convention of shells

Step = Callable[[str, float], None]  # name of the next step, fraction of the work done so far

_JOINERS = "\u200c\u200d"  # used within words of some scripts and between parts of an emoji


def printable(text: str, keep: str = "") -> str:
  """One line of text that is safe to print on a terminal.

  Control characters (escape sequences, line breaks, C1), formatting characters (direction of
  writing, invisible characters) and undecodable bytes are escaped as Python does: `\\x1b`.

  Args:
    text: untrusted text, such as a file name, a licence in a checkpoint, a phrase or an error.
    keep: characters that are not escaped.
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
  """Rich's console; applies `printable` to all text, but not to styles and cursor movements."""

  def render(
    self, renderable: RenderableType, options: ConsoleOptions | None = None
  ) -> Iterator[Segment]:
    for segment in super().render(renderable, options):
      if segment.control:
        yield segment
      else:
        yield Segment(printable(segment.text, keep="\n\t"), segment.style)


def say(console: rich.console.Console, line: str) -> None:
  """Prints one line without wrapping it; escapes it with `printable`, line breaks included."""
  console.print(printable(line), soft_wrap=True, markup=False, highlight=False)


def print_error(message: str, console: rich.console.Console | None = None) -> None:
  """Prints an error message in one line, by default on stderr.

  Args:
    message: white space in it is collapsed.
    console: give it if it shows progress on stderr.
  """
  say(console or Console(stderr=True), f"sam3-jax: error: {' '.join(message.split())}")


def one_line(error: Exception) -> str:
  """The message for an exception; unexpected ones get their type."""
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
  """Shows a spinner, and a bar if `bar`, until the end; nothing if `quiet` or not on a terminal."""
  columns = [SpinnerColumn(), TextColumn("{task.description}", markup=False)]
  columns += [BarColumn(), TaskProgressColumn()] if bar else []
  with live(console, *columns, quiet=quiet, total=1.0) as update:
    yield lambda step, fraction: update(description=step, completed=fraction)


@contextlib.contextmanager
def loading(console: rich.console.Console, folder: Path, *, quiet: bool = False) -> Iterator[Step]:
  """Shows the progress of `Sam3.from_checkpoint`, with a bar if the checkpoint is large."""
  large = sum(file_sizes(folder / "params").values()) >= LARGE
  with progress(console, bar=large, quiet=quiet) as update:
    update(f"loading {folder.name}", 0)
    yield lambda step, fraction: update(f"loading {folder.name}: {step}", fraction)


@contextlib.contextmanager
def live(
  console: rich.console.Console, *columns: ProgressColumn, quiet: bool = False, **fields: Any
) -> Iterator[Callable[..., None]]:
  """Shows a live line until the end; nothing if `quiet` or not on a terminal.

  Args:
    console: shows the line, unless it is quiet.
    columns: rich's columns of the line.
    quiet: show nothing.
    fields: initial values of the columns: rich's `total`, `completed` and others.

  Yields:
    A function that updates fields. It raises KeyboardInterrupt if Ctrl-C was pressed, see
    `signals.interruptible`.
  """
  hidden = quiet or console.quiet or not console.is_terminal
  with Progress(*columns, console=console, transient=True, disable=hidden) as shown:
    task = shown.add_task("", **fields)

    def update(**fields: Any) -> None:
      raise_if_interrupted()
      shown.update(task, **fields)

    yield update


@contextlib.contextmanager
def silence(debug: bool) -> Iterator[None]:
  """Suppresses warnings and logs of libraries, unless `debug`."""
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


def replace_unencodable() -> None:
  """Makes stdout and stderr replace characters that they cannot encode."""
  for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, io.TextIOWrapper):
      stream.reconfigure(errors="replace")
