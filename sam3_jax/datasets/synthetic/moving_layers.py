"""Layers of moving scenes: objects and occluders, and what is visible of each object."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from sam3_jax.datasets.synthetic.augment import Patch, Sprite, pose
from sam3_jax.datasets.synthetic.motion import Motion

VISIBLE = 0.5  # an object is well visible in a frame if at least this fraction of it is
WELL_VISIBLE = 0.5  # minimal fraction of the frames in which each object is well visible
CHECKED = 48  # frames in which visibility is checked; all of them in shorter videos
NOBODY = -1  # owner of a pixel without an object

Owners = Int[np.ndarray, "h w"]
Place = tuple[Patch, tuple[int, int]]  # with its top and left in the image


class Layer(NamedTuple):
  """Something in front of the background: an object, or an occluder, which has no concept."""

  concept: int | None
  drawn: Sprite | Patch
  motion: Motion
  fixed: bool  # to the background, so that the camera's pan moves it

  def place(self, t: int, camera: Int[np.ndarray, "2"]) -> Place:
    """What is drawn in frame `t`."""
    xy = self.motion.xy[t] - (camera if self.fixed else 0)
    if isinstance(self.drawn, Sprite):
      return pose(self.drawn, self.motion.side[t], self.motion.angle[t], xy)
    rows, columns = self.drawn.mask.shape
    left, top = np.rint(xy - np.array([columns, rows]) / 2).astype(int)
    return self.drawn, (int(top), int(left))


def paste(image: UInt8[np.ndarray, "h w 3"], owners: Owners, place: Place, owner: int) -> None:
  """Draws a patch into an image, and its owner into the owners of the pixels."""
  patch, _ = place
  target, inside = overlap(place, owners.shape)
  pixels, below = patch.pixels[inside], image[target]
  transparency = 255 - pixels[..., 3:].astype(np.uint16)
  blended = pixels[..., :3] + (below * transparency + 127) // 255
  np.minimum(blended, 255, out=below, casting="unsafe")
  owners[target][patch.mask[inside]] = owner


def overlap(place: Place, size: Sequence[int]) -> tuple[Any, Any]:
  """Indices of the part of a patch that is inside the image: in the image, and in the patch."""
  patch, (top, left) = place
  (rows, columns), (height, width) = patch.mask.shape, size
  y0, x0, y1, x1 = max(0, top), max(0, left), min(height, top + rows), min(width, left + columns)
  y1, x1 = max(y0, y1), max(x0, x1)
  return np.s_[y0:y1, x0:x1], np.s_[y0 - top : y1 - top, x0 - left : x1 - left]


class Stack:
  """Layers from back to front, and what is visible of each object.

  Attributes:
    layers: objects and occluders.
    objects: the layers that are objects.
  """

  def __init__(self, size: tuple[int, int], camera: Int[np.ndarray, "t 2"]):
    self.size, self.camera = size, camera
    self.frames = len(camera)
    count = min(self.frames, CHECKED)
    self._checked = np.unique(np.linspace(0, self.frames - 1, count).round().astype(int)).tolist()
    self.layers: list[Layer] = []
    self._owners = np.full((len(self._checked), *size), NOBODY, np.int8)
    # Opaque and visible pixels of each object in each checked frame.
    self._full, self._seen = np.zeros((2, 0, len(self._checked)), np.int64)

  @property
  def objects(self) -> list[Layer]:
    return [layer for layer in self.layers if layer.concept is not None]

  def add(self, layer: Layer) -> bool:
    """Adds a layer on top; returns False if an object would be too little visible."""
    count, owner = len(self._full), NOBODY
    full, seen, drawn = self._full, self._seen.copy(), []
    for k, t in enumerate(self._checked):
      place = layer.place(t, self.camera[t])
      target, inside = overlap(place, self.size)
      mask = place[0].mask[inside]
      seen[:, k] -= np.bincount(self._owners[k][target][mask] + 1, minlength=count + 1)[1:]
      drawn.append((target, mask, int(place[0].mask.sum())))
    if layer.concept is not None:
      owner = count
      full = np.concatenate([full, [[pixels for *_, pixels in drawn]]])
      seen = np.concatenate([seen, [[mask.sum() for _, mask, _ in drawn]]])
    if not full.all() or not _visible(seen / np.maximum(full, 1)).all():
      return False
    for k, (target, mask, _) in enumerate(drawn):
      self._owners[k][target][mask] = owner
    self.layers.append(layer)
    self._full, self._seen = full, seen
    return True


def _visible(fractions: Float[np.ndarray, "n t"]) -> Bool[np.ndarray, " n"]:
  """Which objects are visible enough: long enough, and well in the first frame unless absent."""
  first = fractions[:, 0]
  return ((fractions >= VISIBLE).mean(axis=1) >= WELL_VISIBLE) & ((first == 0) | (first >= VISIBLE))
