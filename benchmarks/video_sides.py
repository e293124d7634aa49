"""One side of `video_speed.py` in its own process: a line on standard input is a frame to track.

Uses only NumPy and the standard library, as each side runs in its own environment.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from timing import peak_memory

PARTS = "encode", "detect", "track", "memory"
OBJECTS = 3


class Stopwatch:
  """Wall and CPU seconds of the parts of a frame.

  Attributes:
    wait: waits until a result is computed, and returns it.
    seconds, processor: of each part of the current frame.
  """

  def __init__(self, wait: Callable[[Any], Any] = lambda result: result):
    self.wait, self._running = wait, False
    self.seconds: dict[str, float] = {}
    self.processor: dict[str, float] = {}

  def watch(self, owner: Any, name: str, part: str) -> None:
    """Replaces a method of an object by one whose time counts for a part."""
    function = getattr(owner, name)

    def watched(*args: Any, **settings: Any) -> Any:
      if self._running:  # a call within a part belongs to that part
        return function(*args, **settings)
      with self.part(part):
        return self.wait(function(*args, **settings))

    setattr(owner, name, watched)

  @contextlib.contextmanager
  def part(self, name: str) -> Iterator[None]:
    self._running, start, processor = True, time.perf_counter(), time.process_time()
    yield
    self._running = False
    self.seconds[name] = self.seconds.get(name, 0) + time.perf_counter() - start
    self.processor[name] = self.processor.get(name, 0) + time.process_time() - processor


def serve(watch: Stopwatch, track: Callable[[], int], about: dict[str, Any]) -> None:
  """Tracks a frame for each line, and prints its times.

  Args:
    watch: of the parts.
    track: tracks to the next frame, and returns the number of objects.
    about: the first line that is printed.
  """
  responses = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)  # output of libraries must not mix with the responses

  def write(values: dict[str, Any]) -> None:
    print(json.dumps(values), file=responses, flush=True)

  write(about)
  for _ in sys.stdin:
    watch.seconds.clear()
    watch.processor.clear()
    start, processor = time.perf_counter(), time.process_time()
    objects = track()
    found = {"seconds": time.perf_counter() - start, "processor": time.process_time() - processor}
    for kind, total in list(found.items()):
      parts = {name: getattr(watch, kind).get(name, 0) for name in PARTS}
      found[f"{kind}_of"] = parts | {"host": total - sum(parts.values())}
    write(found | {"objects": objects, "memory": peak_memory()})


def threshold(scores: Any) -> float:
  """A score threshold that `OBJECTS` of the scores exceed, or more if those are equal."""
  best = sorted((float(x) for x in scores), reverse=True)
  lower = [score for score in best if score < best[OBJECTS - 1]]
  if not lower or not 0.001 < lower[0] < best[OBJECTS - 1] < 0.999:
    raise SystemExit(f"no threshold keeps {OBJECTS} objects of the scores {best[: OBJECTS + 1]}.")
  return (best[OBJECTS - 1] + lower[0]) / 2


def rules(limit: float) -> dict[str, Any]:
  """Rules that keep the objects of the first frame: none is added, removed or changed later."""
  return {
    "score_threshold_detection": limit, "det_nms_thresh": 0.0, "new_det_thresh": 1.0,
    "max_num_objects": OBJECTS, "hotstart_delay": 0, "recondition_every_nth_frame": 0,
    "fill_hole_area": 0, "suppress_overlapping_based_on_recent_occlusion_threshold": 0.0,
  }  # fmt: skip
