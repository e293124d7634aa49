"""The open videos of all sessions, each with a directory that is deleted with it.

A video is known by the hash of its id, and belongs to the session in which it was uploaded, as
images do (see `server/store.py`).
"""

import contextlib
import dataclasses
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sam3_jax.inputs.video_source import VideoSource
from sam3_jax.server.errors import ApiError, busy
from sam3_jax.server.settings import Settings
from sam3_jax.server.store_files import hashed, new_id
from sam3_jax.server.video.results import FrameResults

_IDLE_SECONDS = 600.0  # after which a video may give way to another one


@dataclasses.dataclass(eq=False)
class StoredVideo:
  """An open video.

  Attributes:
    key: hash of its id.
    owner: hash of its session; "" if it was uploaded without one.
    directory: of its file, its results and exports.
    source: its frames.
    results: of the frames that were tracked.
    used: when it was used last, in seconds since the epoch.
    session: the `VideoSession`, which the thread of the device creates and uses.
    running: what is being tracked; None for nothing.
    closed: whether it was deleted.
    objects, phrases: of the session, as of its last step.
  """

  key: str
  owner: str
  directory: Path
  source: VideoSource
  results: FrameResults
  used: float
  session: Any = None
  running: Any = None
  closed: bool = False
  objects: list[int] = dataclasses.field(default_factory=list)
  phrases: list[str] = dataclasses.field(default_factory=list)

  def note(self) -> None:
    """Notes the objects and phrases of the session; for the thread of the device."""
    self.objects = self.session.objects
    self.phrases = [phrase for phrase in self.session.phrases if phrase is not None]

  def close(self) -> None:
    """Closes the session and deletes the files; for the thread of the device."""
    if self.session is not None:
      self.session.close()
      self.session = None
    self.results.close()
    shutil.rmtree(self.directory, ignore_errors=True)


class VideoStore:
  """The videos. Methods may be called from any thread."""

  def __init__(self, directory: Path, settings: Settings, close: Callable[[StoredVideo], object]):
    """Starts nothing yet.

    Args:
      directory: for the directories of videos; what is in it is deleted.
      settings: of the server.
      close: called with a video that is no longer in the store.
    """
    self._directory, self._settings, self._close = directory, settings, close
    self._videos: dict[str, StoredVideo] = {}
    self._lock, self._arriving = threading.RLock(), 0
    self._stopping = threading.Event()
    self._thread = threading.Thread(target=self._expire, name="sam3-videos", daemon=True)
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(mode=0o700, parents=True)

  def __len__(self) -> int:
    return len(self._videos)

  def start(self) -> None:
    """Starts the thread that deletes videos that were not used for a long time."""
    self._thread.start()

  def stop(self) -> None:
    """Deletes everything."""
    self._stopping.set()
    for stored in list(self._videos.values()):
      self.remove(stored)
    if self._thread.ident is not None:
      self._thread.join()

  @contextlib.contextmanager
  def arriving(self) -> Iterator[Path]:
    """A new directory for an upload, which is deleted unless `add` was called with it.

    Raises:
      ApiError: too many videos are open.
    """
    with self._lock:
      if len(self._videos) + self._arriving >= self._settings.max_videos:
        self._make_room()
      self._arriving += 1
    directory = self._directory / new_id()
    try:
      directory.mkdir(mode=0o700)
      yield directory
    finally:
      with self._lock:
        self._arriving -= 1
        kept = any(one.directory == directory for one in self._videos.values())
      if not kept:
        shutil.rmtree(directory, ignore_errors=True)

  def add(self, directory: Path, source: VideoSource, session: str | None) -> str:
    """Adds a video; returns its new id."""
    identity = new_id()
    stored = StoredVideo(
      key=hashed(identity),
      owner=hashed(session) if session else "",
      directory=directory,
      source=source,
      results=FrameResults(directory / "results.jsonl"),
      used=time.time(),
    )
    with self._lock:
      self._videos[stored.key] = stored
    return identity

  def find(self, identity: str, session: str | None) -> StoredVideo:
    """A video of this session, or of none; raises ApiError if there is none."""
    with self._lock:
      stored = self._videos.get(hashed(identity))
      if stored is None or (stored.owner and stored.owner != (hashed(session) if session else "")):
        raise unknown()
      stored.used = time.time()
      return stored

  def remove(self, stored: StoredVideo) -> None:
    """Removes a video, and closes it."""
    with self._lock:
      if self._videos.pop(stored.key, None) is None:
        return
      stored.closed = True
    self._close(stored)

  def _make_room(self) -> None:
    """Removes the video that was not used for longest, if that is long enough."""
    idle = [one for one in self._videos.values() if one.running is None]
    oldest = min(idle, key=lambda one: one.used, default=None)
    if oldest is None or time.time() - oldest.used < _IDLE_SECONDS:
      count = len(self._videos) + self._arriving
      raise busy(60, f"{count} videos are open, as many as this server takes; close one")
    self.remove(oldest)

  def _expire(self) -> None:
    seconds = self._settings.video_expire_seconds
    while not self._stopping.wait(min(60.0, seconds / 4)):
      for stored in list(self._videos.values()):
        if stored.running is None and time.time() - stored.used > seconds:
          self.remove(stored)


def unknown() -> ApiError:
  """The error for an id that no video has."""
  return ApiError(
    "unknown_video", "there is no video with this id in this session; upload the video again."
  )
