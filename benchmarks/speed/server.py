"""A side of the benchmark, in a process of its own: it is asked in lines of JSON and answers so.

The first line holds the settings, every later one a case and a count; each is one timed call. Needs
the standard library alone, as each side runs in its own environment.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from timing import peak_memory, reset_peak_memory, timed


class Unable(Exception):
  """A side cannot do what it is asked; the message says why."""


def serve(open_side: Callable[[dict[str, Any]], Any]) -> None:
  """Answers every line of standard input until it ends.

  Args:
    open_side: makes a side of the settings: an object with a method for each case that it can do,
      which takes the count and returns a function that does the work once and waits for its end.
      Its `facts` are the first answer: seconds of `import` and `load`, `versions`, `device`.
  """
  # What libraries print must not come between the answers.
  answers = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)
  side, prepared, call = None, None, None
  for line in sys.stdin:
    asked = json.loads(line)
    try:
      if side is None:
        use_threads(asked["threads"])
        side = open_side(asked)
        answer = side.facts | {"memory": peak_memory()}
      else:
        case = asked["case"], asked["count"]
        if case != prepared:
          call = None  # what it held need not stay
          prepared, call = case, prepare(side, *case)
          reset_peak_memory()
        answer = timed(call, repeats=0)[1] | {"memory": peak_memory()}
    except Unable as error:
      answer, prepared = {"unable": str(error)}, None
    except Exception as error:
      traceback.print_exc()
      [first, *_] = str(error).splitlines() or [""]
      answer, prepared = {"unable": f"{type(error).__name__}: {first}"}, None
    print(json.dumps(answer), file=answers, flush=True)


def prepare(side: Any, case: str, count: int) -> Callable[[], Any]:
  if not hasattr(side, case):
    raise Unable("it has no such step of its own")
  return getattr(side, case)(count)


def use_threads(threads: int | None) -> None:
  """Keeps this process on so many cores, from which every library takes its number of threads."""
  if threads is None:
    return
  if not hasattr(os, "sched_setaffinity"):
    raise Unable("a number of threads can be set on Linux only")
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
