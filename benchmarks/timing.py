"""Measures time and peak memory, and describes the machine. Uses only the standard library."""

import contextlib
import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def timed(function: Callable[[], Any], repeats: int) -> tuple[Any, dict[str, float]]:
  """Times the first call of a function and `repeats` later calls.

  Args:
    function: must wait for its result.
    repeats: number of calls after the first; 0 to measure the first call only.

  Returns:
    The last result, and seconds: `first` of the first call, `later` the median of the later calls,
    and `processor` the median of their CPU time, which other work on the machine affects less.
  """
  seconds, processor = [], []
  for _ in range(1 + repeats):
    start, start_processor = time.perf_counter(), time.process_time()
    result = function()
    seconds.append(time.perf_counter() - start)
    processor.append(time.process_time() - start_processor)
  later, processor = seconds[1:] or seconds, processor[1:] or processor
  medians = {"later": statistics.median(later), "processor": statistics.median(processor)}
  return result, {"first": seconds[0]} | medians


def serve(step: Callable[[], float], versions: dict[str, str], about: dict[str, Any]) -> None:
  """Runs one training step for each line on standard input, so that processes can take turns.

  Prints a line of JSON at the start, with `versions` and `about`, and after each step.

  Args:
    step: runs a step, waits for its result and returns the loss.
    versions: versions of the packages.
    about: number of threads, or the device.
  """

  def write(**values: Any) -> None:
    print(json.dumps(values), flush=True)

  write(versions=versions, about=about)
  for _ in sys.stdin:
    loss, figures = timed(step, repeats=0)
    write(loss=loss, seconds=figures["later"], processor=figures["processor"], memory=peak_memory())


def peak_memory() -> int:
  """The peak resident memory of this process in bytes, including pages of mapped files, since its
  start or since `reset_peak_memory`."""
  status = Path("/proc/self/status")
  if status.exists():  # `getrusage` starts at the peak of the parent process
    for line in status.read_text().splitlines():
      if line.startswith("VmHWM:"):
        return 1024 * int(line.split()[1])
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == "darwin" else 1024 * peak


def reset_peak_memory() -> None:
  """Resets the peak to the memory that is resident now; does nothing except on Linux."""
  with contextlib.suppress(OSError):
    Path("/proc/self/clear_refs").write_text("5")


def machine() -> str:
  """Describes the processor, the number of cores that this process may use, and the memory."""
  processor = platform.processor() or platform.machine()
  info = Path("/proc/cpuinfo")
  if info.exists():
    rows = (line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
    processor = next((value.strip() for key, value in rows if "model name" in key), processor)
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
  memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
  return f"{processor}, {cores} cores, {memory:.0f} GiB, {platform.system()}"
