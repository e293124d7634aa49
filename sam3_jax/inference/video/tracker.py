"""The steps of tracking: answer a prompt, remember prompted objects, track objects to a frame."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, UInt8

from sam3_jax.inference.video.bank import Reads
from sam3_jax.inference.video.functions import TrackedObjects
from sam3_jax.inference.video.groups import FrameRecord, Group
from sam3_jax.inference.video.programs import VideoPrograms
from sam3_jax.inference.video.prompts import Answer, mask_answer, pack_points, resize_mask
from sam3_jax.inference.video.selection import Reading
from sam3_jax.inference.video.tracker_state import TrackerState, slot_groups
from sam3_jax.inputs.visual_prompts import VisualPrompt
from sam3_jax.model.video.tracker import MASK_PROMPT_STRIDE
from sam3_jax.types import VisualEmbedding

PARTS = ("visual", "video")  # of the parameters, which the programs of tracking read


class ObjectResult(NamedTuple):
  """An object on a frame.

  Attributes:
    mask_logits: low-resolution logits.
    object_logit: positive if the object is on the frame.
    iou: the estimated IoU of the mask.
  """

  mask_logits: Float[np.ndarray, "Hm Wm"]
  object_logit: float
  iou: float


Results = dict[int, ObjectResult]  # by object
Pointers = dict[int, np.ndarray]  # likewise


@dataclasses.dataclass
class Tracker:
  """Runs the programs of a model on the state of its tracked objects.

  Attributes:
    model: with the parameters `visual` and `video`; read at each step.
    programs: its jitted functions.
    state: of the objects.
    readings: what each group read on the frame of the last `start`, for tests and reports.
  """

  model: Any
  programs: VideoPrograms
  state: TrackerState
  readings: list[tuple[Group, Reading]] = dataclasses.field(default_factory=list)

  @property
  def _params(self) -> dict[str, Any]:
    return {name: self.model.params[name] for name in PARTS}

  def encode(self, pixels: UInt8[Any, "Hi Wi 3"] | Float[Any, "Hi Wi 3"]) -> VisualEmbedding:
    """Encodes a frame of the model's input size: uint8, or normalized float32."""
    pixels = jax.device_put(np.asarray(pixels)[None], self.model.device)
    return self.programs.encode(self.model.params, pixels)

  def answer(
    self,
    embedding: VisualEmbedding,
    identity: int,
    frame: int,
    prompt: VisualPrompt,
    size: tuple[int, int],
    earlier: Float[np.ndarray, "Hm Wm"] | None,
    memory: bool = False,
  ) -> Answer:
    """Answers points and boxes of one object.

    Args:
      embedding: of the frame.
      identity, frame: the object, and the frame of the prompt.
      prompt: checked with `check_visual`.
      size: height and width of the frame.
      earlier: the object's mask logits on this frame.
      memory: whether the object's memories are read.
    """
    state, config = self.state, self.state.config
    packed = pack_points(
      prompt, size, earlier, mask_size=config.mask_size, max_points=state.rules.max_points
    )
    ambiguous, group = np.array([prompt.is_ambiguous]), state.owners[identity]
    if memory:
      slot = state.slots[identity]
      reads = state.pack([(group, state.correction_reading(group, frame, memory))])
      own = jax.tree.map(lambda x: x[slot : slot + 1], reads)
      found = self.programs.answer_with_memory(
        self._params, state.bank, embedding, own, np.int32(slot), packed, ambiguous
      )
    else:
      found = self.programs.answer(self._params, embedding, packed, ambiguous)
    found = jax.device_get(found)
    logit, iou = float(found.object_logit[0]), float(found.iou[0])
    return Answer(found.pointers[0], logit, iou, logits=found.mask_logits[0])

  def answer_mask(self, embedding: VisualEmbedding, mask: Bool[np.ndarray, "h w"]) -> Answer:
    """Answers a mask over the frame."""
    side = MASK_PROMPT_STRIDE * self.state.config.mask_size
    square = resize_mask(mask.astype(np.float32), (side, side))
    return mask_answer(self.mask_pointer(embedding, square), mask, bool(mask.any()))

  def mask_pointer(
    self, embedding: VisualEmbedding, mask: Float[np.ndarray, "S S"]
  ) -> Float[np.ndarray, " D"]:
    """The object pointer of a mask in [0, 1] of 16 times the grid."""
    if not mask.any():
      return np.asarray(self.model.params["video"]["no_object_pointer"], np.float32)
    found = self.programs.answer_mask(self._params, embedding, mask[None])
    return np.asarray(found.pointers)[0]

  def remember(
    self, embedding: VisualEmbedding, frame: int, answers: Mapping[int, Answer]
  ) -> Results:
    """Makes a frame a conditioning frame of all groups with prompts on it.

    Args:
      embedding: of the frame.
      frame: its number.
      answers: of the objects that were prompted. The other objects of their groups keep what they
        have on this frame, with a new memory.
    """
    state, side = self.state, self.state.config.mask_size
    groups = [group for group in state.groups if any(i in answers for i in group.objects)]
    results: Results = {}
    pointers: Pointers = {}
    for group in groups:
      for member, identity in enumerate(group.objects):
        if identity in answers:
          answer = answers[identity]
          found = ObjectResult(answer.mask_logits(side), answer.object_logit, answer.iou)
          pointers[identity] = answer.pointer
        else:
          found, pointers[identity] = self._earlier(group, member, frame)
        results[identity] = found
    rows = state.take_rows(groups, frame, [()] * len(groups))
    empty = np.zeros((side, side), np.float32)
    arrays: Any = (
      state.by_slot({i: x.mask_logits for i, x in results.items()}, empty),
      state.by_slot({i: x.iou for i, x in results.items()}, np.float32(0)),
      state.by_slot({i: x.object_logit for i, x in results.items()}, np.float32(0)),
      state.by_slot(pointers, np.zeros(state.config.width, np.float32)),
    )
    objects = TrackedObjects(*arrays)
    numbers, order = slot_groups(state)
    state.bank, memory = self.programs.remember(
      self._params, state.bank, embedding, objects, numbers, order, rows
    )
    for group in groups:
      found = [results[identity] for identity in group.objects]
      group.condition(frame, _record(found))
    self._keep(frame, results, memory, pointers)
    return results

  def start(
    self, embedding: VisualEmbedding, frame: int, groups: Sequence[Group], backward: bool
  ) -> tuple[TrackedObjects, Any]:
    """Starts to track groups to a frame; `finish` takes the result."""
    state, reads = self.state, self._read(frame, groups, backward)
    rows = self._rows(frame, groups)
    state.bank, found, memory = self.programs.track(
      self._params, state.bank, embedding, reads, rows
    )
    return found, memory

  def finish(
    self, started: tuple[TrackedObjects, Any], frame: int, groups: Sequence[Group], backward: bool
  ) -> Results:
    """Waits for the result of `start`, and records it."""
    results, pointers = self.record(started[0], frame, groups, backward)
    if self.state.history:
      self._keep(frame, results, started[1], pointers)
    return results

  def propagate(
    self, embedding: VisualEmbedding, frame: int, groups: Sequence[Group], backward: bool,
    found: Collection[int],
  ) -> TrackedObjects:  # fmt: skip
    """Starts to track groups to a frame, without memories of it; `record` takes the result, and
    `memorize` the memories.

    Args:
      embedding: of the frame.
      frame: its number.
      groups: those to track.
      backward: direction of the pass.
      found: ids of objects of concepts.
    """
    reads = self._read(frame, groups, backward)
    clicked = np.ones(self.state.capacity, bool)
    clicked[[self.state.slots[identity] for identity in found]] = False
    return self.programs.propagate(self._params, self.state.bank, embedding, reads, clicked)

  def record(
    self, found: TrackedObjects, frame: int, groups: Sequence[Group], backward: bool
  ) -> tuple[Results, Pointers]:
    """Waits for tracked objects, and records their numbers."""
    found = jax.device_get(found)
    masks, all_pointers = np.asarray(found.mask_logits), np.asarray(found.pointers)
    results: Results = {}
    pointers: Pointers = {}
    for group in groups:
      for identity in group.objects:
        slot = self.state.slots[identity]
        logit, iou = float(found.object_logit[slot]), float(found.iou[slot])
        results[identity] = ObjectResult(masks[slot], logit, iou)
        pointers[identity] = all_pointers[slot]
      group.track(frame, _record([results[identity] for identity in group.objects]), backward)
    return results, pointers

  def memorize_tracked(
    self, embedding: VisualEmbedding, frame: int, found: TrackedObjects, groups: Sequence[Group],
    results: Results, pointers: Pointers,
  ) -> None:  # fmt: skip
    """Makes memories of clicked objects from the result of `propagate`."""
    state, rows = self.state, self._rows(frame, groups)
    state.bank, memory = self.programs.memorize_tracked(
      self._params, state.bank, embedding, found, rows
    )
    if state.history:
      kept = {i: results[i] for group in groups for i in group.objects}
      self._keep(frame, kept, memory, pointers)

  def memorize_found(
    self, embedding: VisualEmbedding, frame: int, groups: Sequence[Group],
    masks: Sequence[Results], results: Results, pointers: Pointers,
  ) -> None:  # fmt: skip
    """Makes memories of objects of concepts, also on conditioning frames.

    Args:
      embedding: of the frame.
      frame: its number.
      groups: of all objects of the concepts.
      masks: for each concept, the masks to remember; the objects of a concept compete for cells.
      results, pointers: of the objects, to be kept.
    """
    state, side = self.state, self.state.config.mask_size
    rows = self._rows(frame, groups)
    # Slots without an object have numbers of their own, after those of the concepts.
    owner = np.arange(state.capacity, dtype=np.int32)
    order = np.zeros(state.capacity, np.int32)
    for mine in masks:
      slots = [state.slots[identity] for identity in mine]
      owner[slots], order[slots] = min(slots, default=0), np.arange(len(slots))
    logits = {i: x.mask_logits for mine in masks for i, x in mine.items()}
    arrays = (
      state.by_slot(logits, np.zeros((side, side), np.float32)),
      state.by_slot(pointers, np.zeros(state.config.width, np.float32)),
    )
    state.bank, memory = self.programs.memorize_found(
      self._params, state.bank, embedding, *arrays, owner, order, rows
    )
    kept = {
      i: results[i]
      for group in groups
      for i in group.objects
      if state.history or frame in group.conditioning
    }
    self._keep(frame, kept, memory, pointers)

  def conditioned(self, group: Group, position: int) -> tuple[Results, Pointers]:
    """What a group got from prompts on a frame."""
    record, store = group.conditioning[position], self.state.store
    stored = {identity: store.get((identity, position)) for identity in group.objects}
    numbers = zip(stored.items(), record.object_logits, record.iou, strict=True)
    results = {i: ObjectResult(x.mask_logits, float(a), float(b)) for (i, x), a, b in numbers}
    return results, {i: x.pointer for i, x in stored.items()}

  def _read(self, frame: int, groups: Sequence[Group], backward: bool) -> Reads:
    self.readings = [(group, self.state.reading(group, frame, backward)) for group in groups]
    return self.state.pack(self.readings)

  def _rows(self, frame: int, groups: Sequence[Group]) -> np.ndarray:
    """Rows to write; those that the groups read on this frame stay."""
    read = {id(group): reading.frames for group, reading in self.readings}
    return self.state.take_rows(groups, frame, [read.get(id(group), ()) for group in groups])

  def _earlier(
    self, group: Group, member: int, frame: int
  ) -> tuple[ObjectResult, Float[np.ndarray, " D"]]:
    """What an object of a group already has on a frame."""
    record, stored = group.record(frame), self.state.store.get((group.objects[member], frame))
    if record is None:
      raise ValueError(f"object {group.objects[member]} has nothing on frame {frame}.")
    logit, iou = float(record.object_logits[member]), float(record.iou[member])
    return ObjectResult(stored.mask_logits, logit, iou), stored.pointer

  def _keep(
    self, frame: int, results: Results, memory: Any, pointers: Mapping[int, np.ndarray]
  ) -> None:
    if not results:
      return
    memory = np.asarray(memory)
    for identity, result in results.items():
      slot = self.state.slots[identity]
      self.state.keep(identity, frame, memory[slot], pointers[identity], result.mask_logits)


def _record(results: Sequence[ObjectResult]) -> FrameRecord:
  logits = np.array([result.object_logit for result in results], np.float32)
  return FrameRecord(logits, np.array([result.iou for result in results], np.float32))
