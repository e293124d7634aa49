"""Predicted tracks of concepts: reads their files, and converts them to results.

Two formats are read. A JSON file has the format of SA-Co/VEval: a list of results, or an object
with `annotations`; each has a `video_id`, a `category_id`, a `score` and `segmentations`, a mask or
null for each frame, and it may have `bboxes`. A file NAME.tracks.jsonl of `sam3-jax track --text`
has the tracks of the video NAME, each with its phrase; a directory stands for all such files in it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sam3_jax.datasets.annotation_fields import integer_field
from sam3_jax.datasets.video_annotations import Video, VideoPair, compress_frames
from sam3_jax.datasets.video_boxes import read_boxes
from sam3_jax.evaluation.track_predictions import has_lines, read_entries, read_lines
from sam3_jax.outputs.rle import Box, Rle, areas
from sam3_jax.utils.json_text import shown
from sam3_jax.utils.notes import Notes
from sam3_jax.utils.param_tree import raise_faults
from sam3_jax.utils.validation import are_finite

EXPECTED = "give a list of results with video_id, category_id, score and segmentations."
_ABSENT: Box = (0.0, 0.0, 0.0, 0.0)  # box where an object is not visible, as in Meta's results


@dataclasses.dataclass(frozen=True, slots=True)
class ConceptTrack:
  """A predicted object of a phrase.

  Attributes:
    category: the `category_id` of the phrase.
    score: in [0, 1].
    rles: its mask in each frame; None where it is not visible.
    boxes: x, y, width, height in pixels in each frame; None where it is not visible.
  """

  category: int
  score: float
  rles: tuple[Rle | None, ...]
  boxes: tuple[Box | None, ...]


Tracks = Mapping[int, Sequence[ConceptTrack]]  # by video id, in the order of the file


def all_pairs(video: Video) -> list[VideoPair]:
  """The pairs of a video, with those that only its objects have at the end, each once."""
  pairs = {pair.category: pair for pair in reversed(video.pairs)}
  ordered = {pair.category: pairs[pair.category] for pair in video.pairs}
  for one in video.objects:
    if one.category is not None:
      ordered.setdefault(one.category, VideoPair(one.category, one.phrase))
  return list(ordered.values())


def read(
  path: str | Path, videos: Sequence[Video], notes: Notes | None = None
) -> dict[int, list[ConceptTrack]]:
  """Reads predicted tracks.

  Args:
    path: the file, or a directory of files NAME.tracks.jsonl.
    videos: from `video_annotations.read_concepts`.
    notes: counts the tracks that are left out, as their video and phrase are not a pair.

  Returns:
    The tracks by video id, in the order of the file.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: the file is invalid; the message names the faults.
  """
  path, kept = Path(path), Notes() if notes is None else notes
  found = _read_lines(path, videos) if has_lines(path) else _read_results(path, videos)
  categories = {video.id: {pair.category for pair in all_pairs(video)} for video in videos}
  for number, several in found.items():
    own = [one for one in several if one.category in categories[number]]
    left_out = len(several) - len(own)
    kept.add("tracks without a pair of their video and phrase, left out", count=left_out)
    found[number] = own
  if notes is None:
    kept.warn()
  return found


def to_results(video: int, tracks: Sequence[ConceptTrack]) -> list[dict[str, Any]]:
  """The tracks of a video as JSON values in the format of SA-Co/VEval."""
  results = []
  for one in tracks:
    visible = [rle for rle in one.rles if rle is not None]
    pixels, _ = areas(visible, [tuple(rle["size"]) for rle in visible])
    counts = iter(pixels.tolist())
    results.append(
      {
        "video_id": video,
        "category_id": one.category,
        "score": one.score,
        "segmentations": list(one.rles),
        "bboxes": [list(_ABSENT if box is None else box) for box in one.boxes],
        "areas": [0 if rle is None else next(counts) for rle in one.rles],
      }
    )
  return results


def _read_results(path: Path, videos: Sequence[Video]) -> dict[int, list[ConceptTrack]]:
  entries = read_entries(path, EXPECTED)
  by_id, faults = {video.id: video for video in videos}, []
  found: dict[int, list[ConceptTrack]] = {}
  for index, entry in enumerate(entries):
    try:
      number, track = _read_result(entry, f"prediction number {index + 1}", by_id)
      found.setdefault(number, []).append(track)
    except ValueError as error:
      faults.append(str(error))
  raise_faults(faults, str(path), "Correct the file, or give the one for these videos.")
  return found


def _read_result(
  entry: dict[str, Any], what: str, videos: Mapping[int, Video]
) -> tuple[int, ConceptTrack]:
  number = integer_field(entry, "video_id", what)
  if number not in videos:
    raise ValueError(f"{what}: there is no video {number}")
  what = f"{what} of {videos[number].title}"
  category, score = integer_field(entry, "category_id", what), _score(entry, what)
  rles = compress_frames(entry.get("segmentations"), videos[number], what)
  _check_absent(entry, what)
  boxes = read_boxes(entry.get("bboxes"), rles, what)
  return number, ConceptTrack(category, score, rles, boxes)


def _score(entry: dict[str, Any], what: str) -> float:
  value: Any = entry.get("score")
  if not are_finite([value]) or not 0 <= value <= 1:
    raise ValueError(f"{what}: score must be a number in [0, 1]; got {shown(value, 40)}")
  return float(value)


def _check_absent(entry: dict[str, Any], what: str) -> None:
  """Raises ValueError if a frame has a box but null for the mask."""
  boxes = entry.get("bboxes")
  if isinstance(boxes, list):
    for t, (mask, box) in enumerate(zip(entry["segmentations"], boxes, strict=False)):
      if mask is None and isinstance(box, list) and any(box):
        raise ValueError(f"{what}, frame {t}: it has the box {shown(box, 40)}, but no mask")


def _read_lines(path: Path, videos: Sequence[Video]) -> dict[int, list[ConceptTrack]]:
  """Reads the files of `sam3-jax track`; a track has the best score of its frames."""
  found: dict[int, list[ConceptTrack]] = {}
  for file, video, lines in read_lines(path, videos):
    categories = {pair.phrase: pair.category for pair in all_pairs(video)}
    masks: dict[tuple[int, int], list[Any]] = {}
    scores: dict[tuple[int, int], float] = {}
    for what, frame, objects in lines:
      for one in objects:
        identity, score = integer_field(one, "id", what), _score(one, what)
        if not isinstance(phrase := one.get("phrase"), str):
          raise ValueError(
            f"{what}: object {identity} has no phrase; give the tracks of `sam3-jax track --text`."
          )
        if (category := categories.get(phrase)) is None:
          category = -1  # no pair has it, so that `read` leaves it out
        key = category, identity
        masks.setdefault(key, [None] * len(video))[frame] = one.get("segmentation")
        scores[key] = max(scores.get(key, 0.0), score)
    tracks = found[video.id] = []
    for (category, identity), several in masks.items():
      rles = compress_frames(several, video, f"{file}: track {identity}")
      boxes = read_boxes(None, rles, "")
      tracks.append(ConceptTrack(category, scores[category, identity], rles, boxes))
  return found
