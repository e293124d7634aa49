"""A side of the benchmark in its own process; requests and responses are lines of JSON.

The first request has the settings, each later one a case and a count, which is one timed call. Uses
only the standard library, as each side runs in its own environment.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from timing import peak_memory, reset_peak_memory, timed


class Unable(Exception):
  """A side does not support a request; the message says why."""


def serve(open_side: Callable[[dict[str, Any]], Any]) -> None:
  """Responds to the requests on standard input until it ends.

  Args:
    open_side: creates a side from the settings: an object with a method for each supported case.
      The method takes the count and returns a function that does the work once and waits for its
      end. `facts` is the first response: seconds of `import` and `load`, `versions`, `device`.
  """
  # Output of libraries must not mix with the responses.
  responses = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)
  side, prepared, call = None, None, None
  for line in sys.stdin:
    request = json.loads(line)
    try:
      if side is None:
        use_threads(request["threads"])
        side = open_side(request)
        response = side.facts | {"memory": peak_memory()}
      else:
        case = request["case"], request["count"]
        if case != prepared:
          call = None  # frees its memory
          prepared, call = case, prepare(side, *case)
          reset_peak_memory()
        response = timed(call, repeats=0)[1] | {"memory": peak_memory()}
    except Unable as error:
      response, prepared = {"unable": str(error)}, None
    except Exception as error:
      traceback.print_exc()
      [first, *_] = str(error).splitlines() or [""]
      response, prepared = {"unable": f"{type(error).__name__}: {first}"}, None
    print(json.dumps(response), file=responses, flush=True)


def prepare(side: Any, case: str, count: int) -> Callable[[], Any]:
  if not hasattr(side, case):
    raise Unable("it has no such step")
  return getattr(side, case)(count)


def use_threads(threads: int | None) -> None:
  """Limits this process to `threads` cores, from which libraries derive their thread counts."""
  if threads is None:
    return
  if not hasattr(os, "sched_setaffinity"):
    raise Unable("the number of threads can only be set on Linux")
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
