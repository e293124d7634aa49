"""Figures of a run while it goes on and at its end."""

import dataclasses
import time

from sam3_jax.utils.console import Console, Step, say
from sam3_jax.utils.identity import SHOWN

EVERY = 10.0  # seconds between lines where there is no terminal to keep one up to date


@dataclasses.dataclass
class Tally:
  """What a process has done so far.

  Attributes:
    total: images of its share that were not done when it began.
    done, failed: of these.
    unreadable: why images of these could not be read at the last try, by index and name.
    done_before, failed_before: images of its share that it found so.
    prompts, instances: of the images that were done.
    device: seconds in which the devices had work.
    reading: seconds of reading and decoding, summed over threads or workers.
    processing: seconds of masks and records, summed over threads.
    writing: seconds of writing.
    waiting: seconds for which the devices' next batch was not read yet.
  """

  total: int
  done: int = 0
  failed: int = 0
  unreadable: dict[tuple[int, str], str] = dataclasses.field(default_factory=dict)
  done_before: int = 0
  failed_before: int = 0
  prompts: int = 0
  instances: int = 0
  device: float = 0.0
  reading: float = 0.0
  processing: float = 0.0
  writing: float = 0.0
  waiting: float = 0.0
  began: float = dataclasses.field(default_factory=time.perf_counter)

  @property
  def seconds(self) -> float:
    return time.perf_counter() - self.began

  @property
  def all_failed(self) -> int:
    """Of its share, in this run or before."""
    return self.failed_before + self.failed

  @property
  def seen(self) -> int:
    """Images of its share that are done or failed, in this run or before."""
    return self.done_before + self.done + self.all_failed

  def some_unreadable(self) -> str:
    """The first images that could not be read, and why."""
    first = [
      (reason if name in reason else f"{name}: {reason}").rstrip(".")
      for (_, name), reason in sorted(self.unreadable.items())[:SHOWN]
    ]
    more = len(self.unreadable) - len(first)
    return "; ".join(first) + (f"; and {more:,} more" if more else "")

  def line(self) -> str:
    """How far it is, and how fast."""
    seen, seconds = self.done + self.failed, max(self.seconds, 1e-9)
    left = (self.total - seen) * seconds / seen if seen else None
    return (
      f"{seen:,} of {self.total:,} images, {seen / seconds:.1f} images/s, "
      f"{self.prompts / seconds:.1f} prompts/s, {self.failed:,} failed, "
      f"{'?' if left is None else _duration(left)} left"
    )

  def summary(self) -> list[str]:
    """Lines for the end."""
    seconds = max(self.seconds, 1e-9)
    return [
      f"{self.done:,} images done, {self.failed:,} failed, {self.prompts:,} prompts, "
      f"{self.instances:,} instances in {_duration(seconds)}: {self.done / seconds:.1f} images/s",
      f"devices busy {self.device:.1f} s of {seconds:.1f} s ({self.device / seconds:.0%}); waited "
      f"{self.waiting:.1f} s for images; host: reading {self.reading:.1f} s, masks "
      f"{self.processing:.1f} s, writing {self.writing:.1f} s",
    ]


class Reporter:
  """Shows a tally: on a terminal in a line that changes, else in a line now and then."""

  def __init__(self, tally: Tally, console: Console, step: Step, who: str, quiet: bool):
    self._tally, self._console, self._step, self._who = tally, console, step, who
    self._lines = not quiet and not console.is_terminal
    self._last = time.perf_counter()

  def show(self) -> None:
    tally = self._tally
    line = self._who + tally.line()
    self._step(line, (tally.done + tally.failed) / max(1, tally.total))
    if self._lines and time.perf_counter() - self._last >= EVERY:
      self._last = time.perf_counter()
      say(self._console, line)


def _duration(seconds: float) -> str:
  if seconds < 90:
    return f"{seconds:.0f} s"
  if seconds < 5400:
    return f"{seconds / 60:.0f} min"
  return f"{seconds / 3600:.1f} h"
