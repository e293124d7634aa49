"""Predicted tracks of videos: reads their files, assigns them to the objects, and scores them.

Two formats are read. A JSON file has YouTube-VIS's format: a list of results, or an object with
`annotations`; each entry has a `video_id` and `segmentations`, one or null for each frame. A file
NAME.tracks.jsonl of `sam3-jax track` has the tracks of the video NAME; its frames are those of the
video, from 0. A directory stands for all such files in it. DAVIS's protocols assign tracks to
objects in two ways: by the `id` of the object's annotation, if the objects were prompted; or the
best way, one to one, so that the sum of J&F is largest.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sam3_jax.datasets.annotation_fields import integer_field
from sam3_jax.datasets.video_annotations import Video, VideoObject, compress_frames
from sam3_jax.evaluation.region_contour import Scores, summary
from sam3_jax.evaluation.tracking import Progress, scorable, score_object
from sam3_jax.outputs.rle import Rle, decode
from sam3_jax.utils.json_text import parse
from sam3_jax.utils.param_tree import raise_faults

Assign = Literal["id", "best"]
Tracks = Mapping[int, Mapping[int, tuple[Rle | None, ...]]]  # by video id, then by track id

LINES = ".tracks.jsonl"  # suffix of the files of `sam3-jax track`
EXPECTED = "give YouTube-VIS results: a list of objects with video_id, id and segmentations."


def read(path: str | Path, videos: Sequence[Video]) -> dict[int, dict[int, tuple[Rle | None, ...]]]:
  """Reads predicted tracks.

  Args:
    path: the file, or a directory of files NAME.tracks.jsonl. In JSON, tracks without an `id` are
      numbered in the order of the file.
    videos: the truth.

  Returns:
    The masks in each frame, by video id and track id; None where an object is not visible.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: the file is invalid; the message names the faults.
  """
  path = Path(path)
  if has_lines(path):
    return _read_lines(path, videos)
  entries = read_entries(path, EXPECTED)
  by_id, faults = {video.id: video for video in videos}, []
  found: dict[int, dict[int, tuple[Rle | None, ...]]] = {}
  for index, entry in enumerate(entries):
    try:
      video_id, number, rles = _read_track(entry, index, by_id)
      if number in found.setdefault(video_id, {}):
        raise ValueError(f"track {number} of {by_id[video_id].title}: this id occurs twice")
      found[video_id][number] = rles
    except ValueError as error:
      faults.append(str(error))
  raise_faults(faults, str(path), "Correct the file, or give the one for these videos.")
  return found


def has_lines(path: Path) -> bool:
  """Whether predictions are files of `sam3-jax track`, one for each video."""
  return path.is_dir() or path.name.endswith(LINES)


def read_entries(path: Path, expected: str) -> list[dict[str, Any]]:
  """The entries of a JSON file of predictions, which is a list or has `annotations`.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it has no such list; `expected` is the remedy.
  """
  if not path.is_file():
    raise FileNotFoundError(f"there is no file of predictions {path}: check the path.")
  content = parse(path.read_bytes(), str(path))
  entries = content.get("annotations") if isinstance(content, dict) else content
  if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
    raise ValueError(f"{path} has no predictions; {expected}")
  return entries


def score(
  videos: Sequence[Video],
  tracks: Tracks,
  assign: Assign = "id",
  *,
  exclude_ends: bool = True,
  progress: Progress | None = None,
) -> dict[str, Any]:
  """Scores tracks; an object without a track has empty masks.

  Args:
    videos: the truth; crowds are left out.
    tracks: from `read`.
    assign: how tracks are assigned to objects.
    exclude_ends: leave out the first frame in which an object is visible, which was prompted, and
      the last frame of the video.
    progress: called with the name of a video and the fraction of the work done.

  Returns:
    The numbers of `videos`, `objects` and `tracks`, and `region_contour.summary` as `predictions`.

  Raises:
    ValueError: there are no objects to score, or `assign` is "id" and a track has the id of no
      object.
  """
  found: list[Scores] = []
  scored = [(video, scorable(video, exclude_ends)) for video in videos]
  scored = [(video, objects) for video, objects in scored if objects]
  if not scored:
    raise ValueError(f"none of the {len(videos)} videos has an object to score; give others.")
  if assign == "id":
    _check_ids(videos, tracks)
  for done, (video, objects) in enumerate(scored):
    if progress is not None:
      progress(video.name, done / len(scored))
    own = tracks.get(video.id, {})
    if assign == "id":
      found += [
        _score(video, one, own.get(one.id, (None,) * len(video)), exclude_ends) for one in objects
      ]
    else:
      found += _best(video, objects, list(own.values()), exclude_ends)
  return {
    "videos": len(scored),
    "objects": len(found),
    "tracks": sum(len(own) for own in tracks.values()),
    "predictions": summary(found),
  }


def read_lines(
  path: Path, videos: Sequence[Video]
) -> Iterator[tuple[Path, Video, list[tuple[str, int, list[dict[str, Any]]]]]]:
  """Reads the files of `sam3-jax track`: one, or all in a directory.

  Yields:
    A file, its video, and for each frame the name of its last line, which counts if both passes
    tracked the frame, the number of the frame and its objects.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: there is no such video, or a line is invalid.
  """
  files = sorted(path.glob(f"*{LINES}")) if path.is_dir() else [path]
  if not files or not files[0].is_file():
    raise FileNotFoundError(f"there is no file of tracks {path}; check the path.")
  by_name = {video.name: video for video in videos}
  for file in files:
    name = file.name.removesuffix(LINES)
    if name not in by_name:
      raise ValueError(f"{file}: there is no video {name!r:.60} in the annotation file.")
    last: dict[int, tuple[str, int, list[dict[str, Any]]]] = {}
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
      what = f"line {number} of {file}"
      frame, objects = _read_line(line, by_name[name], what)
      last[frame] = what, frame, objects
    yield file, by_name[name], list(last.values())


def _read_line(line: bytes, video: Video, what: str) -> tuple[int, list[dict[str, Any]]]:
  """The number of a frame and its objects."""
  row = parse(line, what)
  objects = row.get("objects") if isinstance(row, dict) else None
  if not isinstance(objects, list) or not all(isinstance(one, dict) for one in objects):
    raise ValueError(f"{what} must be an object with frame and objects.")
  frame = integer_field(row, "frame", what)
  if not 0 <= frame < len(video):
    raise ValueError(f"{what}: there is no frame {frame}; {video.title} has {len(video)} frames.")
  return frame, objects


def _read_lines(
  path: Path, videos: Sequence[Video]
) -> dict[int, dict[int, tuple[Rle | None, ...]]]:
  """Reads the files of tracks of `sam3-jax track`."""
  found: dict[int, dict[int, tuple[Rle | None, ...]]] = {}
  for file, video, lines in read_lines(path, videos):
    masks: dict[int, list[Any]] = {}
    for what, frame, objects in lines:
      for one in objects:
        identity = integer_field(one, "id", what)
        masks.setdefault(identity, [None] * len(video))[frame] = one.get("segmentation")
    found[video.id] = {
      identity: compress_frames(several, video, f"{file}: track {identity}")
      for identity, several in masks.items()
    }
  return found


def _read_track(
  entry: dict[str, Any], index: int, videos: Mapping[int, Video]
) -> tuple[int, int, tuple[Rle | None, ...]]:
  what = f"prediction number {index + 1}"
  number = integer_field(entry, "id", what) if "id" in entry else index + 1
  video_id = integer_field(entry, "video_id", what)
  if video_id not in videos:
    raise ValueError(f"{what}: there is no video {video_id}")
  video = videos[video_id]
  what = f"track {number} of {video.title}"
  return video_id, number, compress_frames(entry.get("segmentations"), video, what)


def _check_ids(videos: Sequence[Video], tracks: Tracks) -> None:
  for video in videos:
    ids = {one.id for one in video.objects}
    for number in tracks.get(video.id, ()):
      if number not in ids:
        raise ValueError(
          f"track {number} of {video.title} is the id of none of its {len(ids)} annotations; give "
          "the objects' ids, or assign the best track to each object (--assign best)."
        )


def _best(
  video: Video,
  objects: Sequence[VideoObject],
  tracks: Sequence[tuple[Rle | None, ...]],
  exclude_ends: bool,
) -> list[Scores]:
  """The scores of each object with its track, assigned so that the sum of J&F is largest."""
  from scipy.optimize import linear_sum_assignment

  spare = [(None,) * len(video)] * len(objects)  # for objects without a track
  table = [[_score(video, one, own, exclude_ends) for own in (*tracks, *spare)] for one in objects]
  means = np.array([[cell.mean for cell in row] for row in table])
  rows, columns = linear_sum_assignment(means, maximize=True)
  return [table[row][column] for row, column in zip(rows, columns, strict=True)]


def _score(
  video: Video, one: VideoObject, rles: Sequence[Rle | None], exclude_ends: bool
) -> Scores:
  masks = [None if rle is None else decode(rle).astype(bool) for rle in rles]
  return score_object(video, one, masks, exclude_ends)
