"""What other programs' files say, looked at before it is believed."""

import math
from pathlib import Path

from sam3_jax.utils.json_text import shown

MAX_NAME = 300  # characters
MAX_AXES = 32
MAX_DIGITS = 40
MAX_TEXT = 16_000_000  # bytes; tokenizer.json has 3.6 million, the header of a release 0.2 million


def check_name(name: str) -> None:
  """Refuses names that would not stand in one line of a message."""
  if not name or len(name) > MAX_NAME or not name.isprintable():
    raise ValueError(f"{name!r:.100} is no name of a tensor")


def check_shape(name: str, shape: tuple[int, ...]) -> None:
  """Refuses what NumPy cannot make; where no axis is 0, the elements have to be in the file too."""
  if len(shape) > MAX_AXES:
    raise ValueError(f"{name} has {len(shape):,} axes, more than {MAX_AXES}")
  if 0 in shape and math.prod(size for size in shape if size) >= 2**48:
    raise ValueError(f"{name} has the shape {shown(list(shape))}, which no tensor can have")


def read_text(path: Path) -> bytes:
  """All of a file that holds a text.

  Raises:
    ValueError: it is larger than any such file.
  """
  with path.open("rb") as file:
    data = file.read(MAX_TEXT + 1)
  if len(data) > MAX_TEXT:
    raise ValueError(f"it is larger than {MAX_TEXT // 1_000_000} MB")
  return data
