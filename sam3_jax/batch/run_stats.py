"""Counts and times of a run, for progress lines and the summary."""

import dataclasses
import time

from sam3_jax.utils.console import Console, Step, say
from sam3_jax.utils.identity import SHOWN

REPORT_INTERVAL = 10.0  # seconds between progress lines when there is no terminal


@dataclasses.dataclass
class RunStats:
  """Counts and times of a process.

  Attributes:
    total: images of this process that were not done when the run began.
    done, failed: how many of them are done, and have failed.
    unreadable: reason why an image could not be read at the last attempt, by index and name.
    done_before, failed_before: images of this process that were done, or had failed, before the
      run.
    prompts, instances: of the images that are done.
    device_seconds: time in which the devices had work.
    read_seconds: reading and decoding, summed over threads or workers.
    mask_seconds: masks and records, summed over threads.
    write_seconds: writing of part files.
    wait_seconds: time in which the next batch was not read yet.
    requests, repeated: requests to a store for the images, and how many of them were repetitions.
    other_requests, other_repeated: the same of everything else that this process reads or writes.
    started: start of the run, by `time.perf_counter`.
  """

  total: int
  done: int = 0
  failed: int = 0
  unreadable: dict[tuple[int, str], str] = dataclasses.field(default_factory=dict)
  done_before: int = 0
  failed_before: int = 0
  prompts: int = 0
  instances: int = 0
  device_seconds: float = 0.0
  read_seconds: float = 0.0
  mask_seconds: float = 0.0
  write_seconds: float = 0.0
  wait_seconds: float = 0.0
  requests: int = 0
  repeated: int = 0
  other_requests: int = 0
  other_repeated: int = 0
  started: float = dataclasses.field(default_factory=time.perf_counter)

  @property
  def seconds(self) -> float:
    """Time since the start."""
    return time.perf_counter() - self.started

  @property
  def all_failed(self) -> int:
    """Failed images of this process, in this run and before."""
    return self.failed_before + self.failed

  @property
  def processed(self) -> int:
    """Images of this process that are done or have failed, in this run and before."""
    return self.done_before + self.done + self.all_failed

  def describe_unreadable(self) -> str:
    """The first images that could not be read, and why."""
    first = [
      (reason if name in reason else f"{name}: {reason}").rstrip(".")
      for (_, name), reason in sorted(self.unreadable.items())[:SHOWN]
    ]
    more = len(self.unreadable) - len(first)
    return "; ".join(first) + (f"; and {more:,} more" if more else "")

  def progress_line(self) -> str:
    """Images done so far, and the rate."""
    count, seconds = self.done + self.failed, max(self.seconds, 1e-9)
    return (
      f"{count:,} of {self.total:,} images, {count / seconds:.1f} images/s, "
      f"{self.prompts / seconds:.1f} prompts/s, {self._end()}"
    )

  def _end(self) -> str:
    """The failures, and the time that is left."""
    count, seconds = self.done + self.failed, max(self.seconds, 1e-9)
    left = _duration((self.total - count) * seconds / count) if count else "?"
    return f"{self.failed:,} failed, {left} left"

  def _nothing(self, noun: str) -> str:
    """The summary of a run that finds all done."""
    what = f"{noun} was" if self.done_before == 1 else f"{noun}s were"
    return (
      f"nothing to do: {self.done_before:,} {what} done before, and {self.failed_before:,} failed"
    )

  def summary(self) -> list[str]:
    """Lines for the end of the run."""
    if not self.total:
      return [self._nothing("image")]
    seconds = max(self.seconds, 1e-9)
    lines = [
      f"{self.done:,} images done, {self.failed:,} failed, {self.prompts:,} prompts, "
      f"{self.instances:,} instances in {_duration(seconds)}: {self.done / seconds:.1f} images/s",
      f"devices busy {self.device_seconds:.1f} s of {seconds:.1f} s "
      f"({self.device_seconds / seconds:.0%}); waited {self.wait_seconds:.1f} s for images; host: "
      f"reading {self.read_seconds:.1f} s, masks {self.mask_seconds:.1f} s, writing "
      f"{self.write_seconds:.1f} s",
    ]
    if self.requests + self.other_requests:
      per_image = self.requests / max(1, self.done + self.failed)
      lines.append(
        f"storage: {self.requests:,} requests for images ({per_image:.2f} per image, "
        f"{self.repeated:,} repeated), {self.other_requests:,} others "
        f"({self.other_repeated:,} repeated)"
      )
    return lines


@dataclasses.dataclass
class VideoStats(RunStats):
  """Counts and times of a job of videos.

  Attributes:
    frames: that were tracked, also of videos that are not done.
    kept_frames: of the videos that are done.
  """

  frames: int = 0
  kept_frames: int = 0

  def progress_line(self) -> str:
    seconds = max(self.seconds, 1e-9)
    return (
      f"{self.done + self.failed:,} of {self.total:,} videos, {self.frames:,} frames, "
      f"{self.frames / seconds:.1f} frames/s, {self._end()}"
    )

  def summary(self) -> list[str]:
    if not self.total:
      return [self._nothing("video")]
    seconds = max(self.seconds, 1e-9)
    lines = [
      f"{self.done:,} videos done, {self.failed:,} failed, {self.kept_frames:,} frames, "
      f"{self.instances:,} objects in {_duration(seconds)}: {self.frames / seconds:.1f} frames/s"
    ]
    if requests := self.requests + self.other_requests:
      repeated = self.repeated + self.other_repeated
      lines.append(f"storage: {requests:,} requests ({repeated:,} repeated)")
    return lines


class Reporter:
  """Shows progress: in one updated line on a terminal, else in a line every few seconds."""

  def __init__(self, stats: RunStats, console: Console, step: Step, prefix: str, quiet: bool):
    self._stats, self._console, self._step, self._prefix = stats, console, step, prefix
    self._prints_lines = not quiet and not console.is_terminal
    self._last = time.perf_counter()

  def show(self) -> None:
    stats = self._stats
    line = self._prefix + stats.progress_line()
    self._step(line, (stats.done + stats.failed) / max(1, stats.total))
    if self._prints_lines and time.perf_counter() - self._last >= REPORT_INTERVAL:
      self._last = time.perf_counter()
      say(self._console, line)


def _duration(seconds: float) -> str:
  if seconds < 90:
    return f"{seconds:.0f} s"
  if seconds < 5400:
    return f"{seconds / 60:.0f} min"
  return f"{seconds / 3600:.1f} h"
