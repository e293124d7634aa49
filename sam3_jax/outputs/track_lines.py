"""Files NAME.tracks.jsonl: the objects of a video, one line of JSON for each frame.

A line is {"frame": 12, "time": 0.48, "size": [height, width], "objects": [...]}; an object is
{"id", "score", "bbox", "area", "segmentation"} as in the COCO files of `segment`: `bbox` is x, y,
width, height in pixels, clipped to the frame, and `segmentation` is compressed RLE, which
pycocotools reads. An object that a phrase found also has that "phrase". Lines are in the order in
which frames were tracked.
"""

from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np

from sam3_jax.outputs.coco_json import entries
from sam3_jax.outputs.instances import Instances
from sam3_jax.outputs.masks import RleMasks
from sam3_jax.outputs.rle import areas
from sam3_jax.outputs.tracked_frame import TrackedFrame
from sam3_jax.utils.atomic_files import json_bytes, sync
from sam3_jax.utils.json_text import parse
from sam3_jax.utils.os_errors import error_text, reason

SUFFIX = ".tracks.jsonl"


def line_of(frame: TrackedFrame) -> bytes:
  """The line of a frame, with its newline. Equal frames give equal bytes."""
  return json_bytes(row_of(frame))


def row_of(frame: TrackedFrame) -> dict[str, Any]:
  """The JSON values of the line of a frame."""
  objects = entries(frame.instances, frame.size)
  for one, phrase in zip(objects, frame.phrases, strict=bool(frame.phrases)):
    if phrase is not None:
      one["phrase"] = phrase
  return {
    "frame": int(frame.index),
    "time": round(float(frame.time), 6),
    "size": [int(side) for side in frame.size],
    "objects": objects,
  }


class TrackWriter:
  """Writes a file of tracks; each line is passed to the operating system as its frame is written.

  with TrackWriter(path, keep=500) as tracks:  # continues after 500 frames
    tracks.write(frame)

  A killed process leaves at most one incomplete line, which a later `keep` cuts off.

  Attributes:
    path: of the file.
    frames: number of lines.
  """

  def __init__(self, path: str | Path, keep: int = 0):
    """Opens the file, which is created with its directory if needed.

    Args:
      path: of the file.
      keep: complete lines to keep of an existing file; the others are cut off.

    Raises:
      OSError: the file cannot be written.
      ValueError: the file has fewer lines than `keep`.
    """
    self.path, self.frames = Path(path), keep
    try:
      self.path.parent.mkdir(parents=True, exist_ok=True)
      self._file: BinaryIO = self.path.open("r+b" if self.path.exists() else "w+b", buffering=0)
    except OSError as error:
      raise OSError(error.errno, error_text(error), str(self.path)) from error
    try:
      offset = _end_of_line(self.path, keep)
      self._file.truncate(offset)
      self._file.seek(offset)
    except BaseException:
      self._file.close()
      raise

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def write(self, frame: TrackedFrame) -> None:
    """Appends the line of a frame; raises OSError, such as if the disk is full."""
    data = memoryview(line_of(frame))
    try:
      while data:
        data = data[self._file.write(data) :]
    except OSError as error:
      raise OSError(error.errno, error_text(error), str(self.path)) from error
    self.frames += 1

  def sync(self) -> None:
    """Syncs the lines to disk, as before a checkpoint that refers to them."""
    try:
      sync(self._file.fileno())
    except OSError as error:
      raise OSError(error.errno, error_text(error), str(self.path)) from error

  def close(self) -> None:
    self._file.close()


