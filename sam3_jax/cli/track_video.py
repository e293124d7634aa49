"""The work of `sam3-jax track`: tracks objects through a video and writes the results."""

import collections
import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sam3_jax.cli.track_files import TrackFiles
from sam3_jax.cli.track_prompts import FramePrompt, TypedPrompt, frame_prompts, objects_of
from sam3_jax.cli.track_record import record_of
from sam3_jax.inference.predictor import Sam3
from sam3_jax.inference.video.clip import Clip
from sam3_jax.inference.video.session import Direction, VideoSession
from sam3_jax.inputs.frame_range import Position
from sam3_jax.inputs.prompts import as_prompts
from sam3_jax.inputs.tokenizer import check_distinct
from sam3_jax.inputs.video import open_video
from sam3_jax.inputs.video_source import VideoSource
from sam3_jax.outputs.track_formats import convert_tracks
from sam3_jax.outputs.track_lines import TrackReader, TrackWriter
from sam3_jax.outputs.tracked_frame import TrackedFrame
from sam3_jax.outputs.video_overlay import write_overlay
from sam3_jax.utils.console import Console, Step, loading, progress, say

SAVED_FRAMES = 500  # between two saved sessions, or
SAVED_SECONDS = 300.0
_GROWTH = 4  # a session with history is saved when it has grown by a quarter
_RECENT = 30  # frames over which the frames per second are measured


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
  """The arguments of a run.

  Attributes:
    video: a file or a directory of images.
    prompts: from `track_prompts.parse_prompts`.
    phrases: each finds all objects that it describes.
    start, stop, every: the frames of the clip, as in `VideoSource.frames`.
    direction: of the pass, or both.
    out: output directory; created when there is something to write.
    formats: keys of `track_formats.FORMATS`.
    overlay: whether to draw the objects over the video.
    saved_frames: frames between two saved sessions; None for `SAVED_FRAMES`.
  """

  video: Path
  prompts: Sequence[TypedPrompt]
  out: Path
  phrases: Sequence[str] = ()
  start: Position = 0
  stop: Position | None = None
  every: Position = 1
  direction: Direction = "forward"
  formats: Sequence[str] = ()
  overlay: bool = True
  saved_frames: int | None = None

  @property
  def files(self) -> TrackFiles:
    path = Path(os.path.abspath(self.video))
    return TrackFiles(self.out, path.name if path.is_dir() else path.stem)

  @property
  def options(self) -> dict[str, Any]:
    """Those that determine the results."""
    names = ("start", "stop", "every", "direction")
    return {name: getattr(self, name) for name in names} | {"text": list(self.phrases)}


def run(
  job: Job,
  checkpoint: Path,
  dtype: str | None,
  console: Console,
  errors: Console,
  stopping: Callable[[], bool] = lambda: False,
) -> bool:
  """Runs a job, or the rest of it.

  Args:
    job: its arguments.
    checkpoint: directory of the model.
    dtype: as in `Sam3.from_checkpoint`.
    console: for the paths; a quiet one also suppresses progress and notes.
    errors: for progress and notes.
    stopping: whether to save the session and return after the current frame.

  Returns:
    Whether the job is complete.

  Raises:
    ValueError, OSError: anything that is wrong. Lines written before it are complete.
  """

  check_distinct(job.phrases)
  notes: set[str] = set()

  def note(line: str) -> None:
    if line not in notes and not console.quiet:
      say(errors, f"note: {line}")
    notes.add(line)

  with open_video(job.video, note=note) as source:
    clip = Clip(source, job.start, job.stop, job.every)
    if clip.numbers is None:
      raise ValueError(
        f"{source.name} has no time stamps and can only be read forwards: convert it to MP4 first."
      )
    default = clip.numbers[-1 if job.direction == "backward" else 0]
    prompts = frame_prompts(objects_of(job.prompts), clip, default)
    with loading(errors, checkpoint, quiet=console.quiet) as step:
      model = Sam3.from_checkpoint(checkpoint, dtype=dtype, progress=step)
    _ = model.video_programs  # so that a checkpoint without tracker is reported before any work
    concepts = as_prompts(job.phrases) if job.phrases else []
    model.tokenizer.check(one.phrase for one in concepts)
    record = record_of(source, job.options, prompts, model, checkpoint.name)
    job.files.check(record)
    with job.files.reserved():
      before = job.files.check(record)
      if before is None or before.frames is None:
        saved = job.files.session() if before else None
        session, steps = _session(job, model, source, prompts, default, saved and saved[1])
        with session:
          if before is None:
            job.files.begin(record)
          lines = _track(job, session, steps, saved[0] if saved else 0, console, errors, stopping)
        if lines is None:
          return False
        job.files.finish(record, lines)
      written = _write_results(job, source, console, errors)
  if model.info.get("trained") is False:
    note(
      f"{checkpoint.name} is untrained, its parameters are random: the results are meaningless. "
      "Convert the released weights with `sam3-jax convert`."
    )
  for path in (job.files.tracks, *written):
    say(console, str(path))
  return True


def _track(
  job: Job,
  session: VideoSession,
  steps: Iterator[list[TrackedFrame]],
  done: int,
  console: Console,
  errors: Console,
  stopping: Callable[[], bool],
) -> int | None:
  """Tracks all frames after those that are done; returns the number of lines of the file of tracks,
  or None if it was stopped."""
  with TrackWriter(job.files.tracks, keep=done) as tracks:
    with progress(errors, bar=True, quiet=console.quiet) as step:
      meter, saving = _Meter(step, session, done), _Saving(job, session, tracks)
      meter.say("compiling, which can take a minute")
      for leaving in steps:
        for frame in leaving:
          tracks.write(frame)
        meter.count(leaving)
        if stopping():
          saving.save()
          say(errors, f"stopped after {tracks.frames} frames; rerun the same command to resume")
          return None
        saving.save_if_due()
    tracks.sync()
  say(console, meter.summary(job.direction))
  return tracks.frames


