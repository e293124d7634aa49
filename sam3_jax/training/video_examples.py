"""Clips of moving scenes for the training of a tracker: frames, masks and prompts of fixed shapes.

As in SAM 2 (Ravi et al. 2024, arXiv:2408.00714, section 5): clips of 8 frames with up to 3 objects,
a mask, a box or a click on the first frame, and clicks in up to 2 further frames that correct the
tracker. Which frames are corrected is decided here; where to click depends on the masks that are
predicted in training. Half of the clips are played backward.
"""

import dataclasses
import functools
from typing import Any

import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, UInt8

from sam3_jax.datasets.synthetic import drawings, moving_scenes, scenes
from sam3_jax.inputs.visual_prompts import CORNERS, PADDING
from sam3_jax.ops.masks import mask_to_box
from sam3_jax.training.transforms import Frame, random_frame
from sam3_jax.utils.validation import check_numbers

MASK, BOX, CLICK = 0, 1, 2  # kinds of the first prompt
POINTS = 2  # points of the first prompt: the corners of a box, or a click and padding


@struct.dataclass
class ClipBatch:
  """Clips, their objects and prompts: B clips, F frames, O objects, M points of a prompt.

  Attributes:
    frames: resized and padded to the model's square; see `preprocess.normalize`.
    sizes: height and width of the source frames in pixels.
    ids: the scenes' indices, for messages.
    masks: how much of each cell an object covers, 0..255; zeros where it is not visible. The grid
      spans the square.
    visible: whether any pixel of an object is visible.
    valid: False for padding; the other objects are visible in the first frame.
    kind: of the prompts on the first frame, for all objects of a clip: `MASK`, `BOX` or `CLICK`.
    xy: points of the first prompt, x and y as fractions of the square.
    labels: of these points: 1 for a click on the object, 2 and 3 for the corners of a box, -1 for
      padding. All are padding if the prompt is the mask of the first frame.
    corrected: frames in which the objects get a corrective click; never the first.
  """

  frames: UInt8[Array, "B F Hi Wi 3"]
  sizes: Int[Array, "B 2"]
  ids: Int[Array, " B"]
  masks: UInt8[Array, "B F O Ht Wt"]
  visible: Bool[Array, "B F O"]
  valid: Bool[Array, "B O"]
  kind: Int[Array, " B"]
  xy: Float[Array, "B O M 2"]
  labels: Int[Array, "B O M"]
  corrected: Bool[Array, "B F"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipConfig:
  """Clips, their scenes and prompts."""

  # Clips per step, over all processes.
  batch_size: int = 4
  # Moving scenes per epoch.
  count: int = 100_000
  # Seed of scenes, sampling and augmentation.
  seed: int = 0
  # Frames per clip.
  frames: int = 8
  # Largest number of objects per clip; chosen at random if there are more.
  max_objects: int = 3
  # Largest step between two frames of a clip, in frames of the scene.
  max_stride: int = 3
  # Styles of the drawings, from `drawings.TRAINING`; empty for all of them.
  styles: tuple[str, ...] = drawings.TRAINING
  # Height and width of a scene in pixels; None for a random choice from `scenes.SIZES`.
  size: tuple[int, int] | None = None
  # Strength of the changes of colors and shapes, in [0, 1].
  augment: float = 0.0
  # Pixels per side of the model's input square.
  image_size: int = 0
  # Cells per side of the masks.
  mask_size: int = 0
  # Smallest size of the random resize, as a fraction of `image_size`; 1 for no resize.
  min_scale: float = 1.0
  # Probability of a horizontal flip of the whole clip.
  flip_probability: float = 0.5
  # Probability that the clip is played backward.
  reverse_probability: float = 0.5
  # Probability that the first prompt is the object's mask; SAM 2's.
  mask_probability: float = 0.5
  # Probability that the first prompt is a box; otherwise it is a click.
  box_probability: float = 0.25
  # Largest number of frames with corrective clicks.
  max_corrected: int = 2
  # Probability that a clip has any.
  correction_probability: float = 0.5
  # Standard deviation of the noise on each side of a box, as a fraction of its size.
  box_noise: float = 0.1
  # Processes that make batches; 0 uses a thread. The batches are the same for any number.
  workers: int = 0
  # Batches made in advance; with workers, by each worker.
  prefetch: int = 2

  def __post_init__(self):
    check = functools.partial(check_numbers, self, "clips")
    check(("batch_size", "count", "max_objects", "max_stride"), 1)
    check(("frames",), 2)
    check(("seed", "image_size", "mask_size", "max_corrected", "workers", "prefetch"), 0)
    check(("augment", "min_scale", "flip_probability", "reverse_probability"), 0, 1)
    check(("mask_probability", "box_probability", "correction_probability", "box_noise"), 0, 1)
    if self.mask_probability + self.box_probability > 1:
      raise ValueError(
        f"clips.mask_probability {self.mask_probability:g} and clips.box_probability "
        f"{self.box_probability:g} must add up to at most 1."
      )
    if not self.min_scale:
      raise ValueError("clips.min_scale must be greater than 0.")
    if self.max_corrected >= self.frames:
      raise ValueError(
        f"clips.max_corrected {self.max_corrected} must be less than clips.frames {self.frames}."
      )
    if not self.styles:
      object.__setattr__(self, "styles", drawings.TRAINING)
    for style in self.styles:
      if style not in drawings.TRAINING:
        known = ", ".join(drawings.TRAINING)
        raise ValueError(f"clips.styles must be of the training styles {known}; got {style!r}.")
    if self.size is not None and min(self.size) < scenes.SMALLEST:
      raise ValueError(
        f"clips.size (height, width) must be at least {scenes.SMALLEST}; got {list(self.size)}."
      )


def clip_example(index: int, config: ClipConfig, generator: np.random.Generator) -> ClipBatch:
  """Makes one row of a batch: a `ClipBatch` of NumPy arrays without the leading axis B.

  Args:
    index: of the scene, for `ids`.
    config: sizes and augmentation.
    generator: the only source of randomness, so the same generator makes the same row.
  """
  frames, shown = _clip(config, generator)
  height, width = frames[0].owners.shape
  window = random_frame(
    generator,
    height,
    width,
    config.image_size,
    min_side=max(1, round(config.min_scale * config.image_size)),
    flip=config.flip_probability,
  )
  chosen = np.sort(generator.permutation(shown)[: config.max_objects])
  slots, cells = config.max_objects, config.mask_size
  masks = np.zeros((config.frames, slots, cells, cells), np.uint8)
  visible = np.zeros((config.frames, slots), bool)
  for t, frame in enumerate(frames):
    for slot, owner in enumerate(chosen):
      mask = frame.mask(int(owner))
      visible[t, slot] = mask.any()
      if visible[t, slot]:
        masks[t, slot] = window.coverage(mask.astype(np.uint8), (0, 0), cells)
  kind, xy, labels = _prompts([frames[0].mask(int(o)) for o in chosen], window, config, generator)
  fields: dict[str, Any] = {
    "frames": np.stack([window.image(frame.image) for frame in frames]),
    "sizes": np.array([height, width], np.int32),
    "ids": np.array(index, np.int32),
    "masks": masks,
    "visible": visible,
    "valid": np.arange(slots) < len(chosen),
    "kind": np.array(kind, np.int32),
    "xy": xy,
    "labels": labels,
    "corrected": _corrected(config, generator),
  }
  return ClipBatch(**fields)


def _clip(
  config: ClipConfig, generator: np.random.Generator
) -> tuple[list[moving_scenes.Frame], np.ndarray]:
  """Composes a scene; returns a clip and the objects that cover a cell of its first frame."""
  while True:
    stride = int(generator.integers(1, config.max_stride + 1))
    length = stride * (config.frames - 1) + 1
    scene = moving_scenes.compose(
      generator, config.styles, config.size, length, augment=config.augment
    )
    order = list(range(0, length, stride))
    if generator.random() < config.reverse_probability:
      order.reverse()
    first = scene[order[0]]
    cell = first.owners.size / config.mask_size**2
    pixels = np.bincount(first.owners.ravel() + 1, minlength=len(scene.concepts) + 1)[1:]
    shown = np.flatnonzero(pixels >= max(1, cell))
    if len(shown):
      return [first, *(scene[t] for t in order[1:])], shown


def _prompts(
  masks: list[np.ndarray], window: Frame, config: ClipConfig, generator: np.random.Generator
) -> tuple[int, np.ndarray, np.ndarray]:
  """The kind of the prompts, and their points and labels, padded."""
  xy = np.full((config.max_objects, POINTS, 2), 0.5, np.float32)
  labels = np.full((config.max_objects, POINTS), PADDING, np.int32)
  chance = [config.mask_probability, config.box_probability]
  kind = int(np.searchsorted(np.cumsum(chance), generator.random(), side="right"))
  for slot, mask in enumerate(masks):
    if kind == BOX:
      box = np.array(mask_to_box(mask), np.float64)
      noise = generator.normal(size=4) * config.box_noise * np.tile(box[2:] - box[:2], 2)
      corners = window.boxes(_ordered(box + noise)[None])[0]
      xy[slot], labels[slot] = corners.reshape(2, 2), CORNERS
    if kind == CLICK:
      rows, columns = np.nonzero(mask)
      point = int(generator.integers(len(rows)))
      ends = (columns[point] + 0.5, 0), (rows[point] + 0.5, 1)
      xy[slot, 0] = [window.to_square(np.array(value), axis) for value, axis in ends]
      xy[slot, 0] /= window.size
      labels[slot, 0] = 1
  return kind, xy, labels


def _ordered(box: np.ndarray) -> np.ndarray:
  """The box with its smaller coordinates first."""
  return np.concatenate([np.minimum(box[:2], box[2:]), np.maximum(box[:2], box[2:])])


def _corrected(config: ClipConfig, generator: np.random.Generator) -> np.ndarray:
  """Chooses the frames with corrective clicks."""
  chosen = np.zeros(config.frames, bool)
  if config.max_corrected and generator.random() < config.correction_probability:
    count = int(generator.integers(1, config.max_corrected + 1))
    chosen[1 + generator.permutation(config.frames - 1)[:count]] = True
  return chosen
