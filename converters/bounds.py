"""Bounds on what files from other programs may claim, checked before anything is allocated."""

import math
from pathlib import Path

from sam3_jax.utils.json_text import shown

MAX_NAME = 300  # characters
MAX_AXES = 32
MAX_TEXT = 16_000_000  # bytes; a tokenizer.json has 3.6 million, a release's header 0.2 million


def check_name(name: str) -> None:
  """Refuses tensor names that do not fit in one line of a message."""
  if not name or len(name) > MAX_NAME or not name.isprintable():
    raise ValueError(f"{name!r:.100} is not a valid tensor name")


def check_shape(name: str, shape: tuple[int, ...]) -> None:
  """Refuses shapes that NumPy cannot make.

  Shapes without a zero need no bound: their elements have to be in the file.
  """
  if len(shape) > MAX_AXES:
    raise ValueError(f"{name} has {len(shape):,} axes, more than {MAX_AXES}")
  if 0 in shape and math.prod(size for size in shape if size) >= 2**48:
    raise ValueError(f"{name} has the shape {shown(list(shape))}, which no tensor can have")


def read_text(path: Path) -> bytes:
  """Reads a text file.

  Raises:
    ValueError: the file is larger than any that a release has.
  """
  with path.open("rb") as file:
    data = file.read(MAX_TEXT + 1)
  if len(data) > MAX_TEXT:
    raise ValueError(f"it is larger than {MAX_TEXT // 1_000_000} MB")
  return data
