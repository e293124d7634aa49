"""The functions of video for one frame: encode it, answer a prompt, track objects to it, and
remember the objects on it. The behavior follows Meta's released code.

The first axis of their arrays is the object; all objects of all groups share a call.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from sam3_jax.config import Config
from sam3_jax.inference.video import bank as banks
from sam3_jax.inference.video.bank import Reads
from sam3_jax.inputs.preprocess import normalize
from sam3_jax.model.sam3 import Detector
from sam3_jax.model.video.tracker import MASK_PROMPT_STRIDE, VideoTracker
from sam3_jax.model.visual.head import VisualHead, no_prompts, single_mask
from sam3_jax.ops.bilinear import resize
from sam3_jax.rules import DEFAULT_RULES
from sam3_jax.types import VisualHeadOutput

ABSENT_LOGIT = -1024.0  # of all cells of an object that is not on the frame
MASK_SCALE, MASK_OFFSET = 20.0, -10.0  # of the map that the memory encoder takes
# Objects whose memories are encoded at a time. A TPU puts the objects of a block on its 128 lanes
# where maps have few channels, so 8 take as long as 32.
BLOCK = 32


@struct.dataclass
class TrackedObjects:
  """The objects on one frame, float32.

  Attributes:
    mask_logits: before the sigmoid; -1024 everywhere for an absent object.
    iou: the estimated IoU of the mask.
    object_logit: whether the object is on the frame; positive for present.
    pointers: object pointers.
  """

  mask_logits: Float[Array, "O Hm Wm"]
  iou: Float[Array, " O"]
  object_logit: Float[Array, " O"]
  pointers: Float[Array, "O D"]


class VideoFunctions:
  """The functions that `VideoPrograms` compiles; `training.tracking` uses their parts, too."""

  def __init__(self, config: Config, dtype: DTypeLike):
    self._size, self._dtype = config.image_size, dtype
    self._memory_size = MASK_PROMPT_STRIDE * config.mask_size
    self._detector, self._head = Detector(config, dtype), VisualHead(config, dtype)
    self._tracker = VideoTracker(config, dtype)
    self._rules = DEFAULT_RULES if config.video is None else config.video.rules

  def encode(self, params, pixels):
    # XLA removes what is computed for the unused embedding of concepts.
    return self.encode_both(params, pixels, jnp.zeros((len(pixels), 2), jnp.int32))[1]

  def encode_both(self, params, pixels, sizes):
    pixels = normalize(pixels) if pixels.dtype == jnp.uint8 else pixels
    method = Detector.encode_and_keep
    concepts, features = self._detector.apply({"params": params}, pixels, sizes, method=method)
    visual = self._head.apply({"params": params["visual"]}, features, method=VisualHead.encode)
    return concepts, visual

  def read(self, params, bank, embedding, reads):
    memory, pointers = banks.gather(bank, reads)
    return self.network(
      params, VideoTracker.read_memory, embedding.coarse[0],
      memory, reads.memory_index, reads.memory_valid,
      pointers, reads.pointer_time, reads.pointer_valid,
    )  # fmt: skip

  def answer(self, params, embedding, prompts, ambiguous):
    return hide_absent(self.decode_prompts(params, embedding, prompts, ambiguous))

  def answer_with_memory(self, params, bank, embedding, reads, slot, prompts, ambiguous):
    own = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, slot, 1), bank)
    image = self.read(params, own, embedding, reads)
    found = self.decode(params, image, embedding, prompts, ambiguous, _reads_nothing(reads))
    return hide_absent(found)

  def answer_mask(self, params, embedding, mask):
    logits = self.network(params, VideoTracker.mask_prompt_logits, mask)
    given = jnp.ones(len(mask), bool)
    prompts = dataclasses.replace(no_prompts(len(mask)), mask=logits, has_mask=given)
    single = jnp.zeros(len(mask), bool)
    return hide_absent(self.decode(params, embedding.coarse, embedding, prompts, single, None))

  def track(self, params, bank, embedding, reads, rows):
    found = self.propagate(params, bank, embedding, reads, jnp.ones(len(rows), bool))
    bank, memory = self.memorize_tracked(params, bank, embedding, found, rows)
    return bank, found, memory

  def propagate(self, params, bank, embedding, reads, clicked):
    image = self.read(params, bank, embedding, reads)
    count = len(clicked)
    ambiguous = jnp.ones(count, bool)
    unread = _reads_nothing(reads)
    found = self.decode(params, image, embedding, no_prompts(count), ambiguous, unread)
    return self.shown(params, found, clicked, ~unread)

  def memorize_tracked(self, params, bank, embedding, objects, rows):
    present = objects.object_logit > 0
    memory = self.memorize(params, embedding, objects.mask_logits, present, self.soft_map)
    return banks.write(bank, rows, memory, objects.pointers), memory

  def memorize_found(self, params, bank, embedding, mask_logits, pointers, owner, order, rows):
    logits = resize(mask_logits, (self._memory_size, self._memory_size))
    logits = hide_shrunk(logits, owner, order, self._rules.shrink_threshold)
    present = (logits > 0).any(axis=(1, 2))
    memory = self.memorize(params, embedding, logits, present, as_map)
    return banks.write(bank, rows, memory, pointers), memory

  def remember(self, params, bank, embedding, objects, group, order, rows):
    logits = without_overlap(self.enlarge(objects.mask_logits), group, order)
    maps, present = prompted_map(logits), objects.object_logit > 0
    memory = self.memorize(params, embedding, maps, present)
    return banks.write(bank, rows, memory, objects.pointers), memory

  def network(self, params, method, *args) -> Any:
    """Applies a method of `VideoTracker`."""
    return self._tracker.apply({"params": params["video"]}, *args, method=method)

  def decode_prompts(self, params, embedding, prompts, ambiguous) -> TrackedObjects:
    """As `decode`, without memory."""
    first = jnp.ones(1, bool)
    return self.decode(params, embedding.coarse, embedding, prompts, ambiguous, first)

  def decode(self, params, image, embedding, prompts, ambiguous, unconditioned) -> TrackedObjects:
    """The objects of prompts; arguments as for `VisualHead.detect_tracked`. The masks of absent
    objects are not hidden yet."""
    found: Any = self._head.apply(
      {"params": params["visual"]}, image, (embedding.middle, embedding.fine), prompts,
      unconditioned, method=VisualHead.detect_tracked,
    )  # fmt: skip
    masks, iou = single_mask(found, ambiguous)
    present = found.object_logit > 0
    pointers = self.network(params, VideoTracker.pointer, _token(found, ambiguous), present)
    return TrackedObjects(masks[:, 0].astype(jnp.float32), iou[:, 0], found.object_logit, pointers)

  def shown(self, params, found, clicked, tracked) -> TrackedObjects:
    """What is shown and remembered of objects on a tracked frame. `clicked` is false for slots of
    objects that a phrase found, `tracked` for slots without an object."""
    present = hide_absent(found)
    if not self._rules.separate_objects:
      return present
    logit = jnp.where(clicked & tracked, found.object_logit, -1)
    alone = hide_absent(dataclasses.replace(found, object_logit=logit))
    separate = separate_objects(alone, self._rules.shrink_threshold)
    nothing = params["video"]["no_object_pointer"].astype(jnp.float32)
    hidden = (separate.object_logit <= 0)[:, None]
    pointers = jnp.where(hidden, nothing, found.pointers)
    separate = dataclasses.replace(separate, pointers=pointers)

    def choose(mine, others):
      return jnp.where(jnp.expand_dims(clicked, tuple(range(1, mine.ndim))), mine, others)

    return jax.tree.map(choose, separate, present)

  def soft_map(self, logits):
    """The map of a tracked mask that the memory encoder takes."""
    return as_map(self.enlarge(logits))

  def memorize(self, params, embedding, masks, present, as_map=lambda mask: mask):
    """The memories of the frame, cells last, from masks or what `as_map` makes of them."""

    def block(rows):
      mask, absent = rows
      args = embedding.coarse[0], as_map(mask), absent
      return self.network(params, VideoTracker.encode_memory, *args)

    rows = masks, ~present
    memory = block(rows) if len(masks) <= BLOCK else _in_blocks(block, rows)
    return jnp.swapaxes(memory, 1, 2).astype(self._dtype)

  def enlarge(self, logits):
    """Resizes masks to the size of the model's square."""
    return resize(logits, (self._size, self._size))


