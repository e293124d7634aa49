"""The host store: arrays of frames that left the bank, within a budget of memory, the rest on disk.

A session keeps in it what backward passes and corrections may read: 1 MB an object and frame of the
released model.
"""

import dataclasses
import tempfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float

from sam3_jax.inference.video.archive import Archive, write_arrays

Key: TypeAlias = tuple[int, int]  # object, frame

BUDGET = 2_000_000_000  # bytes, of 3,000 objects on a frame at the released size in bfloat16


@dataclasses.dataclass(frozen=True)
class StoredFrame:
  """What is kept of an object on a frame.

  Attributes:
    memory: as in the bank.
    pointer: the object pointer.
    mask_logits: low-resolution logits.
  """

  memory: Float[Any, "C HW"]
  pointer: Float[np.ndarray, " D"]
  mask_logits: Float[np.ndarray, "Hm Wm"]

  @property
  def nbytes(self) -> int:
    return sum(array.nbytes for array in vars(self).values())


class HostStore:
  """Arrays by object and frame; those used longest ago are moved to disk beyond the budget.

  Args:
    budget: bytes of memory.
    directory: for the files beyond it; None for a temporary directory, which is removed with the
      store.
  """

  def __init__(self, budget: float = BUDGET, directory: str | Path | None = None):
    self.budget = budget
    self._given = directory
    self._own: tempfile.TemporaryDirectory | None = None
    self._frames: OrderedDict[Key, StoredFrame] = OrderedDict()
    self._files: dict[Key, Path] = {}
    self.bytes_in_memory = 0
    self._written = 0

  def __len__(self) -> int:
    return len(self._frames) + len(self._files)

  def __contains__(self, key: Key) -> bool:
    return key in self._frames or key in self._files

  def __iter__(self) -> Iterator[Key]:
    """All objects and frames."""
    yield from list(self._frames)
    yield from list(self._files)

  def put(self, key: Key, frame: StoredFrame) -> None:
    """Stores a frame of an object, in place of an earlier one.

    Raises:
      OSError: the disk is full.
    """
    self.pop(key)
    self._frames[key] = frame
    self.bytes_in_memory += frame.nbytes
    while self.bytes_in_memory > self.budget and len(self._frames) > 1:
      oldest, spilled = self._frames.popitem(last=False)
      self.bytes_in_memory -= spilled.nbytes
      self._files[oldest] = path = self._directory() / f"{self._written}.npz"
      self._written += 1
      _write_frame(path, spilled)

  def get(self, key: Key) -> StoredFrame:
    """The frame of an object; raises KeyError if it is not stored."""
    if key in self._files:
      return _read_frame(self._files[key])
    self._frames.move_to_end(key)
    return self._frames[key]

  def pop(self, key: Key) -> None:
    """Removes a frame, if it is stored."""
    if key in self._frames:
      self.bytes_in_memory -= self._frames.pop(key).nbytes
    elif key in self._files:
      self._files.pop(key).unlink(missing_ok=True)

  def remove_object(self, identity: int) -> None:
    """Removes all frames of an object."""
    for key in list(self):
      if key[0] == identity:
        self.pop(key)

  def close(self) -> None:
    """Forgets all frames, and removes their files."""
    for key in list(self):
      self.pop(key)
    if self._own is not None:
      self._own.cleanup()
      self._own = None

  def _directory(self) -> Path:
    if self._given is not None:
      directory = Path(self._given)
      directory.mkdir(parents=True, exist_ok=True)
      return directory
    if self._own is None:
      self._own = tempfile.TemporaryDirectory(prefix="sam3-jax-video-")
    return Path(self._own.name)


def _write_frame(path: Path, frame: StoredFrame) -> None:
  with path.open("wb") as file:
    write_arrays(file, vars(frame).items())


def _read_frame(path: Path) -> StoredFrame:
  with Archive(path) as arrays:
    return StoredFrame(**{name: arrays[name] for name in arrays})
