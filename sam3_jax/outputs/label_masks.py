"""Masks that do not overlap, given by a map of labels, and masks of several kinds."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

from sam3_jax.outputs.masks import LazyMasks
from sam3_jax.outputs.rle import encode


class LabelMasks(LazyMasks):
  """Masks given by a map of labels.

  Args:
    labels: the label of each pixel.
    values: the label of each mask.
  """

  def __init__(self, labels: Int[np.ndarray, "h w"], values: Sequence[int]):
    self.labels, self.values = labels, list(values)
    self.size = labels.shape[0], labels.shape[1]

  def __len__(self) -> int:
    return len(self.values)

  def rle(self, index: int) -> dict:
    return encode(self[index])

  def at(self, size: tuple[int, int]) -> "LabelMasks":
    rows, columns = (
      (np.arange(new) * old) // new for old, new in zip(self.size, size, strict=True)
    )
    return LabelMasks(self.labels[rows][:, columns], self.values)

  def _mask(self, index: int) -> Bool[np.ndarray, "h w"]:
    return self.labels == self.values[index]

  def _subset(self, index):
    return LabelMasks(self.labels, np.array(self.values, int)[index].tolist())


class JoinedMasks(LazyMasks):
  """Masks of several kinds, over one image.

  Args:
    parts: sequences of one mask each, all of the same size.
    size: height and width of the image.
  """

  def __init__(self, parts: Sequence[LazyMasks], size: tuple[int, int]):
    self.parts, self.size = list(parts), size

  def __len__(self) -> int:
    return len(self.parts)

  def rle(self, index: int) -> dict:
    return self.parts[index].rle(0)

  def at(self, size: tuple[int, int]) -> "JoinedMasks":
    return JoinedMasks([part.at(size) for part in self.parts], size)

  def _mask(self, index: int) -> Bool[np.ndarray, "h w"]:
    return self.parts[index][0]

  def _subset(self, index):
    chosen = np.arange(len(self.parts))[index]
    return JoinedMasks([self.parts[i] for i in chosen], self.size)
