"""A tensor of a source checkpoint, described but not yet read."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Source:
  """A tensor that `read` loads.

  Attributes:
    shape: its shape.
    dtype: its dtype as stored.
    read: returns the array, which may be a view of a memory map.
    container: keys, joined by dots, of the dictionary in the file that holds the tensor; empty
      where the file is a single dictionary, as most are.
    in_file: False if the tensor comes from the base checkpoint or was computed by merging LoRA.
    name: the tensor's name in the file, for messages; empty if it equals the layout's name.
  """

  shape: tuple[int, ...]
  dtype: str
  read: Callable[[], np.ndarray]
  container: str = ""
  in_file: bool = True
  name: str = ""

  @classmethod
  def of(cls, array: np.ndarray) -> "Source":
    """A tensor that is already in memory."""
    return cls(array.shape, str(array.dtype), lambda: array)

  @property
  def parameters(self) -> int:
    return math.prod(self.shape)