def _session(
  job: Job,
  model: Sam3,
  source: VideoSource,
  prompts: Sequence[FramePrompt],
  default: int,
  saved: Path | None,
) -> tuple[VideoSession, Iterator[list[TrackedFrame]]]:
  """The session and its steps: a new one with the prompts, or the saved one. Phrases are of the
  frame `default`."""
  if saved is not None:
    session = VideoSession.load(model, saved, source)
    return session, session.resume_steps()
  session = model.video(
    source, start=job.start, stop=job.stop, every=job.every, history=job.direction == "both"
  )
  for one in prompts:
    if one.identity not in session.objects:
      session.add(one.prompt, one.frame, mask=one.mask, identity=one.identity)
    elif one.prompt is None:
      session.correct(one.identity, one.frame, mask=one.mask)
    else:
      session.correct(
        one.identity, one.frame,
        points=one.prompt.points or None, point_labels=one.prompt.point_labels or None,
        box=one.prompt.box,
      )  # fmt: skip
  for phrase in job.phrases:
    session.find(phrase, default)
  return session, session.steps(job.direction)


class _Saving:
  """Saves the session now and then, and at most a tenth of the time."""

  def __init__(self, job: Job, session: VideoSession, tracks: TrackWriter):
    self._job, self._session, self._tracks = job, session, tracks
    self._last, self._ended, self._cost = tracks.frames, time.monotonic(), 0.0

  def save_if_due(self) -> None:
    frames, done = self._tracks.frames - self._last, self._tracks.frames
    seconds = time.monotonic() - self._ended
    needed = self._job.saved_frames or SAVED_FRAMES
    if self._session.tracker.state.history:
      needed = max(needed, done // _GROWTH)
    if frames >= needed or (seconds >= SAVED_SECONDS and seconds >= 10 * self._cost):
      self.save()

  def save(self) -> None:
    start = time.monotonic()
    self._tracks.sync()
    self._job.files.save(self._session, self._tracks.frames)
    self._last, self._ended = self._tracks.frames, time.monotonic()
    self._cost = self._ended - start


class _Meter:
  """Shows progress: the frame, the objects on it, and the frames per second.

  Speeds are those at which frames are tracked, not those at which they leave. A frame that two
  passes track counts twice.
  """

  def __init__(self, step: Step, session: VideoSession, done: int):
    length = session.clip.length or 0
    left = [each.start + 1 if each.backward else length - each.start for each in session.passes]
    self._step, self._session, self._written = step, session, done
    self._tracked = done + len(session.held.frames)
    self._total = max(1, self._tracked + sum(left))
    self._ends: collections.deque[float] = collections.deque(maxlen=_RECENT)
    self._first, self._counted = 0.0, 0

  def say(self, what: str) -> None:
    self._step(what, self._tracked / self._total)

  def count(self, leaving: Sequence[TrackedFrame]) -> None:
    """Counts a step; the first frame includes compilation, and speeds are measured after it."""
    held = self._session.held.frames
    self._written += len(leaving)
    if self._written + len(held) > self._tracked:  # else the pass has ended, and frames only leave
      self._tracked, self._counted = self._written + len(held), self._counted + 1
      self._ends.append(time.perf_counter())
      if self._counted == 1:
        self._first = self._ends[0]
    index = held[-1].index if held else leaving[-1].index
    objects = len(leaving[-1].instances) if leaving else len(held[-1].objects)
    found = f"{objects} of {_count_of(len(self._session.objects), 'object')}"
    speed = _speed(len(self._ends), self._ends[0], self._ends[-1]) if self._ends else ""
    self.say(f"frame {index}, {found}{speed}")

  def summary(self, direction: Direction) -> str:
    """One line about the run."""
    both = " in both directions" if direction == "both" else ""
    end = self._ends[-1] if self._ends else 0.0
    speed = _speed(self._counted, self._first, end)
    objects = _count_of(len(self._session.objects), "object")
    return f"{_count_of(self._tracked, 'frame')}{both}, {objects}{speed}"


def _count_of(number: int, noun: str) -> str:
  return f"{number} {noun}{'s' if number != 1 else ''}"


def _speed(frames: int, first: float, last: float) -> str:
  return f", {(frames - 1) / (last - first):.1f} frames per second" if last > first else ""


def _write_results(job: Job, source: VideoSource, console: Console, errors: Console) -> list[Path]:
  """Writes the overlay and the formats; returns their paths."""
  files = job.files
  written: list[Path] = []
  with progress(errors, bar=True, quiet=console.quiet) as step:
    if job.overlay:
      tracks = TrackReader(files.tracks)
      if not files.overlay.exists() and len(tracks):
        drawn = lambda count: step(f"drawing {files.overlay.name}", count / len(tracks))  # noqa: E731
        write_overlay(source, tracks, files.overlay, drawn)
      written.append(files.overlay)
    for to in dict.fromkeys(job.formats):
      step(f"writing {files.converted(to).name}", 1.0)
      convert_tracks(files.tracks, to, files.converted(to), name=files.name)
      written.append(files.converted(to))
  return written
