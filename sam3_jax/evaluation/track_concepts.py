"""Tracks the phrases of annotated videos with a model, from the first frame forward.

The benchmark SA-Co/VEval tracks each phrase alone. Here several phrases share the encoded frames,
which gives the same tracks.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sam3_jax.datasets.video_annotations import Video, VideoPair
from sam3_jax.evaluation.concept_tracks import ConceptTrack, all_pairs
from sam3_jax.inference.video.concept_detector import TOGETHER
from sam3_jax.inputs.tokenizer import clean
from sam3_jax.outputs.rle import Rle, areas, bounds
from sam3_jax.outputs.tracked_frame import TrackedFrame

Progress = Callable[[str, float], None]  # what is done, fraction of the work done so far
# Takes the files of the frames and a list of phrases; yields each frame once. `Sam3.track` is one.
Tracker = Callable[[Sequence[Path], list[Any]], Iterable[TrackedFrame]]


def track_videos(
  track: Tracker,
  videos: Sequence[Video],
  folder: str | Path,
  progress: Progress = lambda what, fraction: None,
) -> Iterator[tuple[Video, list[ConceptTrack]]]:
  """Tracks the pairs of each video; masks are kept as run lengths.

  Args:
    track: see `Tracker`.
    videos: from `video_annotations.read_concepts`.
    folder: directory of the frames.
    progress: called before each group of pairs.

  Yields:
    Each video with its tracks. A track has the score of the first frame in which it is visible, and
    the boxes are those of the masks.

  Raises:
    ValueError: the tracker leaves out a frame, or yields masks of another size.
  """
  total, done = sum(len(all_pairs(video)) for video in videos), 0
  for video in videos:
    tracks: list[ConceptTrack] = []
    pairs = all_pairs(video)
    for start in range(0, len(pairs), TOGETHER):
      chunk = pairs[start : start + TOGETHER]
      progress(
        f"pair {done + 1:,} of {total:,}: {chunk[0].phrase:.40} in {video.name:.40}", done / total
      )
      tracks += track_pairs(track, video, chunk, folder)
      done += len(chunk)
    yield video, tracks


def track_pairs(
  track: Tracker, video: Video, pairs: Sequence[VideoPair], folder: str | Path
) -> list[ConceptTrack]:
  """Tracks several phrases; see `track_videos`."""
  found: dict[tuple[str, int], list[Rle | None]] = {}
  scores: dict[tuple[str, int], float] = {}
  seen = set()
  paths = [Path(folder) / name for name in video.file_names]
  phrases = {clean(pair.phrase): pair.phrase for pair in pairs}  # each is tracked once
  for frame in track(paths, list(phrases.values())):
    if frame.size != (video.height, video.width) or not 0 <= frame.index < len(video):
      raise ValueError(
        f"the tracker yields frame {frame.index} of {frame.size[1]} x {frame.size[0]}, but "
        f"{video.title} has {len(video)} frames of {video.width} x {video.height}."
      )
    seen.add(frame.index)
    for pair in pairs:
      own = frame.of(phrases[clean(pair.phrase)])
      rles = [own.masks.rle(k) for k in range(len(own))]
      pixels, _ = areas(rles, [frame.size] * len(rles))
      for identity, score, rle, count in zip(own.ids, own.scores, rles, pixels, strict=True):
        if count:
          key = pair.phrase, int(identity)
          found.setdefault(key, [None] * len(video))[frame.index] = rle
          scores.setdefault(key, float(str(score)))  # the digits that distinguish float32
  if len(seen) != len(video):
    raise ValueError(
      f"the tracker yields {len(seen)} of the {len(video)} frames of {video.title}; it must yield "
      "each of them once."
    )
  return [
    ConceptTrack(
      -1 if pair.category is None else pair.category,
      scores[key],
      tuple(masks),
      tuple(None if rle is None else bounds(rle) for rle in masks),
    )
    for pair in pairs
    for key, masks in sorted(found.items())
    if key[0] == pair.phrase
  ]
