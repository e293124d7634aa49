"""Room for results that are found part by part: on the device, or, where their masks are too large
for that, in the host's memory; and how much of that there is."""

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

MEMORY = Path("/proc/meminfo")
GROUP = Path("/sys/fs/cgroup")  # version 2, as a container sees its own
SHARE = 0.9  # of the host's free memory that masks may take: the model computes in the rest


class Room:
  """The rows of a result, put together as its parts are found.

  Masks lie on the device, or, if all together take more than `budget` bytes, in the host's memory
  as NumPy arrays, where rows without masks take nothing.

  Attributes:
    arrays: by name, a row of each for every row of the result; empty before the first part.
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
      masks: shapes and dtypes of those that are large, with all rows.
      budget: bytes of the device that they may take.
      device: for all but masks that are too large for it; None for JAX's default.

    Raises:
      ValueError: the budget is no number of bytes.
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
    """Raises ValueError if the masks of so many rows more have no room on the host."""
    needed, free = self._size * rows // self._rows, free_memory()
    if self._on_host and needed > SHARE * free:
      raise _no_room(rows, needed, free)

  def is_whole(self, rows: np.ndarray) -> bool:
    """Whether these rows are all there are, in order, and may stay where they are."""
    return not self._on_host and np.array_equal(rows, np.arange(self._rows))

  def put(self, part: Any, rows: np.ndarray) -> None:
    """Puts what `part`, a dataclass of arrays, has of these rows into its place.

    Raises:
      ValueError: the host has no room for its masks.
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
    zeros: Any = np.zeros if self._on_host else on_device  # NumPy's take no memory until written
    try:
      return arrays | {name: zeros(x.shape, x.dtype) for name, x in self._masks.items()}
    except MemoryError:
      raise _no_room(self._rows, self._size, free_memory()) from None


@functools.partial(jax.jit, donate_argnums=0)  # in place: masks of many prompts fit once, not twice
def put_rows(whole: Any, part: Any, rows: Array) -> Any:
  """`whole` with these rows of its arrays replaced by those of `part`. Row after row: XLA:CPU takes
  13 times as long to scatter masks in bfloat16."""

  def put(i: Array, whole: Any) -> Any:
    row = jax.tree.map(lambda p: jax.lax.dynamic_index_in_dim(p, i, keepdims=False), part)
    return jax.tree.map(
      lambda w, p: jax.lax.dynamic_update_index_in_dim(w, p, rows[i], axis=0), whole, row
    )

  return jax.lax.fori_loop(0, len(rows), put, whole)


def free_memory() -> int:
  """Bytes that this process can still get of the host's memory: what the system calls available,
  within the limit of a container; `sys.maxsize` where neither is told, as on other than Linux."""
  limits = [sys.maxsize]
  with contextlib.suppress(OSError, KeyError, ValueError):
    limits.append(1024 * _numbers(MEMORY)["MemAvailable:"])
  with contextlib.suppress(OSError, KeyError, ValueError):  # "max" is no limit
    limit, used = (int((GROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
    # Files that were read, and can be forgotten again, count as used.
    limits.append(limit - used + _numbers(GROUP / "memory.stat")["inactive_file"])
  return max(0, min(limits))


def _numbers(file: Path) -> dict[str, int]:
  """Of a file whose lines begin with a name and a number."""
  rows = (line.split() for line in file.read_text().splitlines())
  return {name: int(number) for name, number, *_ in rows}


def _no_room(rows: int, needed: int, free: int) -> ValueError:
  prompts = f"{rows} prompts" if rows > 1 else "a prompt"
  return ValueError(
    f"the masks of {prompts} take {needed / 1e9:.1f} GB, too much for the {free / 1e9:.1f} GB of "
    "memory that are free; pass a smaller max_detections, a min_score, or fewer prompts at a time."
  )
