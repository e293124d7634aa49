"""The results of a video by frame, in a file, so that memory does not grow with the video.

A line is that of `NAME.tracks.jsonl` (see `outputs/track_lines.py`). A later line of a frame
replaces the earlier one; the file is rewritten when most of it has been replaced.
"""

import json
import threading
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from sam3_jax.outputs.track_lines import line_of
from sam3_jax.outputs.tracked_frame import TrackedFrame
from sam3_jax.utils.atomic_files import json_bytes

_SPARE = 64 * 2**20  # bytes of replaced lines that may remain


class FrameResults:
  """The objects of the tracked frames. Methods may be called from any thread."""

  def __init__(self, path: Path):
    """`path` is of a new file."""
    self._path, self._lock = path, threading.Lock()
    self._file = path.open("x+b")
    self._at: dict[int, tuple[int, int]] = {}  # offset and length of the line of a frame
    self._removed: set[int] = set()
    self._live = 0

  def __len__(self) -> int:
    return len(self._at)

  def close(self) -> None:
    self._file.close()

  def put(
    self, frame: TrackedFrame, ids: Collection[int], phrases: Collection[str | None] = ()
  ) -> dict[str, Any]:
    """Keeps what a prompt or a pass gave on a frame; other objects stay as they are there.

    Args:
      frame: the visible objects of the frame.
      ids, phrases: objects, and phrases whose objects, are as on this frame, or absent.

    Returns:
      All objects of the frame, as `frame_value`.
    """
    row = json.loads(line_of(frame))

    def is_new(one: dict[str, Any]) -> bool:
      return one["id"] in ids or (one.get("phrase") is not None and one["phrase"] in phrases)

    with self._lock:
      before = self._read(frame.index)
      if before is not None:
        kept = [one for one in before["objects"] if not is_new(one)]
        kept += [one for one in row["objects"] if is_new(one)]
        row["objects"] = sorted(kept, key=lambda one: one["id"])
      row = self._shown(row)
      self._write(row)
    return frame_value(row)

  def remove(self, ids: Iterable[int]) -> None:
    """Leaves objects out of all frames; their ids are not given again."""
    with self._lock:
      self._removed.update(ids)

  def get(self, frame: int) -> dict[str, Any] | None:
    """The objects of a frame as `frame_value`; None if it was not tracked."""
    with self._lock:
      row = self._read(frame)
      return None if row is None else frame_value(self._shown(row))

  def export(self, path: Path) -> None:
    """Writes a file of tracks, in the order of frames."""
    with path.open("xb") as file:
      for row in self._rows():
        file.write(json_bytes(row))

  def _rows(self) -> Iterator[dict[str, Any]]:
    for frame in sorted(self._at):
      with self._lock:
        row = self._read(frame)
        if row is not None:
          yield self._shown(row)

  def _read(self, frame: int) -> dict[str, Any] | None:
    if frame not in self._at:
      return None
    offset, length = self._at[frame]
    self._file.seek(offset)
    return json.loads(self._file.read(length))

  def _shown(self, row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "objects": [one for one in row["objects"] if one["id"] not in self._removed]}

  def _write(self, row: dict[str, Any]) -> None:
    data, frame = json_bytes(row), row["frame"]
    end = self._file.seek(0, 2)
    if end > 2 * self._live + _SPARE:
      end = self._rewrite()
    self._file.write(data)
    self._live += len(data) - self._at.get(frame, (0, 0))[1]
    self._at[frame] = end, len(data)

  def _rewrite(self) -> int:
    """Writes the file again with the lines that count; returns its length."""
    path = self._path.with_suffix(".part")
    at, end = {}, 0
    with path.open("wb") as file:
      for frame, (offset, length) in self._at.items():
        self._file.seek(offset)
        file.write(self._file.read(length))
        at[frame] = end, length
        end += length
    self._file.close()
    path.replace(self._path)
    self._file, self._at = self._path.open("r+b"), at
    return self._file.seek(0, 2)


def frame_value(row: dict[str, Any]) -> dict[str, Any]:
  """A line of tracks as `schemas.VideoFrame`: boxes are x0, y0, x1, y1, as in the image API."""
  return {
    "frame": row["frame"],
    "time": row["time"],
    "objects": [
      {
        "id": one["id"],
        "phrase": one.get("phrase"),
        "score": one["score"],
        "box": _corners(one["bbox"]),
        "area": one["area"],
        "mask": one["segmentation"],
      }
      for one in row["objects"]
    ],
  }


def _corners(bbox: list[float]) -> list[float]:
  x, y, width, height = bbox
  return [x, y, round(x + width, 3), round(y + height, 3)]
