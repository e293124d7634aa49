"""Reads annotated videos in YouTube-VIS's layout: each object has a mask, or null, in each frame.

An entry of `videos` has an id, `file_names` of its frames, `width` and `height`; one of
`annotations` has an id, a `video_id`, a `category_id` and `segmentations`, one for each frame
(https://youtube-vos.org/dataset/vis/). Masks may have any of COCO's forms. Boxes and areas are not
read: they are those of the masks. SA-Co's video files add `noun_phrase` to the annotations, and
`video_np_pairs` with the phrases of each video, also of absent objects.

All faults are reported together; each names the video and the annotation.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sam3_jax.datasets.annotation_fields import flag_field, integer_field
from sam3_jax.datasets.video_schema import Video, VideoObject
from sam3_jax.inputs.preprocess import displayed_size
from sam3_jax.outputs.rle import MAX_PIXELS, Rle
from sam3_jax.outputs.segmentations import compress_all
from sam3_jax.utils.json_text import parse, shown
from sam3_jax.utils.notes import Notes
from sam3_jax.utils.param_tree import raise_faults

__all__ = ["Video", "VideoObject", "check", "compress_frames", "frame_folder", "read"]

FOLDER = "JPEGImages"  # directory of the frames beside the annotation file, as in YouTube-VIS
LAYOUT = "give a YouTube-VIS file: an object with `videos` and `annotations`."
REMEDY = "Correct the annotation file, or name the right one."
_LISTS = ("videos", "annotations")


def frame_folder(path: str | Path) -> Path:
  """The usual directory of the frames of an annotation file: JPEGImages beside it, or its own."""
  folder = Path(path).parent / FOLDER
  return folder if folder.is_dir() else folder.parent


def read(path: str | Path, *, notes: Notes | None = None) -> list[Video]:
  """Reads the videos of an annotation file, in its order.

  Args:
    path: a JSON file.
    notes: counts annotations that are left out because no frame has a mask; None to issue them as
      warnings.

  Raises:
    FileNotFoundError: no such file.
    ValueError: the file is invalid; the message names the faults.
  """
  kept = Notes() if notes is None else notes
  content = _load(Path(path))
  faults: list[str] = []
  videos = _read_videos(content["videos"], faults)
  categories = _read_categories(content.get("categories"), faults)
  objects: dict[int, list[VideoObject]] = {number: [] for number in videos}
  seen: set[int] = set()
  for index, entry in enumerate(content["annotations"]):
    try:
      video, one = _read_object(entry, index, videos, categories, seen)
    except ValueError as error:
      faults.append(str(error))
      continue
    if any(one.rles):
      objects[video.id].append(one)
    else:
      kept.add("annotations without a mask in any frame, left out", _annotation(one.id, video))
  phrases = _read_phrases(content.get("video_np_pairs"), videos, objects, faults)
  raise_faults(faults, str(path), REMEDY)
  if notes is None:
    kept.warn()
  return [
    dataclasses.replace(video, objects=tuple(objects[number]), phrases=phrases[number])
    for number, video in videos.items()
  ]


def check(videos: Sequence[Video], folder: str | Path) -> list[str]:
  """Lists the frames that are missing, unreadable or of another size than stated, one line each."""
  faults = []
  for video in videos:
    for name in video.file_names:
      path = Path(folder) / name
      try:
        height, width = displayed_size(path)
      except FileNotFoundError:
        faults.append(f"{path}: there is no such frame of {video.title}")
      except (OSError, ValueError) as error:
        faults.append(str(error).rstrip("."))
      else:
        if (height, width) != (video.height, video.width):
          faults.append(video.size_fault(path, width, height))
  return faults


def compress_frames(segmentations: Any, video: Video, what: str) -> tuple[Rle | None, ...]:
  """Validates the masks of an object, one for each frame, and converts them to run lengths.

  Args:
    segmentations: a list of masks in any of COCO's forms, or null.
    video: the video.
    what: the name of the object in messages, such as "annotation 7 of video 'a'".

  Returns:
    Compressed run lengths; None where the object is not visible.

  Raises:
    ValueError: a mask is invalid or has another size, or their number is not that of the frames.
  """
  if not isinstance(segmentations, list) or len(segmentations) != len(video):
    got = len(segmentations) if isinstance(segmentations, list) else shown(segmentations, 40)
    raise ValueError(
      f"{what}: segmentations must be a list with a mask or null for each of {len(video)} frames; "
      f"got {got}"
    )
  visible = [t for t, one in enumerate(segmentations) if one is not None]
  size = video.height, video.width
  found = compress_all([segmentations[t] for t in visible], [size] * len(visible))
  rles: list[Rle | None] = [None] * len(video)
  for t, rle, fault, empty in zip(visible, found.rles, found.faults, found.empty, strict=True):
    if fault:
      raise ValueError(f"{what}, frame {t}: {fault}")
    rles[t] = None if empty else rle
  return tuple(rles)


def _load(path: Path) -> dict[str, Any]:
  if not path.is_file():
    raise FileNotFoundError(f"there is no annotation file {path}: check the path.")
  try:
    content = parse(path.read_bytes(), str(path))
  except ValueError as error:
    raise ValueError(f"{error}; {LAYOUT}") from error
  lists = [content.get(key) if isinstance(content, dict) else None for key in _LISTS]
  if not all(isinstance(one, list) and all(isinstance(e, dict) for e in one) for one in lists):
    raise ValueError(f"{path} is not an annotation file of videos; {LAYOUT}")
  return content


def _read_videos(entries: Sequence[dict[str, Any]], faults: list[str]) -> dict[int, Video]:
  videos: dict[int, Video] = {}
  for index, entry in enumerate(entries):
    try:
      video = _read_video(entry, index)
      if video.id in videos:
        raise ValueError(f"video {video.id}: this id occurs twice")
      videos[video.id] = video
    except ValueError as error:
      faults.append(str(error))
  if not entries:
    faults.append("it has no videos")
  return videos


def _read_video(entry: dict[str, Any], index: int) -> Video:
  number = integer_field(entry, "id", f"video number {index + 1}")
  what = f"video {number}"
  names = entry.get("file_names")
  if not isinstance(names, list) or not names or not all(isinstance(n, str) and n for n in names):
    raise ValueError(f"{what}: file_names must be a list of frames; got {shown(names, 40)}")
  name = entry.get("video_name", entry.get("name", str(Path(names[0]).parent)))
  if not isinstance(name, str):
    raise ValueError(f"{what}: video_name must be a string; got {shown(name, 40)}")
  width, height = (integer_field(entry, key, what) for key in ("width", "height"))
  if min(width, height) < 1 or width * height > MAX_PIXELS:
    raise ValueError(f"{what}: width and height must be positive; got {width} x {height}")
  if "length" in entry and integer_field(entry, "length", what) != len(names):
    raise ValueError(f"{what}: length is {entry['length']}, but file_names has {len(names)} frames")
  return Video(number, name, tuple(names), width, height)


def _read_categories(entries: Any, faults: list[str]) -> dict[int, str]:
  categories: dict[int, str] = {}
  if entries is None:
    return categories
  if not isinstance(entries, list):
    faults.append(f"categories must be a list; got {shown(entries, 40)}")
    return categories
  for entry in entries:
    name = entry.get("name") if isinstance(entry, dict) else None
    if not isinstance(name, str):
      faults.append(f"category {shown(entry, 60)}: it must have an id and a name")
      continue
    try:
      categories[integer_field(entry, "id", f"category {name!r:.40}")] = name
    except ValueError as error:
      faults.append(str(error))
  return categories


def _read_object(
  entry: dict[str, Any],
  index: int,
  videos: dict[int, Video],
  categories: dict[int, str],
  seen: set[int],
) -> tuple[Video, VideoObject]:
  number = integer_field(entry, "id", f"annotation number {index + 1}")
  what = f"annotation {number}"
  if number in seen:
    raise ValueError(f"{what}: this id occurs twice")
  seen.add(number)
  video = _video_of(entry, videos, what)
  what = _annotation(number, video)
  phrase = entry.get("noun_phrase")
  if phrase is None and "category_id" in entry:
    category = integer_field(entry, "category_id", what)
    if category not in categories:
      raise ValueError(f"{what}: there is no category {category}")
    phrase = categories[category]
  if not isinstance(phrase, str | None):
    raise ValueError(f"{what}: noun_phrase must be a string; got {shown(phrase, 40)}")
  rles = compress_frames(entry.get("segmentations"), video, what)
  return video, VideoObject(number, phrase or "", rles, flag_field(entry, "iscrowd", what, False))


def _read_phrases(
  entries: Any,
  videos: dict[int, Video],
  objects: dict[int, list[VideoObject]],
  faults: list[str],
) -> dict[int, tuple[str, ...]]:
  """The phrases of each video: those of `video_np_pairs`, or else those of its objects."""
  found: dict[int, dict[str, None]] = {number: {} for number in videos}
  if entries is not None and not isinstance(entries, list):
    faults.append(f"video_np_pairs must be a list; got {shown(entries, 40)}")
    entries = None
  for index, entry in enumerate(entries or ()):
    what = f"pair number {index + 1} of video_np_pairs"
    try:
      if not isinstance(entry, dict) or not isinstance(entry.get("noun_phrase"), str):
        raise ValueError(f"{what}: it must have a video_id and a noun_phrase")
      found[_video_of(entry, videos, what).id][entry["noun_phrase"]] = None
    except ValueError as error:
      faults.append(str(error))
  if entries is None:
    found = {n: {one.phrase: None for one in own if one.phrase} for n, own in objects.items()}
  return {number: tuple(own) for number, own in found.items()}


def _video_of(entry: dict[str, Any], videos: dict[int, Video], what: str) -> Video:
  number = integer_field(entry, "video_id", what)
  if number not in videos:
    raise ValueError(f"{what}: there is no video {number}")
  return videos[number]


def _annotation(number: int, video: Video) -> str:
  return f"annotation {number} of {video.title}"
