"""Buffers for results that arrive in parts: on the device, or on the host for large masks."""

import contextlib
import functools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from sam3_jax.utils.validation import is_number

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")  # version 2, as a container sees its own
HOST_FRACTION = 0.9  # of the host's free memory for masks; the computation needs the rest


class OutputBuffer:
  """Collects the rows of a result from its parts.

  Masks are on the device. If all together take more than `budget` bytes, they are NumPy arrays on
  the host, where rows without masks use no memory.

  Attributes:
    arrays: the result's arrays by name; empty before the first part.
  """

  def __init__(
    self,
    names: Sequence[str],
    masks: Mapping[str, jax.ShapeDtypeStruct],
    budget: float,
    device: Any = None,
  ):
    """
    Args:
      names: of all arrays.
      masks: shapes and dtypes of the large arrays, with all rows.
      budget: bytes that the large arrays may take on the device.
      device: of the arrays; None for JAX's default.

    Raises:
      ValueError: the budget is not a number of bytes.
    """
    if not (is_number(budget) and budget >= 0):  # NaN is not
      raise ValueError(
        f"memory_budget must be a number of bytes; got {budget!r}. Use 0 for the host's memory."
      )
    self.arrays: dict[str, Any] = {}
    self._names, self._masks = tuple(names), dict(masks)
    [self._rows] = {x.shape[0] for x in masks.values()}
    self._size = sum(x.size * x.dtype.itemsize for x in masks.values())
    self._on_host = self._size > budget
    self._device = device

  def reserve(self, rows: int) -> None:
    """Raises ValueError if the host has too little memory for the masks of `rows` more rows."""
    needed, free = self._size * rows // self._rows, free_memory()
    if self._on_host and needed > HOST_FRACTION * free:
      raise _too_large(rows, needed, free)

  def is_whole(self, rows: np.ndarray) -> bool:
    """Whether `rows` are all rows in order, and the part needs no copy into the buffer."""
    return not self._on_host and np.array_equal(rows, np.arange(self._rows))

  def put(self, part: Any, rows: np.ndarray) -> None:
    """Writes a part into the buffer.

    Args:
      part: a dataclass of arrays, of which it may lack some.
      rows: their indices in the result.

    Raises:
      ValueError: the host has too little memory for its masks.
    """
    if not self.arrays:
      self.arrays = self._empty(part)
    new = {name: array for name, array in vars(part).items() if name in self.arrays}
    masks = self._masks.keys() & new.keys() if self._on_host else set()
    if masks:
      self.reserve(len(rows))
    for name in masks:
      self.arrays[name][rows] = np.asarray(new.pop(name))
    self.arrays |= put_rows({name: self.arrays[name] for name in new}, new, rows)

  def _empty(self, part: Any) -> dict[str, Any]:
    rest = {name: getattr(part, name) for name in self._names if name not in self._masks}
    on_device = functools.partial(jnp.zeros, device=self._device)
    arrays = {name: on_device((self._rows, *x.shape[1:]), x.dtype) for name, x in rest.items()}
    zeros: Any = np.zeros if self._on_host else on_device  # NumPy's use no memory until written
    try:
      return arrays | {name: zeros(x.shape, x.dtype) for name, x in self._masks.items()}
    except MemoryError:
      raise _too_large(self._rows, self._size, free_memory()) from None


@functools.partial(jax.jit, donate_argnums=0)  # in place: masks of many prompts fit once, not twice
def put_rows(whole: Any, part: Any, rows: Array) -> Any:
  """Replaces rows of the arrays of `whole` by those of `part`.

  Writes one row at a time, as XLA:CPU takes 13 times as long to scatter masks in bfloat16.
  """

  def put(i: Array, whole: Any) -> Any:
    row = jax.tree.map(lambda p: jax.lax.dynamic_index_in_dim(p, i, keepdims=False), part)
    return jax.tree.map(
      lambda w, p: jax.lax.dynamic_update_index_in_dim(w, p, rows[i], axis=0), whole, row
    )

  return jax.lax.fori_loop(0, len(rows), put, whole)


def free_memory() -> int:
  """Bytes of host memory available to this process, within the limit of a container.

  `sys.maxsize` where the system reports neither, as outside Linux.
  """
  limits = [sys.maxsize]
  with contextlib.suppress(OSError, KeyError, ValueError):
    limits.append(1024 * _numbers(MEMINFO)["MemAvailable:"])
  with contextlib.suppress(OSError, KeyError, ValueError):  # "max" is no limit
    limit, used = (int((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
    # The page cache counts as used, but can be reclaimed.
    limits.append(limit - used + _numbers(CGROUP / "memory.stat")["inactive_file"])
  return max(0, min(limits))


def _numbers(file: Path) -> dict[str, int]:
  """Numbers by name, from a file whose lines begin with a name and a number."""
  rows = (line.split() for line in file.read_text().splitlines())
  return {name: int(number) for name, number, *_ in rows}


def _too_large(rows: int, needed: int, free: int) -> ValueError:
  prompts = f"{rows} prompts" if rows > 1 else "a prompt"
  return ValueError(
    f"the masks of {prompts} take {needed / 1e9:.1f} GB, but {free / 1e9:.1f} GB of memory are "
    "free; pass a smaller max_detections, a min_score, or fewer prompts per call."
  )
