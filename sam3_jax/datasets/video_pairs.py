"""The pairs of videos and phrases in annotation files: `video_np_pairs`, as in SA-Co/VEval."""

from collections.abc import Mapping, Sequence
from typing import Any

from sam3_jax.datasets.annotation_fields import integer_field
from sam3_jax.datasets.video_schema import Video, VideoObject, VideoPair
from sam3_jax.utils.json_text import shown
from sam3_jax.utils.notes import Notes


def read_pairs(
  entries: Any, videos: Mapping[int, Video], categories: Mapping[int, str], faults: list[str]
) -> dict[int, list[VideoPair]] | None:
  """The pairs of each video, each once; None if the file has no list of pairs."""
  if entries is None:
    return None
  if not isinstance(entries, list):
    faults.append(f"video_np_pairs must be a list; got {shown(entries, 40)}")
    return None
  by_name = {name: number for number, name in categories.items()}
  found: dict[int, dict[VideoPair, None]] = {number: {} for number in videos}
  for index, entry in enumerate(entries):
    what = f"pair number {index + 1} of video_np_pairs"
    try:
      if not isinstance(entry, dict) or not isinstance(entry.get("noun_phrase"), str):
        raise ValueError(f"{what}: it must have a video_id and a noun_phrase")
      phrase, video = entry["noun_phrase"], find_video(entry, videos, what)
      category = by_name.get(phrase)
      if "category_id" in entry:
        category = integer_field(entry, "category_id", what)
      found[video.id][VideoPair(category, phrase)] = None
    except ValueError as error:
      faults.append(str(error))
  return {number: list(own) for number, own in found.items()}


def phrases_of(
  objects: Sequence[VideoObject], pairs: Sequence[VideoPair] | None
) -> tuple[str, ...]:
  """The phrases of a video: those of its pairs, or else those of its objects."""
  phrases = [one.phrase for one in (objects if pairs is None else pairs)]
  return tuple(dict.fromkeys(phrase for phrase in phrases if phrase or pairs is not None))


def note_missing(entries: Sequence[Any], videos: Sequence[Video], notes: Notes) -> None:
  """Notes the pairs that announce another number of objects than are annotated."""
  by_id = {video.id: video for video in videos}
  for entry in entries:
    video, count = by_id[int(entry["video_id"])], entry.get("num_masklets")
    own = sum(one.phrase == entry["noun_phrase"] for one in video.objects)
    if type(count) is int and count != own:
      example = f"{entry['noun_phrase']!r:.40} of {video.title} has {own}, not {count}"
      notes.add("pairs with another number of objects than their num_masklets", example)


def find_video(entry: dict[str, Any], videos: Mapping[int, Video], what: str) -> Video:
  number = integer_field(entry, "video_id", what)
  if number not in videos:
    raise ValueError(f"{what}: there is no video {number}")
  return videos[number]
