"""Reads ahead in a thread: the next items are made while the caller uses the current one."""

import queue
import sys
import threading
from collections.abc import Generator, Iterator
from typing import Any, TypeVar

T = TypeVar("T")

DEPTH = 8  # items made ahead at most
THREAD_NAME = "sam3-jax-read-ahead"


def read_ahead(items: Generator[T], depth: int = DEPTH) -> Iterator[T]:
  """Yields the items of a generator, which runs in a thread up to `depth` items ahead.

  An error of the generator is raised here, after the items before it. The thread starts at the
  first `next`. It ends, and the generator is closed in it, when the items are used up, or when the
  iterator is closed or garbage collected.

  Args:
    items: is used in the thread only.
    depth: items that exist at most, without the one that the caller uses.
  """
  slots, results, stop = threading.Semaphore(depth), queue.SimpleQueue[Any](), threading.Event()
  is_finalizing = sys.is_finalizing  # a local name, as modules are emptied at exit
  thread = threading.Thread(
    target=_produce, args=(items, slots, results, stop), name=THREAD_NAME, daemon=True
  )
  thread.start()
  try:
    while True:
      found, error = results.get()
      if error is not None:
        raise error
      if found is None:
        return
      slots.release()
      yield found.pop()
  finally:
    if not is_finalizing():  # else the thread does not run any more
      stop.set()
      slots.release()
      if thread is not threading.current_thread():  # the garbage collector runs in any thread
        thread.join()


def _produce(
  items: Generator[T],
  slots: threading.Semaphore,
  results: "queue.SimpleQueue[Any]",
  stop: threading.Event,
) -> None:
  """Puts ([item], None) for each item; then (None, None), or (None, error)."""
  end: tuple[None, BaseException | None] = (None, None)
  try:
    while slots.acquire() and not stop.is_set():
      try:
        results.put(([next(items)], None))
      except StopIteration:
        break
  except BaseException as error:
    end = (None, error)
  finally:
    items.close()
    results.put(end)
