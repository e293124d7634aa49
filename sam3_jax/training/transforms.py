"""Augmentation: crop, flip, resize and padding of an image to the model's input square.

The published augmentation (Meta, `sam3/train`, the roboflow configs) resizes to a square of random
size and pads it to the model's. Cropping is an addition, and off by default.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, UInt8

from sam3_jax.inputs.resize import resize


@dataclasses.dataclass(frozen=True)
class Frame:
  """A crop of an image, resized to `side` x `side` and pasted into a square of `size` x `size`.

  Attributes:
    left, top, right, bottom: the crop, in whole pixels of the image.
    size: pixels per side of the model's square.
    side: pixels per side of the resized crop, at most `size`; the rest of the square is black.
    x, y: upper left corner of the resized crop in the square, in pixels.
    flip: whether the crop is flipped horizontally.
  """

  left: int
  top: int
  right: int
  bottom: int
  size: int
  side: int
  x: int = 0
  y: int = 0
  flip: bool = False

  def image(self, image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "size size 3"]:
    """The model's input square."""
    part = resize(image[self.top : self.bottom, self.left : self.right], self.side)
    part = part[:, ::-1] if self.flip else part
    if self.side == self.size:
      return np.ascontiguousarray(part)
    square = np.zeros((self.size, self.size, 3), np.uint8)
    square[self.y : self.y + self.side, self.x : self.x + self.side] = part
    return square

  def boxes(self, boxes: Float[np.ndarray, "n 4"]) -> Float[np.ndarray, "n 4"]:
    """Converts boxes from xyxy pixels of the image to xyxy fractions of the square, clipped to the
    crop."""
    result = np.empty(boxes.shape, np.float64)
    for axis in (0, 1):
      ends = np.sort(self.to_square(boxes[:, axis::2], axis), axis=1)
      low = (self.x, self.y)[axis]
      result[:, axis::2] = np.clip(ends, low, low + self.side) / self.size
    return result

  def coverage(
    self, mask: UInt8[np.ndarray, "rows columns"], corner: tuple[int, int], cells: int
  ) -> UInt8[np.ndarray, "cells cells"]:
    """How much of each cell of a grid over the square a mask covers, 0..255.

    Args:
      mask: 0 and 1; a part of the crop, outside of which the mask is 0.
      corner: x and y of its upper left pixel in the image.
      cells: cells per side of the grid.
    """
    grid = np.zeros((cells, cells), np.uint8)
    (first, across), (start, down) = (
      self._fractions(axis, corner[axis], mask.shape[1 - axis], cells) for axis in (0, 1)
    )
    part = np.rint(255 * (down @ mask.astype(np.float32) @ across.T))
    grid[start : start + len(down), first : first + len(across)] = part
    return grid

  def to_square(self, values: np.ndarray, axis: int) -> np.ndarray:
    """Converts image x (axis 0) or y (axis 1) to pixels of the square."""
    low, high = (self.left, self.right) if axis == 0 else (self.top, self.bottom)
    fraction = (np.asarray(values, np.float64) - low) / (high - low)
    if axis == 0 and self.flip:
      fraction = 1 - fraction
    return (self.x, self.y)[axis] + self.side * fraction

  def to_image(self, values: np.ndarray, axis: int) -> np.ndarray:
    """The inverse of `to_square`."""
    low, high = (self.left, self.right) if axis == 0 else (self.top, self.bottom)
    fraction = (np.asarray(values, np.float64) - (self.x, self.y)[axis]) / self.side
    if axis == 0 and self.flip:
      fraction = 1 - fraction
    return low + fraction * (high - low)

  def _fractions(self, axis: int, first: int, length: int, cells: int) -> tuple[int, np.ndarray]:
    """The first cell that a run of pixels overlaps, and the fraction of this cell and the following
    ones that each pixel covers."""
    ends = self.to_square(np.array([first, first + length]), axis) * cells / self.size
    start = max(0, int(np.floor(ends.min() + 1e-9)))
    stop = min(cells, max(start + 1, int(np.ceil(ends.max() - 1e-9))))
    edges = self.to_image(np.arange(start, stop + 1) * self.size / cells, axis)
    low, high = np.minimum(edges[:-1], edges[1:]), np.maximum(edges[:-1], edges[1:])
    pixels = np.arange(first, first + length)
    overlap = np.minimum(high[:, None], pixels + 1) - np.maximum(low[:, None], pixels)
    return start, (np.maximum(overlap, 0) / (high - low)[:, None]).astype(np.float32)


def random_frame(
  generator: np.random.Generator,
  height: int,
  width: int,
  size: int,
  *,
  min_side: int,
  flip: float = 0.0,
  crop: float = 0.0,
  min_crop_size: float = 0.5,
) -> Frame:
  """Samples a frame.

  Args:
    generator: the only source of randomness.
    height, width: size of the image, in pixels.
    size: pixels per side of the model's square.
    min_side: pixels per side of the smallest resized image. Sizes up to `size` are equally likely,
      and so are positions in the square.
    flip, crop: probabilities.
    min_crop_size: smallest crop, as a fraction of the width and of the height.
  """
  side = int(generator.integers(min_side, size + 1))
  x, y = (int(value) for value in generator.integers(0, size - side + 1, 2))
  flipped = bool(generator.random() < flip)
  left, top, right, bottom = 0, 0, width, height
  if generator.random() < crop:
    w, h = (max(1, round(s * generator.uniform(min_crop_size, 1))) for s in (width, height))
    left, top = int(generator.integers(width - w + 1)), int(generator.integers(height - h + 1))
    right, bottom = left + w, top + h
  return Frame(
    left=left, top=top, right=right, bottom=bottom, size=size, side=side, x=x, y=y, flip=flipped
  )
