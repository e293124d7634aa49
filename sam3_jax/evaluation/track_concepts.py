"""Tracks the phrases of annotated videos with a model, as the benchmark SA-Co/VEval does: each
phrase alone, from the first frame forward."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sam3_jax.datasets.video_annotations import Video, VideoPair
from sam3_jax.evaluation.concept_tracks import ConceptTrack, all_pairs
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
    progress: called before each pair.

  Yields:
    Each video with its tracks. A track has the score of the first frame in which it is visible, and
    the boxes are those of the masks.

  Raises:
    ValueError: the tracker leaves out a frame, or yields masks of another size.
  """
  total, done = sum(len(all_pairs(video)) for video in videos), 0
  for video in videos:
    tracks: list[ConceptTrack] = []
    for pair in all_pairs(video):
      progress(
        f"pair {done + 1:,} of {total:,}: {pair.phrase:.40} in {video.name:.40}", done / total
      )
      tracks += track_pair(track, video, pair, folder)
      done += 1
    yield video, tracks


def track_pair(
  track: Tracker, video: Video, pair: VideoPair, folder: str | Path
) -> list[ConceptTrack]:
  """Tracks one phrase; see `track_videos`."""
  found: dict[int, list[Rle | None]] = {}
  scores: dict[int, float] = {}
  seen = set()
  paths = [Path(folder) / name for name in video.file_names]
  for frame in track(paths, [pair.phrase]):
    if frame.size != (video.height, video.width) or not 0 <= frame.index < len(video):
      raise ValueError(
        f"the tracker yields frame {frame.index} of {frame.size[1]} x {frame.size[0]}, but "
        f"{video.title} has {len(video)} frames of {video.width} x {video.height}."
      )
    seen.add(frame.index)
    own = frame.of(pair.phrase)
    rles = [own.masks.rle(k) for k in range(len(own))]
    pixels, _ = areas(rles, [frame.size] * len(rles))
    for identity, score, rle, count in zip(own.ids, own.scores, rles, pixels, strict=True):
      if count:
        found.setdefault(int(identity), [None] * len(video))[frame.index] = rle
        scores.setdefault(int(identity), float(str(score)))  # the digits that distinguish float32
  if len(seen) != len(video):
    raise ValueError(
      f"the tracker yields {len(seen)} of the {len(video)} frames of {video.title}; it must yield "
      "each of them once."
    )
  category = -1 if pair.category is None else pair.category
  return [
    ConceptTrack(
      category,
      scores[identity],
      tuple(masks),
      tuple(None if rle is None else bounds(rle) for rle in masks),
    )
    for identity, masks in sorted(found.items())
  ]
