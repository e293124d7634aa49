"""Annotated videos with pairs of phrases, for the tests of the evaluation of concepts."""

import json

import numpy as np

from sam3_jax.datasets import video_annotations
from sam3_jax.evaluation.concept_tracks import ConceptTrack
from sam3_jax.outputs.rle import bounds, encode

SIZE, FRAMES = (40, 60), 6
CATEGORIES = {1: "box", 2: "red box", 3: "cloud"}


def rectangle(x0, y0, x1, y1):
  mask = np.zeros(SIZE, bool)
  mask[y0:y1, x0:x1] = True
  return mask


def moving(x, y, step=2, side=10, frames=FRAMES):
  """A square that moves to the right."""
  return [rectangle(x + step * t, y, x + step * t + side, y + side) for t in range(frames)]


def rles(masks):
  return tuple(None if mask is None else encode(mask) for mask in masks)


def track(masks, category=1, score=0.9) -> ConceptTrack:
  own = rles(masks)
  boxes = tuple(None if rle is None else bounds(rle) for rle in own)
  return ConceptTrack(category, score, own, boxes)


def content(objects=(), pairs=((1, 1),), videos=1, frames=FRAMES, **values):
  """An annotation file.

  Args:
    objects: (video, category, masks) of each object.
    pairs: (video, category) of each pair.
    videos: their number, or the values of each video's entry.
    frames: of each video.
    values: replace keys of the file.
  """
  extra = [{}] * videos if isinstance(videos, int) else videos
  base = {
    "videos": [
      {"id": n, "video_name": f"v{n}", "height": SIZE[0], "width": SIZE[1], "length": frames,
       "file_names": [f"v{n}/{t:05d}.png" for t in range(frames)]} | own
      for n, own in enumerate(extra, start=1)
    ],
    "annotations": [
      {"id": i, "video_id": video, "category_id": category, "noun_phrase": CATEGORIES[category],
       "segmentations": list(rles(masks)), "iscrowd": 0}
      for i, (video, category, masks) in enumerate(objects, start=1)
    ],
    "categories": [{"id": number, "name": name} for number, name in CATEGORIES.items()],
    "video_np_pairs": [
      {"id": i, "video_id": video, "category_id": category, "noun_phrase": CATEGORIES[category],
       "num_masklets": sum(one[:2] == (video, category) for one in objects)}
      for i, (video, category) in enumerate(pairs, start=1)
    ],
  }  # fmt: skip
  return base | values


def concepts(folder, *args, notes=None, **values):
  """The concepts of `content`, written and read."""
  path = folder / "truth.json"
  path.write_text(json.dumps(content(*args, **values)))
  return video_annotations.read_concepts(path, notes=notes)
