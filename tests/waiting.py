"""Waiting for something to happen, with a limit that a slow machine does not reach."""

import time
from collections.abc import Callable


def wait_until(condition: Callable[[], object], limit: float = 600.0) -> None:
  """Returns as soon as the condition is true.

  Args:
    condition: called every 10 ms.
    limit: seconds after which the test fails.
  """
  end = time.monotonic() + limit
  while not condition():
    assert time.monotonic() < end, f"nothing happened in {limit:g} seconds"
    time.sleep(0.01)
