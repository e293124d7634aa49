"""One image and its phrases as one row of a `Batch`: sampled prompts and boxes, padded.

The prompts of a row have a fixed order: phrases with objects, then absent phrases, then padding. So
masks are only computed for the first `present_prompts` prompts.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import regex
from jaxtyping import Float, Int, UInt8

from sam3_jax.datasets.annotations import AbsentPhrases, Object, Pair
from sam3_jax.inputs.prompts import BOXES_ALONE
from sam3_jax.ops.boxes import iou, xyxy_to_cxcywh
from sam3_jax.ops.masks import mask_to_box
from sam3_jax.outputs.rle import decode
from sam3_jax.training.batch import Batch, Targets
from sam3_jax.training.transforms import Frame, random_frame
from sam3_jax.utils.validation import check_number

Tokenize = Callable[[Sequence[str]], Int[np.ndarray, "P T"]]

# Words that a horizontal flip turns into their opposite. "leftover" is not one of them.
_DIRECTIONS = regex.compile(
  r"\b((left|right)(most|wards?|hand(ed)?|side)?|(anti|counter)?-?clockwise)\b", regex.IGNORECASE
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
  """Batches and augmentation."""

  # Images per step, over all processes.
  batch_size: int = 8
  # Seed of shuffling, sampling and augmentation.
  seed: int = 0
  # Shuffle the images in each epoch; otherwise keep their order.
  shuffle: bool = True
  # Processes that make batches; 0 uses a thread. The batches are the same for any number.
  workers: int = 0
  # Batches made in advance; with workers, by each worker.
  prefetch: int = 2
  # Pixels per side of the model's input square. `sam3-jax train` sets it to the model's.
  image_size: int = 0
  # Cells per side of the target masks. `sam3-jax train` sets it to its own `mask_size`, or the
  # model's. Meta compares masks at the image's resolution.
  mask_size: int = 0
  # Prompts per image; images with fewer prompts are padded.
  prompts_per_image: int = 8
  # Prompts per image that may have objects; the others are absent phrases, drawn anew each time.
  present_prompts: int = 4
  # Phrases that no image shows; they are drawn like the absent categories of the annotations.
  negatives: tuple[str, ...] = ()
  # Maximum number of objects per prompt; the largest by mask area are kept. Meta's limit is 200.
  max_objects: int = 32
  # Maximum number of exemplar boxes per prompt.
  max_exemplars: int = 4
  # Smallest size of the random resize, as a fraction of `image_size`; 1 for no resize.
  min_scale: float = 480 / 1008
  # Probability of a horizontal flip; never with a phrase that says left or right.
  flip_probability: float = 0.5
  # Probability of a random crop; Meta does not crop.
  crop_probability: float = 0.0
  # Smallest crop, as a fraction of the image's width and of its height.
  min_crop_size: float = 0.5
  # Probability that a phrase with objects is replaced by boxes, with the phrase "visual".
  box_only_probability: float = 0.1
  # Probability that a phrase with objects gets boxes in addition.
  text_and_box_probability: float = 0.1
  # Probability that a prompt with boxes also gets a negative box, on an object of another phrase.
  negative_box_probability: float = 0.2
  # Standard deviation of the noise on each side of an exemplar box, as a fraction of its size.
  box_noise: float = 0.1
  # Largest noise on a side of an exemplar box, as a fraction of `image_size`.
  box_noise_limit: float = 20 / 1008

  def __post_init__(self):
    may_be_zero = ("seed", "workers", "prefetch", "image_size", "mask_size")
    for field in dataclasses.fields(self):
      value, least = getattr(self, field.name), int(field.name not in may_be_zero)
      if field.type is int:
        check_number(f"data.{field.name}", value, least, whole=True)
      if field.type is float:
        check_number(f"data.{field.name}", value, 0, 1)
    if self.present_prompts > self.prompts_per_image:
      raise ValueError(
        f"data.present_prompts is {self.present_prompts}, but data.prompts_per_image only "
        f"{self.prompts_per_image}; lower data.present_prompts."
      )
    if self.box_only_probability + self.text_and_box_probability > 1:
      raise ValueError(
        f"data.box_only_probability {self.box_only_probability:g} and "
        f"data.text_and_box_probability {self.text_and_box_probability:g} must add up to at most 1."
      )
    if self.min_scale == 0 or self.min_crop_size == 0:
      raise ValueError("data.min_scale and data.min_crop_size must be greater than 0.")


class TrainingImage(NamedTuple):
  """An image and its annotated phrases; unusable pairs are ignored (see `usable`).

  Attributes:
    image: sRGB.
    pairs: the phrases and their objects.
    absent: phrases that the image does not show; None for those of the pairs without objects.
  """

  image: UInt8[np.ndarray, "h w 3"]
  pairs: Sequence[Pair]
  absent: AbsentPhrases | None = None


class Source(Protocol):
  """A random-access sequence of images with names: files, or scenes composed on the fly."""

  def __len__(self) -> int: ...
  def __getitem__(self, index: int, /) -> TrainingImage: ...
  def name(self, index: int, /) -> str:
    """The name of an image, for messages."""
    ...


class _Target(NamedTuple):
  """An object: its box, xyxy fractions of the square, and its coverage of the mask's cells."""

  box: Float[np.ndarray, "4"]
  mask: UInt8[np.ndarray, "Ht Wt"]


