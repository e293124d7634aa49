"""From an image and its phrases to one row of a `Batch`: prompts chosen, boxes drawn, padded.

The order of a row's prompts is a promise: phrases with objects come first, then absent ones, then
padding, so that masks need to be made for the first `present` prompts only.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import regex
from jaxtyping import Float, Int, UInt8

from sam3_jax.datasets.annotations import Object, Pair
from sam3_jax.inputs.prompts import BOXES_ALONE
from sam3_jax.ops.boxes import iou
from sam3_jax.ops.masks import mask_to_box
from sam3_jax.outputs.rle import decode
from sam3_jax.training import transforms as frames
from sam3_jax.training.batch import Batch, Targets
from sam3_jax.utils.validation import check_number

Tokenize = Callable[[Sequence[str]], Int[np.ndarray, "P T"]]

# A mirror image turns these into their opposite. "leftover" is no direction.
_SIDES = regex.compile(
  r"\b((left|right)(most|wards?|hand(ed)?|side)?|(anti|counter)?-?clockwise)\b", regex.IGNORECASE
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
  """What a batch holds, and how it is drawn.

  Attributes:
    batch: images a step, of all processes together.
    seed: of everything random here.
    shuffle: another order in each epoch; otherwise the source's.
    workers: processes that make batches; 0 makes them in a thread of this one. The batches are the
      same whatever the number.
    ahead: batches made before they are asked for; by each worker, if there are any.
    image_size: pixels a side of the model's square; 0 where it is still open. `sam3-jax train`
      fills in the model's.
    mask_size: cells a side of the target masks; 0 where it is still open. Meta compares at the
      image's resolution. `sam3-jax train` fills in `TrainConfig.mask_size`, or the model's.
    prompts: rows of an image, R.
    present: of those, at most this many with objects; they come first.
    objects: of a prompt, O; of more, the largest (by mask) are kept. Meta's limit is 200.
    examples: boxes of a prompt, N.
    smallest: of the random resize, as a share of image_size; 1 turns it off.
    flip: probability of a mirror image; never with a phrase that says left or right.
    crop: probability of a random crop, which Meta does not use.
    crop_side: the least share of width and height that a crop keeps.
    box_only: share of the present phrases that become boxes alone, with the phrase "visual".
    text_and_box: share that keep the phrase and get boxes; the rest are phrases alone.
    counterexample: probability that a prompt with boxes also gets one of another thing.
    box_noise: standard deviation of each side of an example box, as a share of the box's extent.
    box_noise_limit: its bound, as a share of image_size.
  """

  batch: int = 8
  seed: int = 0
  shuffle: bool = True
  workers: int = 0
  ahead: int = 2
  image_size: int = 0
  mask_size: int = 0
  prompts: int = 8
  present: int = 4
  objects: int = 32
  examples: int = 4
  smallest: float = 480 / 1008
  flip: float = 0.5
  crop: float = 0.0
  crop_side: float = 0.5
  box_only: float = 0.1
  text_and_box: float = 0.1
  counterexample: float = 0.2
  box_noise: float = 0.1
  box_noise_limit: float = 20 / 1008

  def __post_init__(self):
    from_none = ("seed", "workers", "ahead", "image_size", "mask_size")
    for field in dataclasses.fields(self):
      value, least = getattr(self, field.name), int(field.name not in from_none)
      if field.type is int:
        check_number(f"data.{field.name}", value, least, whole=True)
      if field.type is float:
        check_number(f"data.{field.name}", value, 0, 1)
    if self.present > self.prompts:
      raise ValueError(
        f"data.present is {self.present}, more than the {self.prompts} prompts; lower it."
      )
    if self.box_only + self.text_and_box > 1:
      raise ValueError(
        f"data.box_only {self.box_only:g} and data.text_and_box {self.text_and_box:g} are shares "
        "of the same prompts: together at most 1."
      )
    if self.smallest == 0 or self.crop_side == 0:
      raise ValueError(
        "data.smallest and data.crop_side must be above 0: nothing would be left to see."
      )


class TrainingImage(NamedTuple):
  """An image and what is asked about it; pairs with crowds or not exhaustive are not used."""

  image: UInt8[np.ndarray, "h w 3"]
  pairs: Sequence[Pair]


class Source(Protocol):
  """Any random-access list of images that have names: files, or scenes made on the spot."""

  def __len__(self) -> int: ...
  def __getitem__(self, index: int, /) -> TrainingImage: ...
  def name(self, index: int, /) -> str:
    """What an image is called, for messages."""
    ...


class _Found(NamedTuple):
  """An object in the frame: xyxy fractions of the square, and its coverage of the mask's cells."""

  box: Float[np.ndarray, "4"]
  mask: UInt8[np.ndarray, "Ht Wt"]


