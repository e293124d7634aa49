"""Frames with tracked rectangles, for the tests of files of tracks."""

import numpy as np

from sam3_jax.outputs.instances import Instances
from sam3_jax.outputs.masks import RleMasks
from sam3_jax.outputs.rle import encode
from sam3_jax.outputs.track_lines import TrackWriter
from sam3_jax.outputs.tracked_frame import TrackedFrame

SIZE = (48, 80)


def mask(x0, y0, x1, y1):
  found = np.zeros(SIZE, bool)
  found[y0:y1, x0:x1] = True
  return found


def tracked(index, ids=(1, 2, 7), rate=25, phrases=()) -> TrackedFrame:
  """A frame with squares that move; object 7 is hidden in even frames."""
  masks = []
  for one in ids:
    x, y = (4 * one + index) % 60, 3 * one % 30
    hidden = one == 7 and index % 2 == 0
    masks.append(mask(x, y, x + 12, y + 10) if not hidden else np.zeros(SIZE, bool))
  boxes = [[x.min(), y.min(), x.max() + 1, y.max() + 1] if len(x) else [0] * 4
           for y, x in map(np.nonzero, masks)]  # fmt: skip
  scores = np.array([0.9 - 0.1 * k for k in range(len(ids))], np.float32)
  rles = RleMasks([encode(one) for one in masks], SIZE)
  boxes = np.array(boxes, np.float32).reshape(-1, 4)
  found = Instances(np.array(ids), scores, boxes, rles)
  return TrackedFrame(index, index / rate, SIZE, found, phrases)


def write_tracks(path, indices=range(6), **options):
  with TrackWriter(path) as tracks:
    for i in indices:
      tracks.write(tracked(i, **options))
  return path


# Lines of tracks