class _Prompt(NamedTuple):
  phrase: str
  targets: list[_Target]


def usable(pair: Pair) -> bool:
  """Whether a pair may be used for training: each object of its phrase is annotated individually.

  A crowd is not a target, but detections inside it are not wrong either. Where annotations are not
  exhaustive, a correct detection may have no target. Such pairs are left out.
  """
  return pair.exhaustive and not any(one.crowd for one in pair.objects)


def example(
  image: TrainingImage,
  index: int,
  config: DataConfig,
  tokenize: Tokenize,
  generator: np.random.Generator,
) -> Batch:
  """Makes one row of a batch: a `Batch` of NumPy arrays without the leading axis B.

  Args:
    image: the image and its phrases.
    index: the image's index, for `ids`.
    config: sizes and augmentation.
    tokenize: turns phrases into rows of token ids.
    generator: the only source of randomness, so the same generator makes the same row.
  """
  height, width = image.image.shape[:2]
  present, absent = _choose(image, config, generator)
  phrases = [*(pair.phrase for pair in present), *absent]
  directional = any(map(_DIRECTIONS.search, phrases))
  frame = random_frame(
    generator,
    height,
    width,
    config.image_size,
    min_side=max(1, round(config.min_scale * config.image_size)),
    flip=0.0 if directional else config.flip_probability,
    crop=config.crop_probability,
    min_crop_size=config.min_crop_size,
  )
  prompts = [_Prompt(pair.phrase, _find_targets(pair.objects, frame, config)) for pair in present]
  prompts.sort(key=lambda prompt: not prompt.targets)  # stable; cropped-out phrases are now absent
  prompts = (prompts + [_Prompt(phrase, []) for phrase in absent])[: config.prompts_per_image]
  fields: dict[str, Any] = {
    "images": frame.image(image.image),
    "sizes": np.array([height, width], np.int32),
    "ids": np.array(index, np.int32),
    "targets": _pad_targets(prompts, config),
    **_make_prompts(prompts, frame, config, tokenize, generator),
  }
  return Batch(**fields)


def _choose(
  image: TrainingImage, config: DataConfig, generator: np.random.Generator
) -> tuple[list[Pair], list[str]]:
  """Samples at most `present_prompts` phrases with objects, and absent ones to fill the row."""
  pairs = [image.pairs[i] for i in generator.permutation(len(image.pairs))]
  pairs = list(filter(usable, pairs))
  present = [pair for pair in pairs if pair.objects][: config.present_prompts]
  if image.absent is None:
    absent = [pair.phrase for pair in pairs if not pair.objects]
  else:
    absent = image.absent.listed()
  absent += [phrase for phrase in config.negatives if phrase not in absent]
  if image.absent is not None or config.negatives:
    absent = [absent[i] for i in generator.permutation(len(absent))]
  return present, absent[: config.prompts_per_image - len(present)]


def _find_targets(objects: Sequence[Object], frame: Frame, config: DataConfig) -> list[_Target]:
  """The objects that are visible in the frame, in order; the largest ones if there are too many."""
  from pycocotools import mask as coco

  api: Any = coco
  rles = [one.rle for one in objects]
  bounds = api.toBbox(rles) if rles else np.zeros((0, 4))
  visible = []
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
      visible.append((area, box, mask, (left, top)))
  if len(visible) > config.max_objects:
    largest = sorted(range(len(visible)), key=lambda i: -visible[i][0])[: config.max_objects]
    visible = [visible[i] for i in sorted(largest)]
  boxes = frame.boxes(np.array([box for _, box, _, _ in visible]).reshape(-1, 4))
  return [
    _Target(box, frame.coverage(mask, corner, config.mask_size))
    for box, (_, _, mask, corner) in zip(boxes, visible, strict=True)
  ]