def hide_absent(found: TrackedObjects) -> TrackedObjects:
  """Empties the masks of absent objects."""
  present = (found.object_logit > 0)[:, None, None]
  return dataclasses.replace(found, mask_logits=jnp.where(present, found.mask_logits, ABSENT_LOGIT))


def as_map(logits: Float[Array, "O h w"]) -> Float[Array, "O h w"]:
  """The map of mask logits that the memory encoder takes, in [-10, 10]."""
  return jax.nn.sigmoid(logits) * MASK_SCALE + MASK_OFFSET


def hide_shrunk(
  logits: Float[Array, "O h w"], owner: Int[Array, " O"], order: Int[Array, " O"], share: float
) -> Float[Array, "O h w"]:
  """Empties, to logits of at most -10, the masks of objects that keep less than a share of their
  cells where each cell belongs to the object with the highest logit. The other masks stay whole,
  and overlap.

  Args:
    logits: of all objects.
    owner, order: as `group` and `order` of `without_overlap`; objects of different owners do not
      compete.
    share: in [0, 1].
  """
  apart = without_overlap(logits, owner, order)
  kept, cells = ((x > 0).sum(axis=(1, 2), dtype=jnp.float32) for x in (apart, logits))
  shrunk = kept < share * jnp.maximum(cells, 1)
  return jnp.where(shrunk[:, None, None], jnp.minimum(logits, MASK_OFFSET), logits)


