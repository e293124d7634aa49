"""The memory bank: what tracked objects have of earlier frames, on the device, in static shapes.

Each object has a slot with a fixed number of rows, so memory does not grow with the video. The host
knows which frame is in which row (`tracker_state`); the device only gathers and writes rows.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from sam3_jax.config import Config
from sam3_jax.inference.video.selection import POINTERS, Reading
from sam3_jax.model.video.tracker import video_config
from sam3_jax.utils.pytrees import Sliceable

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)  # numbers of slots; each compiles its own programs
RING = POINTERS  # rows for previous frames: 15 selected ones and the latest


@struct.dataclass
class MemoryBank(Sliceable):
  """Rows of memories and pointers; O slots, R rows.

  Attributes:
    memory: cells last, so that a TPU pads little.
    pointers: float32.
  """

  memory: Float[Array, "O R C HW"]
  pointers: Float[Array, "O R D"]

  @property
  def rows(self) -> int:
    return self.pointers.shape[1]


@struct.dataclass
class Reads:
  """What each object reads from its rows; padded, see `VideoTracker.read_memory`."""

  memory_row: Int[Any, "O F"]
  memory_index: Int[Any, "O F"]
  memory_valid: Bool[Any, "O F"]
  pointer_row: Int[Any, "O E"]
  pointer_time: Float[Any, "O E"]
  pointer_valid: Bool[Any, "O E"]


def bucket(objects: int) -> int:
  """The number of slots for N objects; raises ValueError beyond the largest bucket."""
  if objects > BUCKETS[-1]:
    raise ValueError(f"at most {BUCKETS[-1]} objects can be tracked at once; got {objects}.")
  return next(size for size in BUCKETS if size >= objects)


def bank_shapes(config: Config, objects: int, dtype: DTypeLike) -> MemoryBank:
  """The shapes of a bank with N slots."""
  video = video_config(config)
  rows = RING + video.conditioning
  memory = objects, rows, video.memory_channels, config.grid**2
  return MemoryBank(
    jax.ShapeDtypeStruct(memory, jnp.dtype(dtype)),  # pyright: ignore[reportArgumentType]
    jax.ShapeDtypeStruct((objects, rows, config.width), jnp.dtype(jnp.float32)),  # pyright: ignore[reportArgumentType]
  )


def gather(
  bank: MemoryBank, reads: Reads
) -> tuple[Float[Array, "O F HW C"], Float[Array, "O E D"]]:
  """The memories and the pointers to read."""
  slots = jnp.arange(len(reads.memory_row), dtype=jnp.int32)[:, None]
  memory = bank.memory[slots, reads.memory_row]
  return jnp.swapaxes(memory, 2, 3), bank.pointers[slots, reads.pointer_row]


def write(
  bank: MemoryBank,
  rows: Int[Any, " O"],
  memory: Float[Array, "O C HW"],
  pointers: Float[Array, "O D"],
) -> MemoryBank:
  """Writes one row of each slot; a row number of `bank.rows` writes nothing."""
  slots = jnp.arange(len(rows), dtype=jnp.int32)
  return MemoryBank(
    bank.memory.at[slots, rows].set(memory.astype(bank.memory.dtype), mode="drop"),
    bank.pointers.at[slots, rows].set(pointers, mode="drop"),
  )


def pack_reads(
  readings: Sequence[tuple[Reading, dict[int, int]] | None], config: Config, conditioning: int
) -> Reads:
  """Packs what each slot reads into padded NumPy arrays.

  Args:
    readings: for each slot, the reading and the row of each frame; None for a slot that reads
      nothing.
    config: sizes of the model.
    conditioning: the largest number of conditioning frames, which sets the padded width.
  """
  video = video_config(config)
  frames, pointers = conditioning + video.memories - 1, conditioning + POINTERS - 1
  rows, index = (np.zeros((len(readings), frames), np.int32) for _ in range(2))
  pointer_rows = np.zeros((len(readings), pointers), np.int32)
  times = np.zeros((len(readings), pointers), np.float32)
  valid, pointer_valid = np.zeros(rows.shape, bool), np.zeros(times.shape, bool)
  for slot, item in enumerate(readings):
    if item is None:
      continue
    reading, row_of = item
    for i, (frame, code) in enumerate(reading.memories):
      rows[slot, i], index[slot, i], valid[slot, i] = row_of[frame], code, True
    for i, (frame, time) in enumerate(reading.pointers):
      pointer_rows[slot, i], times[slot, i], pointer_valid[slot, i] = row_of[frame], time, True
  return Reads(rows, index, valid, pointer_rows, times, pointer_valid)
