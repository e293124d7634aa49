"""Scenes: images composed of drawings, with the exact visible mask of each object.

As hard as the fixed scenes that the published figures are of, or harder: objects of 8 to 60 % of
the shorter side, 1 to 12 of them, each at least half visible, on patterns and photographs.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, UInt8

from sam3_jax.datasets.synthetic import drawings
from sam3_jax.datasets.synthetic.augment import Patch, render
from sam3_jax.datasets.synthetic.backgrounds import background
from sam3_jax.datasets.synthetic.phrase_sampling import Phrase, ask, lookalikes

SIZES = ((240, 320), (320, 240), (256, 256), (224, 400), (288, 288), (400, 224))  # height, width
LEAST, MOST = 0.08, 0.6  # an object's longer side, as a fraction of the image's shorter one
CROWD = 12  # objects
VISIBLE = 0.5  # of each object, at least
VARIETY = 0.08  # of the scenes show many things, each of them once
NEW, NEW_LOOKALIKE = 0.5, 0.2  # of the scenes that know a new concept: show it, or what is like it
_ATTEMPTS = 8  # to find a place for an object
SMALLEST = 64  # pixels of an image's side


class Item(NamedTuple):
  """An object: the number of its concept, and which pixels of the image show it."""

  concept: int
  mask: Bool[np.ndarray, "h w"]


@dataclasses.dataclass(frozen=True)
class Scene:
  """An image and all that is in it.

  Attributes:
    image: RGB.
    objects: from the back to the front; their masks share no pixel.
    visible: the fraction of each object that is seen, the rest being hidden or off the image.
    style: whose drawings they are, or "mixed".
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
  """A scene, which `rng` alone decides.

  Args:
    rng: is drawn from.
    styles: artists of drawings.STYLES, one of whom draws all objects.
    size: height and width in pixels, at least 64; None draws one of SIZES.
    mixed: probability of a scene each of whose objects has an artist of its own.
    augment: in [0, 1], how strongly colours and shapes of the drawings are changed.
    variety: probability of a scene of many things, each of them once.
    new: number of a new concept, which about half of the scenes show; None for none.

  Raises:
    ValueError: a style that there is not, or a size too small.
  """
  height, width = SIZES[int(rng.integers(len(SIZES)))] if size is None else size
  if min(height, width) < SMALLEST:
    raise ValueError(
      f"a scene's size must be at least {SMALLEST} x {SMALLEST} pixels; got {height} x {width}."
    )
  canvas = _Canvas(background(rng, height, width))
  mix = rng.random() < mixed
  artist = styles[int(rng.integers(len(styles)))]
  while not canvas.items:  # a tiny object may have no opaque pixel
    plan = _plan(rng, variety)
    for concept, share in plan if new is None else _with_new(rng, plan, new):
      artist = styles[int(rng.integers(len(styles)))] if mix else artist
      drawing = drawings.drawings(artist)[concept]
      _place(rng, canvas, drawing, concept, share * min(height, width), augment)
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
  """Phrases to ask of a scene, each with the objects it matches; see `wording.ask`."""
  present = [concept for concept, _ in scene.objects]
  return ask(rng, present, absent=absent, usual=usual, unseen=unseen, new=new)


def _plan(rng: np.random.Generator, variety: float) -> list[tuple[int, float]]:
  """Concepts of the objects, from the back to the front, and their sizes."""
  everything = len(drawings.concepts())
  if rng.random() < variety:
    wanted = list(rng.choice(everything, rng.integers(4, CROWD + 1), replace=False))
  else:
    kinds = _kinds(rng)
    crowd = rng.random() < 0.1
    counts = [rng.choice([1, 1, 1, 1, 2, 2, 2, 3, 3, 4, 5, 6]) for _ in kinds]
    counts[0] = rng.integers(7, CROWD + 1) if crowd else counts[0]
    wanted = list(rng.permutation(np.repeat(kinds, counts))[:CROWD])
  most = min(MOST, 1.7 / np.sqrt(len(wanted)))
  if rng.random() < 0.5:
    shares = rng.uniform(LEAST, most, len(wanted))
  else:  # much of a size
    shares = rng.uniform(LEAST, most) * rng.uniform(0.7, 1.3, len(wanted))
  return [(int(concept), share) for concept, share in zip(wanted, shares, strict=True)]