def separate_objects(found: TrackedObjects, share: float) -> TrackedObjects:
  """Leaves each cell to the object with the highest logit there, the first of equal ones; the
  others get at most -10.

  An object that keeps less than `share` of its cells is absent: its object logit becomes -10
  at most, and its mask empty. The rule is that of Meta's video model for memories.
  """
  count = len(found.mask_logits)
  inside = found.mask_logits > 0
  first = found.mask_logits.argmax(axis=0) == jnp.arange(count)[:, None, None]
  own, all_cells = ((x.sum(axis=(1, 2), dtype=jnp.float32)) for x in (inside & first, inside))
  logits = jnp.where(first, found.mask_logits, jnp.minimum(found.mask_logits, MASK_OFFSET))
  lost = own < share * all_cells
  object_logit = jnp.where(lost, jnp.minimum(found.object_logit, MASK_OFFSET), found.object_logit)
  return hide_absent(dataclasses.replace(found, mask_logits=logits, object_logit=object_logit))


def prompted_map(logits: Float[Array, "O h w"]) -> Float[Array, "O h w"]:
  """The map of a prompted mask that the memory encoder takes: -10 outside, 10 inside."""
  return (logits > 0) * MASK_SCALE + MASK_OFFSET


def without_overlap(
  logits: Float[Array, "O h w"], group: Int[Array, " O"], order: Int[Array, " O"]
) -> Float[Array, "O h w"]:
  """Leaves each cell to the object of a group with the highest logit there; the others get at most
  -10.

  Args:
    logits: of all objects.
    group: below O; objects of different groups may overlap.
    order: position in the group, below O; the first of equal objects keeps the cell.
  """
  count = len(group)
  order = order.astype(jnp.int32)[:, None, None]
  best = jax.ops.segment_max(logits, group, num_segments=count)[group]
  rank = jnp.where(logits == best, order, count)
  first = jax.ops.segment_min(rank, group, num_segments=count)[group]
  return jnp.where(order == first, logits, jnp.minimum(logits, MASK_OFFSET))


def _token(found: VisualHeadOutput, ambiguous: Bool[Array, " O"]) -> Float[Array, "O D"]:
  """The mask token for the pointer: that of the best multimask output, or the single-mask token,
  even if its mask was replaced as unstable."""
  best = 1 + jax.lax.argmax(found.iou[:, 1:], 1, jnp.int32)
  choice = jnp.where(ambiguous, best, 0)[:, None, None]
  return jnp.take_along_axis(found.tokens, choice, axis=1)[:, 0]


def _reads_nothing(reads: Reads) -> Bool[Array, " O"]:
  return ~(reads.memory_valid.any(axis=1) | reads.pointer_valid.any(axis=1))


def _in_blocks(function: Any, rows: Any) -> Any:
  """Maps blocks of `BLOCK` rows, one after another, which bounds the memory in use."""
  blocks = jax.tree.map(lambda x: x.reshape(-1, BLOCK, *x.shape[1:]), rows)
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), jax.lax.map(function, blocks))
