"""Seconds, peak memory, and the machine they were taken on; standard library alone."""

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
  """The last result, and seconds: of the first call, the median of `repeats` later ones, and the
  median of the processor time of these, which other processes on the machine disturb less.

  `function` must wait for its result.
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
  """Takes a step of training for every line of standard input, and answers each, and the start,
  with a line of JSON: so one program can have others take turns.

  Args:
    step: waits for its result and returns the loss.
    versions: of packages.
    about: threads or device.
  """

  def answer(**values: Any) -> None:
    print(json.dumps(values), flush=True)

  answer(versions=versions, about=about)
  for _ in sys.stdin:
    loss, figures = timed(step, repeats=0)
    answer(
      loss=loss, seconds=figures["later"], processor=figures["processor"], memory=peak_memory()
    )


def peak_memory() -> int:
  """Bytes that this process has had resident at most since its start, or since
  `reset_peak_memory`; pages of mapped files included."""
  status = Path("/proc/self/status")
  if status.exists():  # `getrusage` begins with the peak of the process that started this one
    for line in status.read_text().splitlines():
      if line.startswith("VmHWM:"):
        return 1024 * int(line.split()[1])
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == "darwin" else 1024 * peak


def reset_peak_memory() -> None:
  """Lets `peak_memory` begin anew at what is resident now; on Linux only."""
  with contextlib.suppress(OSError):
    Path("/proc/self/clear_refs").write_text("5")


def machine() -> str:
  """Processor, cores that this process may use, and memory."""
  processor = platform.processor() or platform.machine()
  info = Path("/proc/cpuinfo")
  if info.exists():
    rows = (line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
    processor = next((value.strip() for key, value in rows if "model name" in key), processor)
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
  memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
  return f"{processor}, {cores} cores, {memory:.0f} GiB, {platform.system()}"