class _Asked(NamedTuple):
  phrase: str
  found: list[_Found]


def usable(pair: Pair) -> bool:
  """Whether a pair may be trained on: what matches its phrase is known, one by one.

  A crowd is no target, yet what is found in it is not wrong either; and where not all objects are
  annotated, a find may be right without a target. Such pairs are left out whole.
  """
  return pair.exhaustive and not any(one.crowd for one in pair.objects)


def example(
  image: TrainingImage,
  index: int,
  config: DataConfig,
  tokenize: Tokenize,
  generator: np.random.Generator,
) -> Batch:
  """One row of a batch: a `Batch` of NumPy arrays without the leading axis B.

  Args:
    index: the image's, for `ids`.
    tokenize: phrases to rows of token ids.
    generator: all that is random comes from it, so the same generator makes the same example.
  """
  height, width = image.image.shape[:2]
  present, absent = _choose(image.pairs, config, generator)
  sided = any(_SIDES.search(pair.phrase) for pair in present + absent)
  frame = frames.draw(
    generator,
    height,
    width,
    config.image_size,
    smallest=max(1, round(config.smallest * config.image_size)),
    flip=0.0 if sided else config.flip,
    crop=config.crop,
    crop_side=config.crop_side,
  )
  asked = [_Asked(pair.phrase, _find(pair.objects, frame, config)) for pair in present]
  asked.sort(key=lambda one: not one.found)  # stable; what a crop has lost is absent now
  asked = (asked + [_Asked(pair.phrase, []) for pair in absent])[: config.prompts]
  fields: dict[str, Any] = {
    "images": frame.image(image.image),
    "sizes": np.array([height, width], np.int32),
    "ids": np.array(index, np.int32),
    "targets": _targets(asked, config),
    **_prompts(asked, frame, config, tokenize, generator),
  }
  return Batch(**fields)


def _choose(
  pairs: Sequence[Pair], config: DataConfig, generator: np.random.Generator
) -> tuple[list[Pair], list[Pair]]:
  """Phrases with objects, at most `present`, and others to fill the row, each drawn at random."""
  pairs = [pairs[i] for i in generator.permutation(len(pairs)) if usable(pairs[i])]
  present = [pair for pair in pairs if pair.objects][: config.present]
  absent = [pair for pair in pairs if not pair.objects][: config.prompts - len(present)]
  return present, absent


def _find(objects: Sequence[Object], frame: frames.Frame, config: DataConfig) -> list[_Found]:
  """What the frame shows of the objects, in their order; the largest, if there are too many."""
  from pycocotools import mask as coco

  api: Any = coco
  rles = [one.rle for one in objects]
  bounds = api.toBbox(rles) if rles else np.zeros((0, 4))
  seen = []
  for one, (x, y, w, h) in zip(objects, bounds.astype(int), strict=True):
    left, right = max(x, frame.left), min(x + w, frame.right)
    top, bottom = max(y, frame.top), min(y + h, frame.bottom)
    if left >= right or top >= bottom:
      continue
    mask = decode(one.rle)[top:bottom, left:right]
    area = np.count_nonzero(mask)
    if area:
      cut = (left, top, right, bottom) != (x, y, x + w, y + h)
      box = _bounds(mask, left, top) if cut else _corners(one.box)
      seen.append((area, box, mask, (left, top)))
  if len(seen) > config.objects:
    largest = sorted(range(len(seen)), key=lambda i: -seen[i][0])[: config.objects]
    seen = [seen[i] for i in sorted(largest)]
  boxes = frame.boxes(np.array([box for _, box, _, _ in seen]).reshape(-1, 4))
  return [
    _Found(box, frame.coverage(mask, corner, config.mask_size))
    for box, (_, _, mask, corner) in zip(boxes, seen, strict=True)
  ]


