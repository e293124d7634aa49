"""Helpers for Grain's worker processes and iterators."""

import contextlib
import multiprocessing
import os
import threading
from collections.abc import Iterator
from typing import Any


def exit_with_parent() -> None:
  """In a worker process: exits when the parent process ends, even if that was killed.

  Without it, the worker would wait forever for its results to be fetched.
  """
  parent = multiprocessing.parent_process()
  if parent is not None:
    threading.Thread(target=_exit_after, args=(parent,), daemon=True).start()


def _exit_after(parent: Any) -> None:
  parent.join()
  os._exit(1)


def parse_flags() -> None:
  """Marks absl's flags as parsed, which Grain reads even in programs that do not use absl."""
  from absl import flags

  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()


@contextlib.contextmanager
def explain_lost_workers() -> Iterator[None]:
  """Raises OSError with a remedy if a worker process was killed."""
  try:
    yield
  except RuntimeError as error:
    what = str(error).partition(". ")[0]
    if not what.startswith("Worker process was terminated"):
      raise
    raise OSError(
      f"a process that reads images was lost ({what}): it was killed or ran out of memory; "
      "rerun the same command to resume, perhaps with fewer workers."
    ) from error


def close_all(iterators: list[Any]) -> None:
  """Closes iterators and empties the list, so that a second call does nothing."""
  while iterators:
    iterators.pop().close()
