"""Composes scenes: images of drawings, with the exact visible mask of each object.

At least as hard as the fixed scenes of the published results: 1 to 12 objects of 8 to 60 % of the
shorter side, each at least half visible, on patterns and photographs.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, UInt8

from sam3_jax.datasets.synthetic import drawings
from sam3_jax.datasets.synthetic.augment import Patch, render
from sam3_jax.datasets.synthetic.backgrounds import background
from sam3_jax.datasets.synthetic.phrase_sampling import Phrase, lookalikes, sample_phrases

SIZES = ((240, 320), (320, 240), (256, 256), (224, 400), (288, 288), (400, 224))  # height, width
SMALLEST = 64  # minimal side of an image in pixels
MIN_SIDE, MAX_SIDE = 0.08, 0.6  # an object's longer side relative to the image's shorter side
MAX_OBJECTS = 12
MIN_VISIBLE = 0.5  # minimal visible fraction of each object
VARIETY = 0.08  # fraction of scenes with many different concepts
NEW, NEW_LOOKALIKE = 0.5, 0.2  # fractions of scenes with a new concept, and with a similar one
_ATTEMPTS = 8  # to find a position for an object


class Item(NamedTuple):
  """An object: the index of its concept, and its visible mask."""

  concept: int
  mask: Bool[np.ndarray, "h w"]


@dataclasses.dataclass(frozen=True)
class Scene:
  """An image and its objects.

  Attributes:
    image: RGB.
    objects: from back to front, with disjoint masks.
    visible: the visible fraction of each object; the rest is occluded or outside the image.
    style: the artist of the drawings, or "mixed".
  """

  image: UInt8[np.ndarray, "h w 3"]
  objects: tuple[Item, ...]
  visible: tuple[float, ...]
  style: str


def compose(
  rng: np.random.Generator,
  styles: Sequence[str] = drawings.TRAINING,
  size: tuple[int, int] | None = None,
  *,
  mixed: float = 0.0,
  augment: float = 0.0,
  variety: float = VARIETY,
  new: int | None = None,
) -> Scene:
  """Composes a random scene.

  Args:
    rng: random generator; determines the scene.
    styles: artists from drawings.STYLES; one of them is chosen for all objects.
    size: height and width in pixels, at least 64; None for a random one of SIZES.
    mixed: probability of a scene in which each object has its own artist.
    augment: strength of changes of color and shape, in [0, 1].
    variety: probability of a scene of many different concepts.
    new: index of a new concept, which about half of the scenes show; None for none.

  Raises:
    ValueError: an unknown style, or the size is too small.
  """
  height, width = SIZES[int(rng.integers(len(SIZES)))] if size is None else size
  if min(height, width) < SMALLEST:
    raise ValueError(
      f"a scene's size must be at least {SMALLEST} x {SMALLEST} pixels; got {height} x {width}."
    )
  canvas = _Canvas(background(rng, height, width))
  mix = rng.random() < mixed
  artist = styles[int(rng.integers(len(styles)))]
  while not canvas.items:  # tiny objects may have no opaque pixel
    plan = _plan(rng, variety)
    for concept, share in plan if new is None else _with_new(rng, plan, new):
      artist = styles[int(rng.integers(len(styles)))] if mix else artist
      drawing = drawings.drawings(artist)[concept]
      _add_object(rng, canvas, drawing, concept, share * min(height, width), augment)
  return Scene(
    image=canvas.image,
    objects=tuple(
      Item(concept, canvas.owners == number) for number, concept in enumerate(canvas.items)
    ),
    visible=tuple(float(seen / full) for seen, full in zip(canvas.seen, canvas.full, strict=True)),
    style="mixed" if mix else artist,
  )


def phrases(
  rng: np.random.Generator,
  scene: Scene,
  *,
  absent: float = 1.0,
  usual: float = 0.7,
  unseen: bool = False,
  new: int | None = None,
) -> list[Phrase]:
  """Phrases for a scene with the objects that match; see `phrase_sampling.sample_phrases`."""
  present = [concept for concept, _ in scene.objects]
  return sample_phrases(rng, present, absent=absent, usual=usual, unseen=unseen, new=new)


def _plan(rng: np.random.Generator, variety: float) -> list[tuple[int, float]]:
  """Samples the concepts of the objects, from back to front, and their relative sizes."""
  if rng.random() < variety:
    number = len(drawings.concepts())
    wanted = list(rng.choice(number, rng.integers(4, MAX_OBJECTS + 1), replace=False))
  else:
    kinds = sample_kinds(rng)
    crowd = rng.random() < 0.1
    counts = [rng.choice([1, 1, 1, 1, 2, 2, 2, 3, 3, 4, 5, 6]) for _ in kinds]
    counts[0] = rng.integers(7, MAX_OBJECTS + 1) if crowd else counts[0]
    wanted = list(rng.permutation(np.repeat(kinds, counts))[:MAX_OBJECTS])
  largest = min(MAX_SIDE, 1.7 / np.sqrt(len(wanted)))
  if rng.random() < 0.5:
    shares = rng.uniform(MIN_SIDE, largest, len(wanted))
  else:  # similar sizes
    shares = rng.uniform(MIN_SIDE, largest) * rng.uniform(0.7, 1.3, len(wanted))
  return [(int(concept), share) for concept, share in zip(wanted, shares, strict=True)]


def _with_new(
  rng: np.random.Generator, plan: list[tuple[int, float]], new: int
) -> list[tuple[int, float]]:
  """Replaces a concept of the plan by a new one or a similar one, or leaves the plan unchanged."""
  kinds = sorted({concept for concept, _ in plan})  # sampling objects would favour frequent ones
  kind, chance = rng.choice(kinds), rng.random()
  if chance >= NEW + NEW_LOOKALIKE:
    return plan
  other = new if chance < NEW else int(rng.choice(lookalikes(new)))
  return [(other if concept == kind else concept, share) for concept, share in plan]


def sample_kinds(rng: np.random.Generator) -> list[int]:
  """Samples one to four concepts, often similar ones."""
  kinds: list[int] = []
  for _ in range(rng.choice([1, 2, 3, 4], p=[0.25, 0.3, 0.25, 0.2])):
    similar = [one for kind in kinds for one in lookalikes(kind) if one not in kinds]
    choose = similar and rng.random() < 0.35
    kinds.append(int(rng.choice(similar) if choose else rng.integers(len(drawings.concepts()))))
  return kinds


def _add_object(
  rng: np.random.Generator,
  canvas: "_Canvas",
  drawing: drawings.Drawing,
  concept: int,
  side: float,
  augment: float,
) -> None:
  """Pastes an object at a position where all objects stay half visible, or leaves it out."""
  shorter = min(canvas.image.shape[:2])
  crowded = rng.random() < 0.4
  for attempt in range(_ATTEMPTS):
    if attempt % 3 == 0:
      side = np.clip(side * 0.8 ** (attempt // 3), MIN_SIDE * shorter + 1, MAX_SIDE * shorter - 1)
      patch = render(rng, drawing, concept, side, augment)
    near = canvas.last if crowded and canvas.items else None
    if canvas.paste(patch, _corner(rng, canvas, patch, near, attempt), concept):
      return


def _corner(
  rng: np.random.Generator,
  canvas: "_Canvas",
  patch: Patch,
  near: tuple[float, float] | None,
  attempt: int,
) -> tuple[int, int]:
  """Samples the top and left of a patch, inside the image or slightly beyond its border."""
  largest = np.subtract(canvas.image.shape[:2], patch.mask.shape)
  if near is None:
    over = 0.25 * np.array(patch.mask.shape) * (attempt == 0 and rng.random() < 0.15)
    corner = rng.uniform(-over, largest + over)
  else:
    corner = near + rng.normal(0, 0.7, 2) * patch.mask.shape - np.array(patch.mask.shape) / 2
    corner = np.clip(corner, 0, largest)
  top, left = np.rint(corner).astype(int)
  return int(top), int(left)


class _Canvas:
  """An image to which objects are added.

  Attributes:
    image: the image so far.
    owners: index of the object at each pixel, -1 for none.
    items: concepts of the objects.
    full: number of opaque pixels of each object.
    seen: number of visible pixels of each object.
    last: y and x of the center of the last object.
  """

  def __init__(self, image: UInt8[np.ndarray, "h w 3"]):
    self.image = image
    self.owners: Int[np.ndarray, "h w"] = np.full(image.shape[:2], -1, np.int8)
    self.items: list[int] = []
    self.full: list[int] = []
    self.seen: Int[np.ndarray, " n"] = np.zeros(0, np.int64)
    self.last = (0.0, 0.0)

  def paste(self, patch: Patch, corner: tuple[int, int], concept: int) -> bool:
    """Adds an object on top of the others; returns False if an object would be too hidden."""
    (top, left), (rows, columns) = corner, patch.mask.shape
    height, width = self.owners.shape
    inside = (
      slice(max(0, -top), min(rows, height - top)),
      slice(max(0, -left), min(columns, width - left)),
    )
    target = (slice(max(0, top), top + inside[0].stop), slice(max(0, left), left + inside[1].stop))
    mask, full = patch.mask[inside], int(patch.mask.sum())
    count = len(self.items)
    hidden = np.bincount(self.owners[target][mask] + 1, minlength=count + 1)[1:]
    seen = np.append(self.seen - hidden, mask.sum())
    if not full or (seen < MIN_VISIBLE * np.array([*self.full, full])).any():
      return False
    pixels, below = patch.pixels[inside], self.image[target]
    transparency = 255 - pixels[..., 3:].astype(np.uint16)
    blended = pixels[..., :3] + (below * transparency + 127) // 255
    np.minimum(blended, 255, out=below, casting="unsafe")
    self.owners[target][mask] = count
    self.items.append(concept)
    self.full.append(full)
    self.seen, self.last = seen, (top + rows / 2, left + columns / 2)
    return True