def _with_new(
  rng: np.random.Generator, plan: list[tuple[int, float]], new: int
) -> list[tuple[int, float]]:
  """The plan with a new concept in the place of another, or with what it is taken for; or as it
  is."""
  kinds = sorted({concept for concept, _ in plan})  # by objects, it would be the crowds
  kind, chance = rng.choice(kinds), rng.random()
  if chance >= NEW + NEW_LOOKALIKE:
    return plan
  other = new if chance < NEW else int(rng.choice(lookalikes(new)))
  return [(other if concept == kind else concept, share) for concept, share in plan]


def _kinds(rng: np.random.Generator) -> list[int]:
  """A few concepts, more often look-alikes than chance would have it."""
  kinds: list[int] = []
  for _ in range(rng.choice([1, 2, 3, 4], p=[0.25, 0.3, 0.25, 0.2])):
    kin = [one for kind in kinds for one in lookalikes(kind) if one not in kinds]
    alike = kin and rng.random() < 0.35
    kinds.append(int(rng.choice(kin) if alike else rng.integers(len(drawings.concepts()))))
  return kinds


def _place(
  rng: np.random.Generator,
  canvas: "_Canvas",
  drawing: drawings.Drawing,
  concept: int,
  side: float,
  augment: float,
) -> None:
  """Puts an object where it hides no other's greater half, or leaves it out."""
  shorter = min(canvas.image.shape[:2])
  crowded = rng.random() < 0.4
  for attempt in range(_ATTEMPTS):
    if attempt % 3 == 0:
      side = np.clip(side * 0.8 ** (attempt // 3), LEAST * shorter + 1, MOST * shorter - 1)
      patch = render(rng, drawing, concept, side, augment)
    near = canvas.last if crowded and canvas.items else None
    if canvas.put(patch, _corner(rng, canvas, patch, near, attempt), concept):
      return


def _corner(
  rng: np.random.Generator,
  canvas: "_Canvas",
  patch: Patch,
  near: tuple[float, float] | None,
  attempt: int,
) -> tuple[int, int]:
  """Top and left of a patch, inside the image or a little over its border."""
  room = np.subtract(canvas.image.shape[:2], patch.mask.shape)
  if near is None:
    over = 0.25 * np.array(patch.mask.shape) * (attempt == 0 and rng.random() < 0.15)
    corner = rng.uniform(-over, room + over)
  else:
    corner = near + rng.normal(0, 0.7, 2) * patch.mask.shape - np.array(patch.mask.shape) / 2
    corner = np.clip(corner, 0, room)
  top, left = np.rint(corner).astype(int)
  return int(top), int(left)


class _Canvas:
  """An image in the making.

  Attributes:
    image: so far.
    owners: number of the object that each pixel shows, -1 for none.
    items: concepts of the objects.
    full: opaque pixels of each object.
    seen: those of them that the image shows.
    last: y and x of the middle of the object put last.
  """

  def __init__(self, image: UInt8[np.ndarray, "h w 3"]):
    self.image = image
    self.owners: Int[np.ndarray, "h w"] = np.full(image.shape[:2], -1, np.int8)
    self.items: list[int] = []
    self.full: list[int] = []
    self.seen: Int[np.ndarray, " n"] = np.zeros(0, np.int64)
    self.last = (0.0, 0.0)

  def put(self, patch: Patch, corner: tuple[int, int], concept: int) -> bool:
    """Puts an object on top of the others; not if too little of one would be seen."""
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
    if not full or (seen < VISIBLE * np.array([*self.full, full])).any():
      return False
    pixels, below = patch.pixels[inside], self.image[target]
    through = 255 - pixels[..., 3:].astype(np.uint16)
    np.minimum(pixels[..., :3] + (below * through + 127) // 255, 255, out=below, casting="unsafe")
    self.owners[target][mask] = count
    self.items.append(concept)
    self.full.append(full)
    self.seen, self.last = seen, (top + rows / 2, left + columns / 2)
    return True