class TrackReader:
  """Reads a file of tracks in the order of frames, with little memory.

  If a frame has several lines, the last one counts. An incomplete last line, as of a run that was
  killed, is left out.

  Args:
    path: of the file.

  Attributes:
    frames: numbers of the frames.
    size: height and width of the frames; zeros if there are none.

  Raises:
    ValueError: the file cannot be read, a line is not of this format, or frames differ in size.
  """

  def __init__(self, path: str | Path):
    self.path, self.size = Path(path), (0, 0)
    frames, offsets, offset = array("q"), array("q"), 0
    try:
      with self.path.open("rb") as file:
        for number, line in enumerate(file, start=1):
          if not line.endswith(b"\n"):
            break
          row = self._parse(line, f"line {number:,}")
          size = row["size"][0], row["size"][1]
          if number > 1 and size != self.size:
            raise ValueError(f"line {number:,} of {self.path} has another size than line 1.")
          self.size = size
          frames.append(row["frame"])
          offsets.append(offset)
          offset += len(line)
    except OSError as error:
      raise ValueError(f"{self.path} cannot be read ({reason(error)}).") from error
    last = dict(zip(frames, offsets, strict=True))
    self.frames = sorted(last)
    self._offsets = [last[frame] for frame in self.frames]

  def __len__(self) -> int:
    return len(self.frames)

  def rows(self) -> Iterator[dict[str, Any]]:
    """Yields the JSON values of each line."""
    with self.path.open("rb") as file:
      for frame, offset in zip(self.frames, self._offsets, strict=True):
        file.seek(offset)
        yield self._parse(file.readline(), f"the line of frame {frame}")

  def __iter__(self) -> Iterator[TrackedFrame]:
    return map(_frame, self.rows())

  def _parse(self, line: bytes, what: str) -> dict[str, Any]:
    row = parse(line, f"{what} of {self.path}")
    fault = _fault(row)
    if fault:
      raise ValueError(f"{what} of {self.path} is not of a file of tracks: {fault}.")
    return row


def _end_of_line(path: Path, count: int) -> int:
  """The offset after `count` complete lines."""
  offset, lines = 0, 0
  with path.open("rb") as file:
    while lines < count:
      line = file.readline()
      if not line.endswith(b"\n"):
        raise ValueError(
          f"{path} has only {lines} of the {count} frames to continue after: remove it and the "
          "checkpoint of this run to start again."
        )
      offset, lines = offset + len(line), lines + 1
  return offset


def _fault(row: Any) -> str:
  """What is wrong with a line; "" if nothing is."""
  if not isinstance(row, dict) or not {"frame", "time", "size", "objects"} <= row.keys():
    return "it must have frame, time, size and objects"
  size, objects = row["size"], row["objects"]
  if type(row["frame"]) is not int or row["frame"] < 0:
    return f"its frame is {row['frame']!r:.40}"
  if not (
    isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)
  ):
    return f"its size is {size!r:.40}"
  if not isinstance(objects, list):
    return "its objects must be a list"
  rles = []
  for one in objects:
    if not isinstance(one, dict) or not {"id", "score", "bbox", "segmentation"} <= one.keys():
      return "each object must have id, score, bbox and segmentation"
    if not isinstance(one.get("phrase", ""), str):
      return f"the phrase of object {one['id']!r:.20} is {one['phrase']!r:.40}"
    rle = one["segmentation"]
    if not (
      isinstance(rle, dict)
      and isinstance(rle.get("counts"), str)
      and isinstance(rle.get("size"), list)
    ):
      return f"object {one['id']!r:.20} has no compressed RLE"
    rles.append(rle)
  _, faults = areas(rles, [(size[0], size[1])] * len(rles))
  return next((fault for fault in faults if fault), "")


def _frame(row: dict[str, Any]) -> TrackedFrame:
  size, objects = (row["size"][0], row["size"][1]), row["objects"]
  boxes = np.array([one["bbox"] for one in objects], np.float32).reshape(-1, 4)
  boxes[:, 2:] += boxes[:, :2]
  instances = Instances(
    ids=np.array([one["id"] for one in objects], np.int64),
    scores=np.array([one["score"] for one in objects], np.float32),
    boxes=boxes,
    masks=RleMasks([one["segmentation"] for one in objects], size),
  )
  phrases = tuple(one.get("phrase") for one in objects)
  if not any(phrases):
    phrases = ()
  return TrackedFrame(row["frame"], float(row["time"]), size, instances, phrases)
