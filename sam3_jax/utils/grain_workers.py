"""What Grain's worker processes and iterators need around them."""

import contextlib
import multiprocessing
import os
import threading
from collections.abc import Iterator
from typing import Any


def leave_with_parent() -> None:
  """In a worker process: ends it as soon as the process that started it is gone, which may have
  been killed; the worker would wait forever for its results to be fetched."""
  parent = multiprocessing.parent_process()
  if parent is not None:
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: Any) -> None:
  parent.join()
  os._exit(1)


def parse_flags() -> None:
  """Grain's workers are told absl's flags, and a program without absl has not parsed them."""
  from absl import flags

  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()


@contextlib.contextmanager
def lost_ones_named() -> Iterator[None]:
  """Of a worker process that was killed, says so and what to do."""
  try:
    yield
  except RuntimeError as error:
    what = str(error).partition(". ")[0]
    if not what.startswith("Worker process was terminated"):
      raise
    raise OSError(
      f"a process that reads images is gone ({what}), killed or out of memory; what is done "
      "stays: give the same command again, perhaps with fewer workers."
    ) from error


def end(running: list[Any]) -> None:
  """Closes iterators and takes them out of the list, so that it can be done twice."""
  while running:
    running.pop().close()
