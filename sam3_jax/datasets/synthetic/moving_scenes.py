"""Composes moving scenes: videos of drawings, with the exact visible mask of each object per frame.

Objects move, turn, grow and shrink; they pass behind each other and behind occluders, and some
leave the image and return. The camera may pan over the background. Frames are rendered on access,
so that a video of any length needs little memory.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, UInt8

from sam3_jax.datasets.synthetic import drawings
from sam3_jax.datasets.synthetic.augment import Sprite, sprite
from sam3_jax.datasets.synthetic.backgrounds import background
from sam3_jax.datasets.synthetic.motion import Meeting, Motion, pan, sample_motion
from sam3_jax.datasets.synthetic.moving_layers import (
  CHECKED,
  NOBODY,
  Layer,
  Owners,
  Stack,
  overlap,
  paste,
)
from sam3_jax.datasets.synthetic.occluders import occluder
from sam3_jax.datasets.synthetic.phrase_sampling import Phrase, sample_phrases
from sam3_jax.datasets.synthetic.scenes import SIZES, SMALLEST, sample_kinds

MAX_OBJECTS = 6
MIN_SIDE, MAX_SIDE = 0.14, 0.5  # an object's longer side relative to the image's shorter side
_ATTEMPTS = 6  # to find a motion for an object
_MEETING, _OCCLUDED = 0.6, 0.6  # probabilities of crossing objects, and of occluders


class Frame(NamedTuple):
  """A frame of a video.

  Attributes:
    image: RGB.
    owners: index of the object that is visible at each pixel, -1 for none.
    occluded: whether another object or an occluder hides a pixel of an object.
  """

  image: UInt8[np.ndarray, "h w 3"]
  owners: Owners
  occluded: bool = False

  def mask(self, index: int) -> Bool[np.ndarray, "h w"]:
    """The visible pixels of an object; empty if it is hidden or outside the image."""
    return self.owners == index


@dataclasses.dataclass(frozen=True)
class MovingScene:
  """A video and its objects.

  Attributes:
    size: height and width in pixels.
    length: number of frames.
    concepts: the concept of each object, from back to front.
    kinds: the name of each object's path.
    style: the artist of the drawings.
  """

  size: tuple[int, int]
  length: int
  concepts: tuple[int, ...]
  kinds: tuple[str, ...]
  style: str
  _backdrop: UInt8[np.ndarray, "H W 3"]
  _camera: Int[np.ndarray, "t 2"]
  _layers: tuple[Layer, ...]

  def __len__(self) -> int:
    return self.length

  def __getitem__(self, t: int) -> Frame:
    """Renders a frame; raises IndexError unless `t` is in 0 .. length - 1."""
    if not 0 <= t < self.length:
      raise IndexError(f"frame {t} of {self.length}")
    (height, width), (x, y) = self.size, self._camera[t]
    image = self._backdrop[y : y + height, x : x + width].copy()
    owners = np.full(self.size, NOBODY, np.int8)
    index, occluded = 0, False
    for layer in self._layers:
      owner, place = NOBODY if layer.concept is None else index, layer.place(t, self._camera[t])
      target, inside = overlap(place, self.size)
      occluded |= bool((owners[target][place[0].mask[inside]] != NOBODY).any())
      paste(image, owners, place, owner)
      index += layer.concept is not None
    return Frame(image, owners, occluded)

  def __iter__(self) -> Iterator[Frame]:
    return (self[t] for t in range(self.length))

  def phrases(
    self,
    rng: np.random.Generator,
    *,
    absent: float = 1.0,
    usual: float = 0.7,
    unseen: bool = False,
  ) -> list[Phrase]:
    """Phrases with the objects that match; see `phrase_sampling.sample_phrases`."""
    return sample_phrases(rng, self.concepts, absent=absent, usual=usual, unseen=unseen)


def compose(
  rng: np.random.Generator,
  styles: Sequence[str] = drawings.TRAINING,
  size: tuple[int, int] | None = None,
  frames: int = 24,
  *,
  augment: float = 0.0,
  objects: int | None = None,
) -> MovingScene:
  """Composes a random moving scene.

  Args:
    rng: random generator; determines the scene.
    styles: artists from drawings.STYLES; one of them is chosen for all objects.
    size: height and width in pixels, at least 64; None for a random one of `scenes.SIZES`.
    frames: number of frames, at least 2.
    augment: strength of changes of color and shape, in [0, 1].
    objects: number of objects to aim for; None for a random number up to 6. There are fewer if they
      would hide each other, but at least one.

  Raises:
    ValueError: an unknown style, the size is too small, or there are too few frames.
  """
  size = SIZES[int(rng.integers(len(SIZES)))] if size is None else size
  if min(size) < SMALLEST:
    raise ValueError(
      f"a scene's size must be at least {SMALLEST} x {SMALLEST} pixels; got {size[0]} x {size[1]}."
    )
  if frames < 2:
    raise ValueError(f"a moving scene needs at least 2 frames; got {frames}.")
  style = styles[int(rng.integers(len(styles)))]
  camera = pan(rng, size, frames)
  width, height = camera.max(axis=0) + size[::-1]
  backdrop = background(rng, int(height), int(width))
  stack = Stack(size, camera)
  while not stack.objects:  # tiny objects may have no opaque pixel
    for concept, share in _plan(rng, objects):
      one = sprite(rng, drawings.drawings(style)[concept], concept, augment)
      _add_object(rng, stack, concept, one, share * min(size))
      if stack.objects and rng.random() < _OCCLUDED / 2:
        _add_occluder(rng, stack)
  return MovingScene(
    size=size,
    length=frames,
    concepts=tuple(layer.concept for layer in stack.layers if layer.concept is not None),
    kinds=tuple(layer.motion.kind for layer in stack.layers if layer.concept is not None),
    style=style,
    _backdrop=backdrop,
    _camera=camera,
    _layers=tuple(stack.layers),
  )


def _plan(rng: np.random.Generator, objects: int | None) -> list[tuple[int, float]]:
  """Samples the concepts of the objects, from back to front, and their relative sizes."""
  kinds = sample_kinds(rng)
  chance = [0.1, 0.2, 0.25, 0.2, 0.15, 0.1]
  count = int(rng.choice(MAX_OBJECTS, p=chance)) + 1 if objects is None else objects
  wanted = [kinds[int(rng.integers(len(kinds)))] for _ in range(count)]
  largest = min(MAX_SIDE, 1.1 / np.sqrt(count))
  return [(concept, float(rng.uniform(MIN_SIDE, largest))) for concept in wanted]


def _add_object(
  rng: np.random.Generator, stack: Stack, concept: int, one: Sprite, side: float
) -> None:
  """Adds an object with a motion that hides none too much, or leaves it out."""
  for attempt in range(_ATTEMPTS):
    meeting = None
    if stack.objects and rng.random() < _MEETING and attempt < _ATTEMPTS - 2:
      meeting = _meeting(rng, stack)
    motion = sample_motion(rng, stack.size, stack.frames, side, meeting)
    if stack.add(Layer(concept, one, motion, motion.kind == "still")):
      return
    side = max(0.9 * side, MIN_SIDE * min(stack.size))


def _meeting(rng: np.random.Generator, stack: Stack) -> Meeting:
  """A point of an object's path in the middle of the video."""
  other = stack.objects[int(rng.integers(len(stack.objects)))]
  middle = min(stack.frames, 2 * CHECKED)
  t = int(rng.integers(max(1, middle // 3), max(2, 2 * middle // 3)))
  x, y = other.motion.xy[t] - (stack.camera[t] if other.fixed else 0)
  return Meeting(float(x), float(y), t)


def _add_occluder(rng: np.random.Generator, stack: Stack) -> None:
  """Adds an occluder on the path of an object, if it hides none too much."""
  patch, at = occluder(rng, *stack.size), _meeting(rng, stack)
  xy = np.tile(np.array(at[:2]) + stack.camera[at.frame], (stack.frames, 1))
  flat = np.zeros(stack.frames)
  height, width = patch.mask.shape
  # Posts span the image, whatever the camera does.
  center = np.array([stack.size[1], stack.size[0]]) / 2
  for axis, extent in enumerate((width, height)):
    if extent == stack.size[1 - axis]:
      xy[:, axis] = center[axis] + stack.camera[:, axis]
  stack.add(Layer(None, patch, Motion(np.round(xy, 3), flat, flat, "occluder"), True))
