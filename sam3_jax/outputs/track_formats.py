"""Converts files of tracks to formats of video datasets: ytvis, coco-vid, mot and davis-png.

The categories are the phrases that found the objects, and "object" for objects of other prompts.
Only the tracked frames are written. Images are named NAME/00012.jpg by the number of their frame in
the video, as YouTube-VIS names them.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from sam3_jax.outputs.rle import decode
from sam3_jax.outputs.track_lines import TrackReader
from sam3_jax.outputs.track_rows import (
  OBJECT,
  category_entries,
  category_numbers,
  image_name,
  visible,
)
from sam3_jax.outputs.ytvis import VideoTracks
from sam3_jax.utils.atomic_files import Draft
from sam3_jax.utils.lease import draft_path
from sam3_jax.utils.os_errors import error_text

_MOST_IDS = 255  # in an indexed PNG; 0 is background
_DAVIS_VIVID = (  # of the palette of DAVIS 2017's annotations; color i is gray i from there on
  (0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (128, 0, 128), (0, 128, 128),
  (128, 128, 128), (64, 0, 0), (191, 0, 0), (64, 128, 0), (191, 128, 0), (64, 0, 128),
  (191, 0, 128), (64, 128, 128), (191, 128, 128), (0, 64, 0), (128, 64, 0), (0, 191, 0),
  (128, 191, 0), (0, 64, 128), (128, 64, 128),
)  # fmt: skip
DAVIS_PALETTE = bytes(
  value for i in range(256) for value in (_DAVIS_VIVID[i] if i < len(_DAVIS_VIVID) else (i,) * 3)
)


def convert_tracks(
  tracks: str | Path, to: str, path: str | Path, *, name: str, category: str = OBJECT
) -> None:
  """Converts a file of tracks. The result appears complete or not at all.

  Objects without a pixel in a frame are left out of that frame.

  Args:
    tracks: the file, NAME.tracks.jsonl.
    to: a key of `FORMATS`.
    path: of the result, such as `NAME` with the suffix of the format.
    name: of the video.
    category: name of the category of objects that no phrase found.

  Raises:
    OSError: the result cannot be written.
    ValueError: the file of tracks cannot be read, the format is unknown or cannot hold the tracks.
  """
  if to not in FORMATS:
    raise ValueError(f"the format {to!r:.40} is unknown; choose one of {', '.join(FORMATS)}.")
  FORMATS[to].write(TrackReader(tracks), Path(path), name, category)


def write_ytvis(tracks: TrackReader, path: Path, name: str, category: str) -> None:
  """Writes a YouTube-VIS annotation file, see `ytvis`; ids of annotations are those of objects.

  As in the results of YouTube-VIS, `score` is that of the object: the mean over its frames. Memory
  grows with the file.
  """
  numbers = category_numbers(tracks.rows(), category)
  found = VideoTracks.of_rows(tracks.size, tracks.rows())
  annotations = []
  for identity, entry in found.annotations():
    number = numbers[found.phrase(identity, category)]
    annotations.append({"id": identity, "video_id": 1, "category_id": number, **entry})
  values = {
    "info": _info(name), "videos": [found.video(1, name)],
    "categories": category_entries(numbers), "annotations": annotations,
  }  # fmt: skip
  with Draft(path) as draft:
    draft.write(_json(values) + b"\n")
    draft.commit()


def write_coco_vid(tracks: TrackReader, path: Path, name: str, category: str) -> None:
  """Writes a COCO file with videos, in the CocoVID style of MMTracking.

  (https://mmtracking.readthedocs.io, "Customize Datasets".) It is a COCO annotation file, which
  pycocotools reads, with `videos`, and with `video_id`, `frame_id` (the number of the frame in the
  video, from 0) of images and `instance_id` of annotations. Ids of images and annotations count
  from 1. `score` is that of the object in the frame, and `time` is in seconds.
  """
  height, width = tracks.size
  numbers = category_numbers(tracks.rows(), category)
  videos = [{"id": 1, "name": name, "width": width, "height": height}]
  head = {"info": _info(name), "categories": category_entries(numbers), "videos": videos}
  with Draft(path) as draft:
    draft.write(_json(head)[:-1])
    for key, values in (
      ("images", _images(tracks, name)),
      ("annotations", _annotations(tracks, numbers, category)),
    ):
      draft.write(f', "{key}": ['.encode())
      for number, value in enumerate(values):
        draft.write((b", " if number else b"") + _json(value))
      draft.write(b"]")
    draft.write(b"}\n")
    draft.commit()


def write_mot(tracks: TrackReader, path: Path, name: str, category: str) -> None:
  """Writes MOTChallenge's text format (https://motchallenge.net/instructions/).

  A line is frame, id, left, top, width, height, score, -1, -1, -1, for each object in each frame.
  Frames and pixels count from 1 there: frame 0 of the video is frame 1, and the corner of the image
  is at 1, 1. Ids must be 1 or more. Masks are not part of the format.
  """
  with Draft(path) as draft:
    for row in tracks.rows():
      for one in visible(row):
        if one["id"] < 1:
          raise ValueError(f"mot has ids from 1, but {tracks.path} has the id {one['id']}.")
        x, y, width, height = one["bbox"]
        values = (round(x + 1, 2), round(y + 1, 2), width, height, one["score"])
        numbers = ",".join(f"{value:.6g}" for value in values)
        draft.write(f"{row['frame'] + 1},{one['id']},{numbers},-1,-1,-1\n".encode())
    draft.commit()


def write_davis(tracks: TrackReader, path: Path, name: str, category: str) -> None:
  """Writes a directory of indexed PNG files, as the annotations of DAVIS 2017.

  (https://davischallenge.org.) 00012.png has the size of frame 12, and its values are the ids of
  objects; 0 is background. A pixel in several objects has the id with the highest score (then the
  lowest id). An existing directory is replaced.
  """
  if path.is_file():
    raise ValueError(f"{path} is a file, but davis-png is a directory: remove it, or name another.")
  draft = draft_path(path)
  try:
    draft.mkdir(parents=True)
    for row in tracks.rows():
      image = Image.fromarray(_index_map(row, tracks.path))
      image.putpalette(DAVIS_PALETTE)
      image.save(draft / f"{row['frame']:05d}.png")
    if path.exists():
      old = draft_path(path)
      path.rename(old)
      draft.rename(path)
      shutil.rmtree(old)
    else:
      draft.rename(path)
  except OSError as error:
    raise OSError(error.errno, error_text(error), str(path)) from error
  finally:
    shutil.rmtree(draft, ignore_errors=True)


class TrackFormat(NamedTuple):
  """A format: the end of its file's name, and the function that writes it."""

  suffix: str
  write: Callable[[TrackReader, Path, str, str], None]


FORMATS = {
  "ytvis": TrackFormat(".ytvis.json", write_ytvis),
  "coco-vid": TrackFormat(".coco-vid.json", write_coco_vid),
  "mot": TrackFormat(".mot.txt", write_mot),
  "davis-png": TrackFormat(".davis", write_davis),
}


def _images(tracks: TrackReader, name: str) -> Iterator[dict[str, Any]]:
  for number, row in enumerate(tracks.rows(), start=1):
    height, width = row["size"]
    yield {
      "id": number, "video_id": 1, "frame_id": row["frame"], "time": row["time"],
      "file_name": image_name(name, row["frame"]), "width": width, "height": height,
    }  # fmt: skip


def _annotations(
  tracks: TrackReader, numbers: dict[str, int], category: str
) -> Iterator[dict[str, Any]]:
  number = 0
  for image, row in enumerate(tracks.rows(), start=1):
    for one in visible(row):
      number += 1
      yield {
        "id": number, "image_id": image, "video_id": 1,
        "category_id": numbers[one.get("phrase", category)], "iscrowd": 0,
        "instance_id": one["id"], "score": one["score"], "bbox": one["bbox"],
        "area": one["area"], "segmentation": one["segmentation"],
      }  # fmt: skip


def _index_map(row: dict[str, Any], path: Path) -> UInt8[np.ndarray, "h w"]:
  pixels = np.zeros(row["size"], np.uint8)
  for one in sorted(visible(row), key=lambda one: (one["score"], -one["id"])):  # the best on top
    if not 1 <= one["id"] <= _MOST_IDS:
      raise ValueError(
        f"davis-png has ids from 1 to {_MOST_IDS}, but {path} has the id {one['id']}: use ytvis or "
        "coco-vid."
      )
    pixels[decode(one["segmentation"]) > 0] = one["id"]
  return pixels


def _info(name: str) -> dict[str, Any]:
  return {"description": f"objects tracked by sam3-jax in {name}"}


def _json(values: Any) -> bytes:
  return json.dumps(values, allow_nan=False).encode()
