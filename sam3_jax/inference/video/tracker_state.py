"""The state of a tracker: groups, their slots and rows in the bank, and the host store.

A tracked frame takes four steps: choose what each group reads, load what is not in the bank, run
the program, and record its results. Memory stays bounded: a group has as many rows as a frame can
read. With `history`, all frames are stored on the host and loaded again for backward passes and
corrections. Without it, a frame that no later frame of the pass can read is forgotten.
"""

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float

from sam3_jax.config import Config
from sam3_jax.inference.video import bank as banks
from sam3_jax.inference.video.bank import MemoryBank, Reads, bucket, pack_reads
from sam3_jax.inference.video.groups import Group, memberships
from sam3_jax.inference.video.selection import (
  POINTERS,
  Reading,
  closest_conditioning,
  plan_reading,
  previous_frames,
)
from sam3_jax.inference.video.store import HostStore, StoredFrame
from sam3_jax.model.video.tracker import video_config
from sam3_jax.rules import Rules


@dataclasses.dataclass
class TrackerState:
  """What is known of the tracked objects.

  Attributes:
    config: sizes of the model.
    rules: thresholds.
    dtype: of memories.
    device: of the bank.
    store: of conditioning frames, and of all frames with `history`.
    history: whether frames stay when they leave the bank.
    length: frames of the video; None if unknown.
    groups: of objects.
    slots: of each object, in the bank.
    bank: None before the first object.
    write: the program that writes rows of the bank.
  """

  config: Config
  rules: Rules
  dtype: DTypeLike
  device: Any
  write: Any
  store: HostStore
  history: bool
  length: int | None
  groups: list[Group] = dataclasses.field(default_factory=list)
  slots: dict[int, int] = dataclasses.field(default_factory=dict)
  bank: MemoryBank | None = None

  @property
  def owners(self) -> dict[int, Group]:
    """The group of each object."""
    return {identity: group for group, _, identity in memberships(self.groups)}

  @property
  def capacity(self) -> int:
    """The number of slots."""
    return 0 if self.bank is None else len(self.bank)

  @property
  def rows(self) -> int:
    """The number of rows of a slot."""
    return banks.RING + video_config(self.config).conditioning

  def add(self, identity: int, group: Group) -> None:
    """Adds an object to a group, which may be new; grows the bank if no slot is free.

    Raises:
      ValueError: too many objects.
    """
    if len(self.slots) >= self.rules.max_num_objects:
      raise ValueError(
        f"at most {self.rules.max_num_objects} objects can be tracked at once "
        "(rules.max_num_objects); remove one first."
      )
    taken = set(self.slots.values())
    slot = next(i for i in range(len(taken) + 1) if i not in taken)
    self.reserve(slot + 1)
    self.slots[identity] = slot
    group.objects.append(identity)
    group.prompted[identity] = set()
    if group not in self.groups:
      self.groups.append(group)

  def reserve(self, objects: int) -> None:
    """Grows the bank to at least N slots, in the buckets of `bank.BUCKETS`."""
    if objects <= self.capacity:
      return
    shapes = banks.bank_shapes(self.config, bucket(objects) - self.capacity, self.dtype)
    new = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    if self.bank is not None:
      new = jax.tree.map(lambda *x: jnp.concatenate(x), self.bank, new)
    self.bank = jax.device_put(new, self.device)

  def remove(self, identity: int) -> None:
    """Removes an object from its group, and the group with its last object."""
    self.owners[identity].remove(identity)
    self.slots.pop(identity)
    self.groups = [group for group in self.groups if group.objects]
    self.store.remove_object(identity)

  def split(self, identity: int) -> Group:
    """Moves an object to a group of its own, and returns that group."""
    self.groups.append(self.owners[identity].split(identity))
    return self.groups[-1]

  def reading(self, group: Group, frame: int, backward: bool) -> Reading:
    """What a group reads on a frame that is tracked without a prompt."""
    if self.rules.memory_selection:
      previous = previous_frames(
        group.scores, frame,
        length=self.length, min_score=self.rules.min_memory_score, reverse=backward,
      )  # fmt: skip
    else:  # the oldest of 16 gives no pointer, which leaves 15
      step = 1 if backward else -1
      previous = list(range(frame + POINTERS * step, frame, -step))
    return self.plan(group, previous, group.previous.keys(), frame, backward)

  def correction_reading(self, group: Group, frame: int, memory: bool) -> Reading:
    """What a prompt on a frame reads: nothing, or the conditioning frames and the neighbor.

    No other frames: Meta's code looks for their scores where they are not kept. Nothing on a frame
    that no pass has reached.
    """
    if not memory or frame not in group.backward:
      return Reading()
    backward = group.backward[frame]
    previous = previous_frames({}, frame, length=self.length, min_score=0, reverse=backward)
    seen = {t for t in group.previous if t not in group.unseen}
    return self.plan(group, previous, seen, frame, backward)

  def plan(
    self, group: Group, previous: list[int], stored: Collection[int], frame: int, backward: bool
  ) -> Reading:
    """See `selection.plan_reading`."""
    video = video_config(self.config)
    return plan_reading(
      closest_conditioning(group.conditioning, frame, video.conditioning), previous, stored,
      frame, memories=video.memories, length=self.length, reverse=backward,
    )  # fmt: skip

  def pack(self, readings: Sequence[tuple[Group, Reading]]) -> Reads:
    """Loads what groups read into the bank, and packs it for the programs."""
    self._load(readings)
    by_slot: list[Any] = [None] * self.capacity
    for group, reading in readings:
      for identity in group.objects:
        by_slot[self.slots[identity]] = reading, group.rows
    several = any(
      sum(t in group.conditioning for t, _ in reading.memories) > 1 for group, reading in readings
    )
    return pack_reads(
      by_slot, self.config, video_config(self.config).conditioning if several else 1
    )

  def take_rows(
    self, groups: Iterable[Group], frame: int, keep: Iterable[Iterable[int]]
  ) -> np.ndarray:
    """The row of each slot to write a frame to; the number of rows for slots of other groups.

    Args:
      groups: those that write.
      frame: the frame to write.
      keep: for each group, frames whose rows stay.
    """
    rows = np.full(self.capacity, self.rows, np.int32)
    for group, kept in zip(groups, keep, strict=True):
      row = self._take_row(group, frame, set(kept))
      for identity in group.objects:
        rows[self.slots[identity]] = row
    return rows

  def by_slot(self, values: Mapping[int, Any], fill: Any) -> np.ndarray:
    """An array with a value for each object in its slot, and `fill` in the other slots."""
    fill = np.asarray(fill)
    array = np.broadcast_to(fill, (self.capacity, *fill.shape)).copy()
    for identity, value in values.items():
      array[self.slots[identity]] = value
    return array

  def keep(
    self, identity: int, frame: int, memory: Any, pointer: np.ndarray, masks: Float[Any, "Hm Wm"]
  ) -> None:
    """Stores a frame of an object on the host."""
    arrays = (np.array(x) for x in (memory, pointer, masks))  # copies of rows of larger arrays
    self.store.put((identity, frame), StoredFrame(*arrays))

  def forget_conditioning(self, group: Group, frame: int, backward: bool) -> None:
    """Forgets conditioning frames behind a frame that no later frame of the pass can read."""
    sign = -1 if backward else 1
    behind = sorted(
      (t for t in group.conditioning if sign * (frame - t) >= 0), key=lambda t: sign * t
    )
    for t in behind[: -video_config(self.config).conditioning]:
      group.forget(t)
      for identity in group.objects:
        self.store.pop((identity, t))

  def _take_row(self, group: Group, frame: int, keep: set[int]) -> int:
    if frame in group.rows:
      return group.rows[frame]
    if len(group.rows) == self.rows:
      self._forget(group, self._least_useful(group, frame, keep))
    row = min(set(range(self.rows)) - set(group.rows.values()))
    group.rows[frame] = row
    return row

  def _least_useful(self, group: Group, frame: int, keep: set[int]) -> int:
    """The frame whose row is given up. In a pass without history no later frame reads it, unless it
    is stored: it has a low score, or there are enough previous frames after it."""
    limit = video_config(self.config).conditioning
    near = closest_conditioning(group.conditioning, frame, limit)
    scores, least = group.scores, self.rules.min_memory_score

    def usefulness(t: int) -> tuple[int, int]:
      if t in group.conditioning:
        return (3 if t in near else 1), -abs(t - frame)
      good = not self.rules.memory_selection or scores.get(t, 0) > least
      return (2 if good else 0), -abs(t - frame)

    return min((t for t in group.rows if t not in keep), key=usefulness)

  def _forget(self, group: Group, frame: int) -> None:
    group.rows.pop(frame)
    if not self.history and frame in group.previous:
      group.drop(frame)

  def _load(self, readings: Sequence[tuple[Group, Reading]]) -> None:
    """Writes the frames that groups read, and that are not in the bank, from the store."""
    missing = {
      id(group): [t for t in sorted(reading.frames) if t not in group.rows]
      for group, reading in readings
    }
    for i in range(max(map(len, missing.values()), default=0)):
      parts = [(g, r, missing[id(g)][i]) for g, r in readings if i < len(missing[id(g)])]
      frames: dict[int, StoredFrame] = {}
      rows = np.full(self.capacity, self.rows, np.int32)
      for group, reading, frame in parts:
        row = self._take_row(group, frame, reading.frames)
        for identity in group.objects:
          frames[identity] = self.store.get((identity, frame))
          rows[self.slots[identity]] = row
      memories = {identity: stored.memory for identity, stored in frames.items()}
      pointers = {identity: stored.pointer for identity, stored in frames.items()}
      first = next(iter(frames.values()))
      self.bank = self.write(
        self.bank, rows,
        self.by_slot(memories, np.zeros_like(first.memory)),
        self.by_slot(pointers, np.zeros_like(first.pointer)),
      )  # fmt: skip


def slot_groups(state: TrackerState) -> tuple[np.ndarray, np.ndarray]:
  """For each slot, the number of its group, and its position there; free slots are alone."""
  numbers = {id(group): state.slots[group.objects[0]] for group in state.groups}
  group = np.arange(state.capacity, dtype=np.int32)
  order = np.zeros(state.capacity, np.int32)
  for owner, member, identity in memberships(state.groups):
    group[state.slots[identity]] = numbers[id(owner)]
    order[state.slots[identity]] = member
  return group, order
