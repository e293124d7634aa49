"""Reads annotated videos in YouTube-VIS's layout: each object has a mask, or null, in each frame.

An entry of `videos` has an id, `file_names` of its frames, `width` and `height`; one of
`annotations` has an id, a `video_id`, a `category_id` and `segmentations`, one for each frame
(https://youtube-vos.org/dataset/vis/). Masks may have any of COCO's forms. Boxes and areas are not
read, except by `read_concepts`: they are those of the masks. SA-Co's video files (SA-Co/VEval) add
`noun_phrase` to the annotations, and `video_np_pairs` with the phrases of each video, also those of
absent objects. Moving scenes add `occluded` to the videos.

All faults are reported together; each names the video and the annotation.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sam3_jax.datasets.annotation_fields import flag_field, integer_field
from sam3_jax.datasets.video_boxes import read_boxes
from sam3_jax.datasets.video_pairs import find_video, note_missing, phrases_of, read_pairs
from sam3_jax.datasets.video_schema import Video, VideoObject, VideoPair
from sam3_jax.inputs.preprocess import displayed_size
from sam3_jax.outputs.rle import MAX_PIXELS, Rle
from sam3_jax.outputs.segmentations import compress_all
from sam3_jax.utils.json_text import parse, shown
from sam3_jax.utils.notes import Notes
from sam3_jax.utils.param_tree import raise_faults

__all__ = [
  "Concepts", "Video", "VideoObject", "VideoPair", "check", "compress_frames", "frame_folder",
  "read", "read_concepts",
]  # fmt: skip

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
  return _read(path, notes, boxes=False).videos


class Concepts(NamedTuple):
  """The videos of a file with `video_np_pairs`, and its categories in their order."""

  videos: list[Video]
  categories: dict[int, str]


def read_concepts(path: str | Path, *, notes: Notes | None = None) -> Concepts:
  """Reads an annotation file for the evaluation of concepts, with boxes and categories.

  Args:
    path: a JSON file in the layout of SA-Co/VEval. A file without `video_np_pairs` is read as by
      `read`: no video has pairs.
    notes: as for `read`; also counts pairs that announce another number of objects than the file
      has, as files do whose annotations are kept secret.

  Raises:
    FileNotFoundError: no such file.
    ValueError: the file is invalid; the message names the faults.
  """
  found = _read(path, notes, boxes=True)
  if any(video.pairs for video in found.videos):
    faults = [
      f"the pair of {video.title} and {pair.phrase!r:.60} has no category_id"
      for video in found.videos
      for pair in video.pairs
      if pair.category is None
    ]
    faults += [
      f"{_annotation(one.id, video)} has no category_id"
      for video in found.videos
      for one in video.objects
      if one.category is None
    ]
    raise_faults(faults, str(path), REMEDY)
  return found


def _read(path: str | Path, notes: Notes | None, boxes: bool) -> Concepts:
  kept = Notes() if notes is None else notes
  content = _load(Path(path))
  boxes = boxes and bool(content.get("video_np_pairs"))
  faults: list[str] = []
  videos = _read_videos(content["videos"], faults)
  categories = _read_categories(content.get("categories"), faults)
  objects: dict[int, list[VideoObject]] = {number: [] for number in videos}
  seen: set[int] = set()
  for index, entry in enumerate(content["annotations"]):
    try:
      video, one = _read_object(entry, index, videos, categories, seen, boxes)
    except ValueError as error:
      faults.append(str(error))
      continue
    if any(one.rles):
      objects[video.id].append(one)
    else:
      kept.add("annotations without a mask in any frame, left out", _annotation(one.id, video))
  pairs = read_pairs(content.get("video_np_pairs"), videos, categories, faults)
  raise_faults(faults, str(path), REMEDY)
  complete = [
    dataclasses.replace(
      video,
      objects=tuple(objects[number]),
      phrases=phrases_of(objects[number], None if pairs is None else pairs[number]),
      pairs=() if pairs is None else tuple(pairs[number]),
    )
    for number, video in videos.items()
  ]
  if boxes:
    note_missing(content["video_np_pairs"], complete, kept)
  if notes is None:
    kept.warn()
  return Concepts(complete, categories)


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
  occluded = flag_field(entry, "occluded", what, False) if "occluded" in entry else None
  return Video(number, name, tuple(names), width, height, occluded=occluded)


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
  with_boxes: bool,
) -> tuple[Video, VideoObject]:
  number = integer_field(entry, "id", f"annotation number {index + 1}")
  what = f"annotation {number}"
  if number in seen:
    raise ValueError(f"{what}: this id occurs twice")
  seen.add(number)
  video = find_video(entry, videos, what)
  what = _annotation(number, video)
  phrase, category = entry.get("noun_phrase"), None
  if "category_id" in entry and (phrase is None or entry["category_id"] is not None):
    category = integer_field(entry, "category_id", what)
  if phrase is None and category is not None:
    if category not in categories:
      raise ValueError(f"{what}: there is no category {category}")
    phrase = categories[category]
  if not isinstance(phrase, str | None):
    raise ValueError(f"{what}: noun_phrase must be a string; got {shown(phrase, 40)}")
  rles = compress_frames(entry.get("segmentations"), video, what)
  crowd = flag_field(entry, "iscrowd", what, False)
  boxes = read_boxes(entry.get("bboxes"), rles, what) if with_boxes else ()
  return video, VideoObject(number, phrase or "", rles, crowd, category, boxes)


def _annotation(number: int, video: Video) -> str:
  return f"annotation {number} of {video.title}"
