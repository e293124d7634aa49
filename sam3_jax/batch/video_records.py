"""The record of a video in a part: a line about the video, then a line for each of its frames.

  {"input": 3, "video": "a/b.mp4", "width": 640, "height": 480, "file": {...},
   "phrases": ["player", "ball"], "frames": 120, "notes": [...],
   "objects": [{"id": 1, "phrase": "player", "score": 0.91, "frames": 118}]}
  {"input": 3, "frame": 0, "time": 0.0, "size": [480, 640], "objects": [...]}

`frames` of an object is the number of frames in which it has pixels. The lines of frames are those
of `outputs.track_lines`, with the index of the video in the list.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sam3_jax.batch.files import Draft
from sam3_jax.batch.part_files import PARTS, identity_to_json
from sam3_jax.outputs.track_lines import row_of
from sam3_jax.outputs.tracked_frame import TrackedFrame
from sam3_jax.utils.atomic_files import json_bytes
from sam3_jax.utils.identity import FileIdentity


class VideoRecord:
  """The record of a video that is being tracked.

  Its lines are in a temporary file beside the part, so memory does not grow with the video. Leaving
  `with` removes the file. If the process is killed, the next one that does the part removes it.

  Attributes:
    frames: number of frames so far.
    objects: number of objects so far.
  """

  def __init__(self, out: Path, part: int, index: int):
    """Opens the temporary file.

    Args:
      out: output directory of the job.
      part: number of the part.
      index: of the video in the list.

    Raises:
      OSError: it cannot be written; says how to resume the job.
    """
    self._index, self.frames, self._objects = index, 0, dict[int, dict[str, Any]]()
    self._lines = Draft(out / PARTS / f"part-{part:06}.tracks.jsonl")

  def __enter__(self) -> "VideoRecord":
    return self

  def __exit__(self, *_: object) -> None:
    self._lines.discard()

  @property
  def objects(self) -> int:
    return len(self._objects)

  def add(self, frame: TrackedFrame) -> None:
    """Appends the line of a frame; raises OSError."""
    row = row_of(frame)
    for one in row["objects"]:
      new = {key: one[key] for key in ("id", "phrase", "score") if key in one} | {"frames": 0}
      self._objects.setdefault(one["id"], new)["frames"] += bool(one["area"])
    self._lines.write(json_bytes({"input": self._index, **row}))
    self.frames += 1

  def pieces(
    self,
    name: str,
    size: tuple[int, int],
    identity: FileIdentity,
    phrases: list[str],
    notes: list[str],
  ) -> Iterator[bytes]:
    """The whole record, in pieces.

    Args:
      name: of the video.
      size: height and width of the frames.
      identity: of the file that was read.
      phrases: the prompts.
      notes: what was unexpected in the file, such as that it is truncated.
    """
    height, width = size
    yield json_bytes(
      {
        "input": self._index,
        "video": name,
        "width": width,
        "height": height,
        "file": identity_to_json(identity),
        "phrases": phrases,
        "frames": self.frames,
        **({"notes": notes} if notes else {}),
        "objects": [self._objects[identity] for identity in sorted(self._objects)],
      }
    )
    yield from self._lines.pieces()


@dataclasses.dataclass(frozen=True)
class VideoLines:
  """A video of a finished part: the values of its first line, and its frames, read once."""

  about: dict[str, Any]
  rows: Iterator[dict[str, Any]]


def split_videos(lines: Iterator[dict[str, Any]]) -> Iterator[VideoLines]:
  """Splits the lines of parts into videos. Rows that were not read are skipped.

  Raises:
    ValueError: a line is missing.
  """

  def rows(about: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for _ in range(about["frames"]):
      row = next(lines, None)
      if row is None or row.get("input") != about["input"] or "frame" not in row:
        raise ValueError(
          f"the record of {about['video']} has fewer frames than it says; remove its part and run "
          "batch again."
        )
      yield row

  for about in lines:
    video = VideoLines(about, rows(about))
    yield video
    for _ in video.rows:
      pass
