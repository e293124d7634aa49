"""The files of a tracking job: results, the record, and the session from which it resumes."""

import contextlib
import dataclasses
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sam3_jax.cli.track_record import Record
from sam3_jax.inference.video.session import VideoSession
from sam3_jax.outputs.track_formats import FORMATS
from sam3_jax.outputs.track_lines import SUFFIX as TRACKS
from sam3_jax.outputs.video_overlay import SUFFIX as OVERLAY
from sam3_jax.utils.lease import PARTIAL, Lease, is_abandoned

_NAME = re.compile(r"(\d{9})\.npz")


@dataclasses.dataclass(frozen=True)
class TrackFiles:
  """The files of a job in its output directory. NAME is that of the video without its suffix.

  NAME.tracks.jsonl    a line for each frame
  NAME.sam3.mp4        the video with its objects drawn over it
  NAME.track.json      the record
  NAME.resume/         000000500.npz: the session after 500 lines; removed at the end
  NAME.lease           held while a process works on the job

  Attributes:
    out: the output directory.
    name: NAME.
  """

  out: Path
  name: str

  @property
  def tracks(self) -> Path:
    return self.out / (self.name + TRACKS)

  @property
  def overlay(self) -> Path:
    return self.out / (self.name + OVERLAY)

  @property
  def record(self) -> Path:
    return self.out / f"{self.name}.track.json"

  def converted(self, to: str) -> Path:
    """The file or directory of a format."""
    return self.out / (self.name + FORMATS[to].suffix)

  @contextlib.contextmanager
  def reserved(self) -> Iterator[None]:
    """Holds the lease, and removes what killed processes have left.

    Raises:
      LeaseHeldError: another process works on the job.
      OSError: the directory cannot be written.
    """
    with Lease(self.out / f"{self.name}.lease"):
      for folder in (self.out, self._sessions):
        for draft in folder.glob(f".*{PARTIAL}"):
          if draft.name.startswith((f".{self.name}.", ".0")) and is_abandoned(draft):
            remove(draft)
      yield

  def check(self, record: Record) -> Record | None:
    """The record of the same job that was begun before; None if there is none, or no result.

    Raises:
      ValueError: the files are those of another job.
    """
    before = Record.read(self.record)
    if before is None:
      for path in (self.tracks, self.overlay):
        if path.exists():
          raise ValueError(
            f"{path} exists, but not the record of its job, {self.record.name}: remove it, or "
            "choose another --out."
          )
      return None
    if not self.tracks.exists():
      return None
    if found := before.differences(record):
      raise ValueError(
        f"{self.tracks} is of another job: {'; '.join(found)}. Repeat its arguments to resume it, "
        "or choose another --out."
      )
    return before

  def begin(self, record: Record) -> None:
    """Removes what is left of an unfinished job, and writes the record."""
    for path in (self._sessions, self.overlay, Path(f"{self.overlay}.pieces")):
      remove(path)
    record.write(self.record)

  def session(self) -> tuple[int, Path] | None:
    """The newest saved session, and the number of lines before it; None if there is none."""
    found = self._saved()
    return found[-1] if found else None

  def save(self, session: VideoSession, lines: int) -> None:
    """Saves a session after `lines` lines, which must be on disk; removes earlier ones.

    Raises:
      OSError: it cannot be written.
    """
    session.save(self._sessions / f"{lines:09d}.npz")
    for count, path in self._saved():
      if count < lines:
        path.unlink()

  def finish(self, record: Record, lines: int) -> None:
    """Notes that all frames are tracked, and removes the session."""
    dataclasses.replace(record, frames=lines).write(self.record)
    remove(self._sessions)

  @property
  def _sessions(self) -> Path:
    return self.out / f"{self.name}.resume"

  def _saved(self) -> list[tuple[int, Path]]:
    found: list[tuple[int, Path]] = []
    if self._sessions.is_dir():
      for path in self._sessions.iterdir():
        if match := _NAME.fullmatch(path.name):
          found.append((int(match[1]), path))
    return sorted(found)


def remove(path: Path) -> Any:
  """Removes a file or a directory, if it exists."""
  if path.is_dir():
    return shutil.rmtree(path)
  return path.unlink(missing_ok=True)
