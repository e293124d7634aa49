"""Invertible changes of a tensor's memory layout, from the source's to ours."""

import dataclasses
from typing import Protocol

import numpy as np

from sam3_jax.config import Config


class Transform(Protocol):
  """A change of layout and its inverse."""

  def apply(self, array: np.ndarray, config: Config) -> np.ndarray: ...

  def undo(self, array: np.ndarray, config: Config) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Axes:
  """Permutes the source's axes into this order."""

  order: tuple[int, ...]

  def apply(self, array: np.ndarray, config: Config) -> np.ndarray:
    return np.transpose(array, self.order)

  def undo(self, array: np.ndarray, config: Config) -> np.ndarray:
    return np.transpose(array, np.argsort(self.order))


@dataclasses.dataclass(frozen=True)
class HalfSplit:
  """Reorders the rows of queries and keys: each head's even channels, then its odd.

  The sources apply RoPE to adjacent channels; we rotate channel i with channel i + half.

  Attributes:
    heads: of the attention; None for those of the trunk.
  """

  heads: int | None = None

  def apply(self, array: np.ndarray, config: Config) -> np.ndarray:
    pairs = array.reshape(self.heads or config.trunk.heads, -1, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)

  def undo(self, array: np.ndarray, config: Config) -> np.ndarray:
    halves = array.reshape(self.heads or config.trunk.heads, 2, -1, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)


class Grid:
  """Reshapes a position table [1, n * n, width] to [n, n, width]."""

  def apply(self, array: np.ndarray, config: Config) -> np.ndarray:
    side = config.trunk.pretrain_grid
    return array.reshape(side, side, array.shape[-1])

  def undo(self, array: np.ndarray, config: Config) -> np.ndarray:
    return array.reshape(1, -1, array.shape[-1])


@dataclasses.dataclass(frozen=True)
class Squeeze:
  """Removes axes of size 1."""

  axes: tuple[int, ...]

  def apply(self, array: np.ndarray, config: Config) -> np.ndarray:
    return np.squeeze(array, self.axes)

  def undo(self, array: np.ndarray, config: Config) -> np.ndarray:
    return np.expand_dims(array, self.axes)


class Pointwise:
  """Turns the kernel of a 1 x 1 convolution [out, in, 1, 1] into that of a dense layer."""

  def apply(self, array: np.ndarray, config: Config) -> np.ndarray:
    return array[:, :, 0, 0].T

  def undo(self, array: np.ndarray, config: Config) -> np.ndarray:
    return array.T[:, :, None, None]


POINTWISE = Pointwise()
DENSE = Axes((1, 0))  # torch's (out, in)
CONV = Axes((2, 3, 1, 0))  # torch's (out, in, height, width)
DECONV = Axes((2, 3, 0, 1))  # torch's ConvTranspose2d: (in, out, height, width)
