"""Exports the results of a video: tracks, formats of datasets, and the video with its objects."""

import asyncio
import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path

from fastapi import Request
from fastapi.responses import FileResponse
from starlette.background import BackgroundTask

from sam3_jax.outputs import video_overlay
from sam3_jax.outputs.track_formats import FORMATS, convert_tracks
from sam3_jax.outputs.track_lines import SUFFIX, TrackReader
from sam3_jax.server.disconnect import in_pool
from sam3_jax.server.errors import ApiError
from sam3_jax.server.store_files import new_id
from sam3_jax.server.video.store import StoredVideo

OVERLAY, TRACKS = "overlay", "tracks"
_MEDIA_TYPES = {
  TRACKS: "application/x-ndjson", "ytvis": "application/json", "coco-vid": "application/json",
  "mot": "text/plain", OVERLAY: "video/mp4",
}  # fmt: skip


class Exporter:
  """Writes exports, one at a time, as an overlay takes all cores."""

  def __init__(self):
    self._pool = ThreadPoolExecutor(1, "sam3-export")
    self._stopping = threading.Event()

  def close(self) -> None:
    self._stopping.set()
    self._pool.shutdown(wait=True, cancel_futures=True)

  async def export(
    self, request: Request, stored: StoredVideo, form: str, name: str
  ) -> FileResponse:
    """A file with the results.

    Args:
      request: of the client, whose disconnection ends the work.
      stored: the video.
      form: one of `schemas.ExportFormat`.
      name: of the video, for the names in the file and of it.

    Raises:
      ApiError: no frame was tracked.
    """
    if not len(stored.results):
      raise ApiError("conflict", "there are no results to export; add an object and track it.")
    gone, stem = threading.Event(), Path(name).stem or "video"
    part = stored.directory / new_id()
    arguments = (stored, form, stem, part, lambda: gone.is_set() or self._stopping.is_set())
    try:
      path = await in_pool(request, self._pool, _write, *arguments)
    except BaseException:
      gone.set()
      raise
    suffix = {TRACKS: SUFFIX, OVERLAY: video_overlay.SUFFIX}.get(form) or FORMATS[form].suffix
    return FileResponse(
      path, media_type=_MEDIA_TYPES[form], filename=f"{stem}{suffix}",
      background=BackgroundTask(asyncio.to_thread, path.unlink, missing_ok=True),
    )  # fmt: skip


def _write(stored: StoredVideo, form: str, name: str, part: Path, cancelled) -> Path:
  """Writes an export; returns its path."""
  if cancelled() or stored.closed:
    raise CancelledError
  tracks = part.with_name(part.name + SUFFIX)
  try:
    stored.results.export(tracks)
    if form == TRACKS:
      return tracks
    path = part.with_name(part.name + (video_overlay.SUFFIX if form == OVERLAY else ".out"))
    if form == OVERLAY:

      def check(_: int) -> None:
        if cancelled() or stored.closed:
          raise CancelledError

      video_overlay.write_overlay(stored.source, TrackReader(tracks), path, check)
    else:
      convert_tracks(tracks, form, path, name=name)
    return path
  except ValueError as error:
    raise ApiError("conflict", f"the results cannot be written as {form}: {error}") from None
  finally:
    if form != TRACKS:
      tracks.unlink(missing_ok=True)