def _corners(box: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
  x, y, w, h = box
  return x, y, x + w, y + h


def _bounds(mask: np.ndarray, left: int, top: int) -> tuple[float, float, float, float]:
  x0, y0, x1, y1 = mask_to_box(mask.astype(bool))
  return left + x0, top + y0, left + x1, top + y1


def _prompts(
  asked: Sequence[_Asked],
  frame: frames.Frame,
  config: DataConfig,
  tokenize: Tokenize,
  generator: np.random.Generator,
) -> dict[str, np.ndarray]:
  """Tokens and example boxes, padded."""
  rows, slots = config.prompts, config.examples
  phrases = []
  boxes = np.full((rows, slots, 4), 0.5, np.float32)
  positive = np.zeros((rows, slots), bool)
  valid = np.zeros((rows, slots), bool)
  for i, one in enumerate(asked):
    kind = generator.random()
    with_box = bool(one.found) and kind < config.box_only + config.text_and_box
    phrases.append(BOXES_ALONE if with_box and kind < config.box_only else one.phrase)
    if not with_box:
      continue
    chosen = generator.permutation(len(one.found))[: generator.integers(1, slots + 1)]
    picked = [one.found[j].box for j in chosen]
    labels = [True] * len(picked)
    others = _others(asked, i)
    if generator.random() < config.counterexample and others and len(picked) < slots:
      picked.append(others[generator.integers(len(others))])
      labels.append(False)
    n = len(picked)
    boxes[i, :n] = _cxcywh(_shake(np.array(picked), frame, config, generator))
    positive[i, :n], valid[i, :n] = labels, True
  tokens = tokenize([*phrases, *[""] * (rows - len(phrases))])
  return {
    "tokens": tokens,
    "boxes": boxes,
    "positive": positive,
    "box_valid": valid,
    "prompt_valid": np.arange(rows) < len(asked),
  }


def _others(asked: Sequence[_Asked], index: int) -> list[np.ndarray]:
  """Boxes of other phrases' objects that are no object of this one ("apple" and "red apple")."""
  own = np.array([found.box for found in asked[index].found])
  boxes = [found.box for i, one in enumerate(asked) if i != index for found in one.found]
  return [box for box in boxes if iou(box, own).max() < 0.5]


def _shake(
  boxes: np.ndarray, frame: frames.Frame, config: DataConfig, generator: np.random.Generator
) -> np.ndarray:
  """Corners moved at random, and kept in the image."""
  extent = np.tile(boxes[:, 2:] - boxes[:, :2], 2)
  noise = generator.normal(size=boxes.shape) * config.box_noise * extent
  moved = boxes + np.clip(noise, -config.box_noise_limit, config.box_noise_limit)
  low = np.array([frame.x, frame.y] * 2) / frame.size
  moved = np.clip(moved, low, low + frame.side / frame.size)
  return np.concatenate(
    [np.minimum(moved[:, :2], moved[:, 2:]), np.maximum(moved[:, :2], moved[:, 2:])], axis=1
  )


def _targets(asked: Sequence[_Asked], config: DataConfig) -> Targets:
  rows, slots, cells = config.prompts, config.objects, config.mask_size
  boxes = np.full((rows, slots, 4), 0.5, np.float32)
  masks = np.zeros((rows, slots, cells, cells), np.uint8)
  valid = np.zeros((rows, slots), bool)
  for i, one in enumerate(asked):
    for j, found in enumerate(one.found):
      boxes[i, j], masks[i, j], valid[i, j] = _cxcywh(found.box), found.mask, True
  fields: dict[str, Any] = {"boxes": boxes, "masks": masks, "valid": valid}
  return Targets(**fields)


def _cxcywh(boxes: np.ndarray) -> np.ndarray:
  low, high = boxes[..., :2], boxes[..., 2:]
  return np.concatenate([(low + high) / 2, high - low], axis=-1)