def _corners(box: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
  x, y, w, h = box
  return x, y, x + w, y + h


def _bounds(mask: np.ndarray, left: int, top: int) -> tuple[float, float, float, float]:
  x0, y0, x1, y1 = mask_to_box(mask.astype(bool))
  return left + x0, top + y0, left + x1, top + y1


def _make_prompts(
  prompts: Sequence[_Prompt],
  frame: Frame,
  config: DataConfig,
  tokenize: Tokenize,
  generator: np.random.Generator,
) -> dict[str, np.ndarray]:
  """Tokens and exemplar boxes, padded."""
  count, slots = config.prompts_per_image, config.max_exemplars
  box_probability = config.box_only_probability + config.text_and_box_probability
  phrases = []
  boxes = np.full((count, slots, 4), 0.5, np.float32)
  positive = np.zeros((count, slots), bool)
  valid = np.zeros((count, slots), bool)
  for i, prompt in enumerate(prompts):
    draw = generator.random()
    with_box = bool(prompt.targets) and draw < box_probability
    box_only = with_box and draw < config.box_only_probability
    phrases.append(BOXES_ALONE if box_only else prompt.phrase)
    if not with_box:
      continue
    chosen = generator.permutation(len(prompt.targets))[: generator.integers(1, slots + 1)]
    exemplars = [prompt.targets[j].box for j in chosen]
    labels = [True] * len(exemplars)
    negatives = _negatives(prompts, i)
    negative = generator.random() < config.negative_box_probability
    if negative and negatives and len(exemplars) < slots:
      exemplars.append(negatives[generator.integers(len(negatives))])
      labels.append(False)
    n = len(exemplars)
    boxes[i, :n] = xyxy_to_cxcywh(_add_noise(np.array(exemplars), frame, config, generator))
    positive[i, :n], valid[i, :n] = labels, True
  tokens = tokenize([*phrases, *[""] * (count - len(phrases))])
  return {
    "tokens": tokens,
    "boxes": boxes,
    "positive": positive,
    "box_valid": valid,
    "prompt_valid": np.arange(count) < len(prompts),
  }


def _negatives(prompts: Sequence[_Prompt], index: int) -> list[np.ndarray]:
  """Boxes of other phrases' objects that this phrase does not name too ("apple", "red apple")."""
  own = np.array([target.box for target in prompts[index].targets])
  boxes = [target.box for i, one in enumerate(prompts) if i != index for target in one.targets]
  return [box for box in boxes if iou(box, own).max() < 0.5]


def _add_noise(
  boxes: np.ndarray, frame: Frame, config: DataConfig, generator: np.random.Generator
) -> np.ndarray:
  """Moves the corners of boxes at random, inside the image."""
  extent = np.tile(boxes[:, 2:] - boxes[:, :2], 2)
  noise = generator.normal(size=boxes.shape) * config.box_noise * extent
  moved = boxes + np.clip(noise, -config.box_noise_limit, config.box_noise_limit)
  low = np.array([frame.x, frame.y] * 2) / frame.size
  moved = np.clip(moved, low, low + frame.side / frame.size)
  return np.concatenate(
    [np.minimum(moved[:, :2], moved[:, 2:]), np.maximum(moved[:, :2], moved[:, 2:])], axis=1
  )


def _pad_targets(prompts: Sequence[_Prompt], config: DataConfig) -> Targets:
  count, slots, cells = config.prompts_per_image, config.max_objects, config.mask_size
  boxes = np.full((count, slots, 4), 0.5, np.float32)
  masks = np.zeros((count, slots, cells, cells), np.uint8)
  valid = np.zeros((count, slots), bool)
  for i, prompt in enumerate(prompts):
    for j, target in enumerate(prompt.targets):
      boxes[i, j], masks[i, j], valid[i, j] = xyxy_to_cxcywh(target.box), target.mask, True
  fields: dict[str, Any] = {"boxes": boxes, "masks": masks, "valid": valid}
  return Targets(**fields)
