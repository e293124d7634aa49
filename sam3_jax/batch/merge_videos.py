"""Merges the parts of a job of videos into one YouTube-VIS file, or into a file of tracks each.

The parts are read three times, so that memory does not grow with the number of videos: at most the
tracks of one video are in memory.
"""

from array import array
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

from sam3_jax.batch.export_names import ExportNames, relative_parts
from sam3_jax.batch.files import Draft, remove_drafts
from sam3_jax.batch.job_files import part_count, read_job, write_errors
from sam3_jax.batch.merge import ANNOTATIONS, Records, write_list
from sam3_jax.batch.video_records import VideoLines, split_videos
from sam3_jax.inputs.video_listing import VIDEO_SUFFIXES
from sam3_jax.outputs.track_lines import SUFFIX
from sam3_jax.outputs.track_rows import category_entries, image_name
from sam3_jax.outputs.ytvis import VideoTracks
from sam3_jax.utils.atomic_files import json_bytes

TRACKS = "tracks"  # directory of the files of tracks


def merge_videos(out: Path) -> dict[str, int]:
  """Writes OUT/annotations.json, in YouTube-VIS's format; the same parts give the same bytes.

  The id of a video is its position in the list, from 1; videos that failed are left out. Its name
  is that of its file without the suffix. Categories are the phrases, in order of first occurrence.
  Objects that have no pixel in any frame are left out. As in SA-Co's video files, annotations have
  their `noun_phrase`, and `video_np_pairs` has the phrases of each video, also those that found
  nothing.

  Returns:
    The numbers of videos, annotations, categories and failures.

  Raises:
    FileNotFoundError: `out` has no results.
    ValueError: parts are missing, damaged, or belong to another job.
    OSError: the file cannot be written.
  """
  job = read_job(out)
  merged = _Merged(Records(out, job))
  remove_drafts(out, lambda name: name.startswith("annotations."))
  failed = write_errors(out, range(part_count(job)))
  info = {"description": f"sam3-jax {version('sam3-jax')}"}
  info |= {key: job[key] for key in ("checkpoint", "dtype")}
  with Draft(out / ANNOTATIONS) as draft:
    draft.write(b'{"info": ' + json_bytes(info).rstrip())
    write_list(draft, "videos", merged.videos())
    write_list(draft, "categories", category_entries(merged.categories))
    write_list(draft, "annotations", merged.annotations())
    write_list(draft, "video_np_pairs", merged.pairs())
    draft.write(b"}\n")
    draft.commit()
  return {
    "videos": merged.count, "annotations": merged.annotated, "failed": failed,
    "categories": len(merged.categories),
  }  # fmt: skip


def write_tracks(out: Path) -> Path:
  """Writes OUT/tracks/NAME.tracks.jsonl for each video, as `sam3-jax track` does.

  Returns:
    The directory.

  Raises:
    ValueError, OSError: as `merge_videos`.
  """
  folder, names = out / TRACKS, ExportNames(SUFFIX)
  for video in split_videos(iter(Records(out, read_job(out)))):
    path = folder / _name(video, names)
    with Draft(path) as draft:
      for row in video.rows:
        del row["input"]
        draft.write(json_bytes(row))
      draft.commit()
  return folder


class _Merged:
  """The lists of a merged file.

  Attributes:
    categories: numbers of the phrases, from 1.
    count, annotated: numbers of the videos and annotations that were written.
  """

  def __init__(self, records: Records):
    """Reads the phrases of all videos."""
    self._records, self.categories = records, dict[str, int]()
    self.count = self.annotated = 0
    self._pairs = array("q")  # video, category and number of objects, for each phrase of a video
    for about in (video.about for video in split_videos(iter(records))):
      found: dict[str, int] = dict.fromkeys(about["phrases"], 0)
      for one in about["objects"]:
        found[one["phrase"]] += bool(one["frames"])
      for phrase, count in found.items():
        number = self.categories.setdefault(phrase, len(self.categories) + 1)
        self._pairs.extend((about["input"] + 1, number, count))

  def videos(self) -> Iterator[dict[str, Any]]:
    names = ExportNames(SUFFIX)
    for video in split_videos(iter(self._records)):
      self.count += 1
      about, name = video.about, str(_name(video, names)).removesuffix(SUFFIX)
      frames = [(row["frame"], row["time"]) for row in video.rows]
      yield {
        "id": about["input"] + 1, "width": about["width"], "height": about["height"],
        "length": len(frames), "name": name, "file": about["video"],
        "file_names": [image_name(name, frame) for frame, _ in frames],
        "times": [time for _, time in frames],
      }  # fmt: skip

  def annotations(self) -> Iterator[dict[str, Any]]:
    for video in split_videos(iter(self._records)):
      about = video.about
      tracks = VideoTracks.of_rows((about["height"], about["width"]), video.rows)
      for identity, entry in tracks.annotations():
        self.annotated += 1
        phrase = tracks.phrase(identity)
        yield {
          "id": self.annotated, "video_id": about["input"] + 1,
          "category_id": self.categories[phrase], "noun_phrase": phrase, "identity": identity,
          **entry,
        }  # fmt: skip

  def pairs(self) -> Iterator[dict[str, Any]]:
    phrases = list(self.categories)
    for at in range(0, len(self._pairs), 3):
      video, number, count = self._pairs[at : at + 3]
      yield {
        "id": at // 3 + 1, "video_id": video, "category_id": number,
        "noun_phrase": phrases[number - 1], "num_masklets": count,
      }  # fmt: skip


def _name(video: VideoLines, names: ExportNames) -> PurePosixPath:
  """The name of the file of tracks of a video, relative to the directory of all."""
  path = PurePosixPath(*relative_parts(PurePosixPath(video.about["video"])))
  # Names of directories of frames may have dots, but no suffix.
  return names.of(path, has_suffix=path.suffix.lower() in VIDEO_SUFFIXES)[0]
