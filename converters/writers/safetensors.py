"""Writes safetensors files one tensor at a time, which the package's own writer cannot do."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from ..readers.safetensors import DTYPES


def write_safetensors(
  path: Path, entries: Sequence[tuple[str, tuple[int, ...], str]], arrays: Iterable[np.ndarray]
) -> None:
  """Writes a file.

  Args:
    path: the file to write.
    entries: name, shape and dtype of each tensor.
    arrays: the tensors in the same order; one at a time is in memory.
  """
  codes = {dtype: code for code, dtype in DTYPES.items()}
  header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers requires it
  end = 0
  for name, shape, dtype in entries:
    begin, end = end, end + math.prod(shape) * jnp.dtype(dtype).itemsize
    header[name] = {"dtype": codes[dtype], "shape": list(shape), "data_offsets": [begin, end]}
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)  # aligns the tensors
  with path.open("wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    for (name, shape, dtype), array in zip(entries, arrays, strict=True):
      if array.shape != shape or str(array.dtype) != dtype:
        raise ValueError(f"{name} became {array.dtype} {list(array.shape)} while it was written.")
      file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
