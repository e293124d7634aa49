"""Tracks the videos of parts, one after another.

A video is the unit of work: its lines are kept in a temporary file until it is done. If the process
stops before, the video is tracked again from its start, so that its bytes are always the same.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from sam3_jax.batch.decode_check import check_decoding
from sam3_jax.batch.files import remove_drafts, scratch
from sam3_jax.batch.image_bytes import FileChangedError, UnusableFileError
from sam3_jax.batch.input_list import Input
from sam3_jax.batch.job import check_failures
from sam3_jax.batch.journal import Journal
from sam3_jax.batch.leased_part import LeasedPart
from sam3_jax.batch.local_video import FOLDER, LocalVideo, TemporaryFileError, local_video
from sam3_jax.batch.part_files import Failure
from sam3_jax.batch.pipeline import acquire, passes
from sam3_jax.batch.prefetch import StoppedError
from sam3_jax.batch.prompt_schema import concept_prompts
from sam3_jax.batch.run_stats import Reporter, VideoStats
from sam3_jax.batch.video_job import VideoJob
from sam3_jax.batch.video_records import VideoRecord
from sam3_jax.inference.predictor import Sam3
from sam3_jax.inputs.tokenizer import distinct
from sam3_jax.inputs.video import open_video
from sam3_jax.storage import retries
from sam3_jax.storage.urls import redact
from sam3_jax.utils.identity import FileIdentity
from sam3_jax.utils.os_errors import error_text


class _UnreadableError(Exception):
  """A video cannot be read now; another attempt may succeed."""


class _UndecodableError(Exception):
  """A video was read and cannot be tracked."""

  def __init__(self, reason: str, identity: FileIdentity | None):
    super().__init__(reason)
    self.identity = identity


class VideoPipeline:
  """Runs a model over the videos of parts."""

  def __init__(self, job: VideoJob, model: Sam3, stats: VideoStats, reporter: Reporter):
    self._job, self._model, self._stats, self._reporter = job, model, stats, reporter

  def run(self, parts: Sequence[LeasedPart], stopping: Callable[[], bool]) -> None:
    """Tracks the videos of parts, in several passes: each pass retries unreadable videos, and parts
    that another process holds."""
    remove_drafts(scratch() / FOLDER, lambda _: True)
    for left, last in passes(parts, stopping):
      for part in left:
        if stopping():
          return
        if not acquire(part, self._stats):
          continue
        with contextlib.suppress(StoppedError):
          for index in list(part.left):
            self._process(part, index, last, stopping)
            self._reporter.show()
        if not part.finished:
          part.close()

  def _process(
    self, part: LeasedPart, index: int, last: bool, stopping: Callable[[], bool]
  ) -> None:
    """Tracks a video, and adds its record or its failure to the part."""
    item, before = self._job.inputs[index], retries.counted()
    self._stats.unreadable.pop((index, item.name), None)
    try:
      with VideoRecord(self._job.out, part.number, index) as record:
        with _journaled(part.journal, index) as suspect:
          pieces, identity = self._track(item, record, suspect, stopping)
        part.add([pieces], [], [index], {index: identity})
        self._stats.done += 1
        self._stats.kept_frames += record.frames
        self._stats.instances += record.objects
        self._stats.prompts += len(item.prompts)
    except _UndecodableError as error:
      self._fail(part, Failure(index, item.name, str(error), error.identity))
    except _UnreadableError as error:
      if self._job.skip_unreadable and last:
        self._fail(part, Failure(index, item.name, str(error)))
      else:
        self._stats.unreadable[index, item.name] = str(error)
    finally:
      requests, repeated = retries.counted()
      self._stats.requests += requests - before[0]
      self._stats.repeated += repeated - before[1]
    check_failures(self._job, self._stats)

  def _fail(self, part: LeasedPart, failure: Failure) -> None:
    part.add([], [failure], [failure.input], {})
    self._stats.failed += 1

  def _track(
    self, item: Input, record: VideoRecord, suspect: bool, stopping: Callable[[], bool]
  ) -> tuple[Iterator[bytes], FileIdentity]:
    """Tracks a video; returns the pieces of its record and the identity of what was read."""
    notes = list[str]()
    phrases: list[Any] = distinct(prompt.phrase for prompt in concept_prompts(item.prompts))
    errors = _ReadErrors(item)
    try:
      with contextlib.ExitStack() as stack:
        with errors:
          video = stack.enter_context(local_video(item))
        errors.video = video
        with errors:
          if suspect:
            check_decoding(video.path, stopping)
          source = stack.enter_context(
            open_video(video.path, note=lambda line: notes.append(errors.named(line)))
          )
          frames = self._model.track(source, phrases)
        stack.callback(getattr(frames, "close", lambda: None))
        while True:
          if stopping():
            raise StoppedError
          with errors:
            frame = next(frames, None)
          if frame is None:
            break
          record.add(frame)
          self._stats.frames += 1
          self._reporter.show()
    except FileChangedError as error:  # while it was tracked
      raise _UnreadableError(str(error)) from error
    return record.pieces(item.name, source.size, video.identity, phrases, notes), video.identity


@contextlib.contextmanager
def _journaled(journal: Journal | None, index: int) -> Iterator[bool]:
  """Names a video in the journal of its part while it is read; yields whether it is a suspect."""
  if journal is None:
    yield False
    return
  suspect = index in journal.suspects
  journal.begin(index)
  try:
    yield suspect
  finally:
    journal.end(index)


class _ReadErrors:
  """Sorts errors of reading a video into `_UnreadableError` and `_UndecodableError`.

  Attributes:
    video: once it is known.
  """

  def __init__(self, item: Input):
    self._item = item
    self.video: LocalVideo | None = None

  def __enter__(self) -> None:
    return

  def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
    identity = self.video.identity if self.video is not None else None
    match error:
      case TemporaryFileError():
        return
      case UnusableFileError():
        raise _UndecodableError(str(error), error.identity) from error
      case FileNotFoundError():
        raise _UnreadableError(f"there is no video {redact(self._item.path)}") from error
      case FileChangedError():
        raise _UnreadableError(str(error)) from error
      case OSError():
        what = redact(self._item.path)
        raise _UnreadableError(f"{what} cannot be read ({error_text(error)})") from error
      case MemoryError():
        raise _UndecodableError("it needs more memory than there is", identity) from error
      case ValueError():
        line = " ".join(str(error).split())
        raise _UndecodableError(self.named(line), identity) from error
      case _:
        return

  def named(self, text: str) -> str:
    """Replaces the path of the local file by the name of the video."""
    return text if self.video is None else text.replace(str(self.video.path), self._item.name)
