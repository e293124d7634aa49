"""The jitted functions of video: encode a frame, answer a prompt, track objects to a frame, and
remember the objects that were prompted.

Each is compiled once for a number of slots of the bank (`bank.BUCKETS`); `track` twice, for one
conditioning frame and for several. All objects of all groups share a call. The behaviour follows
Meta's released code.
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
from sam3_jax.model.video.tracker import VideoTracker, video_config
from sam3_jax.model.visual.head import VisualHead, no_prompts, single_mask
from sam3_jax.ops.bilinear import resize
from sam3_jax.types import VisualHeadOutput

ABSENT_LOGIT = -1024.0  # of all cells of an object that is not on the frame
MASK_SCALE, MASK_OFFSET = 20.0, -10.0  # of the map that the memory encoder takes
BLOCK = 8  # objects whose memories are encoded at a time


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


class VideoPrograms:
  """The jitted functions of a model with tracker; parameters first.

  Attributes:
    encode: (params, pixels u8[1, Hi, Wi, 3], or normalised float32) to a visual embedding.
    read: (params, bank, embedding, reads) to the coarse map of each slot after memory attention.
    answer: (params, embedding, prompts, ambiguous bool[O]) to `TrackedObjects`, for points, boxes
      and earlier masks, without memory.
    answer_with_memory: (params, bank, embedding, reads, slot, prompts, ambiguous) likewise for one
      prompt; `reads` has a single row, which is of `slot`.
    answer_mask: (params, embedding, mask f32[O, S, S] at 16 times the grid) to `TrackedObjects`;
      its mask, IoU and object logit are not those of the object.
    track: (params, bank, embedding, reads, rows) to the bank, `TrackedObjects` and memories. `rows`
      is where each slot's memory is written. Consumes the bank.
    remember: (params, bank, embedding, objects, group, order, rows) to the bank and memories.
      `objects` is a `TrackedObjects` with the answers of prompts, `group` the number of each slot's
      group, `order` its position there. Consumes the bank.
    write: (bank, rows, memories, pointers) to the bank, which it consumes.
  """

  def __init__(self, config: Config, dtype: DTypeLike):
    video_config(config)
    self.config, self.dtype = config, dtype
    detector, head = Detector(config, dtype), VisualHead(config, dtype)
    tracker = VideoTracker(config, dtype)

    def encode(params, pixels):
      sizes = jnp.zeros((len(pixels), 2), jnp.int32)
      pixels = normalize(pixels) if pixels.dtype == jnp.uint8 else pixels
      # XLA removes what is computed for the unused embedding of concepts.
      method = Detector.encode_and_keep
      _, features = detector.apply({"params": params}, pixels, sizes, method=method)  # pyright: ignore
      return head.apply({"params": params["visual"]}, features, method=VisualHead.encode)

    def network(params, method, *args) -> Any:
      return tracker.apply({"params": params["video"]}, *args, method=method)

    def read(params, bank, embedding, reads):
      memory, pointers = banks.gather(bank, reads)
      return network(
        params, VideoTracker.read_memory, embedding.coarse[0],
        memory, reads.memory_index, reads.memory_valid,
        pointers, reads.pointer_time, reads.pointer_valid,
      )  # fmt: skip

    def decode(params, image, embedding, prompts, ambiguous, unconditioned):
      found: Any = head.apply(
        {"params": params["visual"]}, image, (embedding.middle, embedding.fine), prompts,
        unconditioned, method=VisualHead.detect_tracked,
      )  # fmt: skip
      masks, iou = single_mask(found, ambiguous)
      present = found.object_logit > 0
      pointers = network(params, VideoTracker.pointer, _token(found, ambiguous), present)
      masks = masks[:, 0].astype(jnp.float32)
      masks = jnp.where(present[:, None, None], masks, ABSENT_LOGIT)
      return TrackedObjects(masks, iou[:, 0], found.object_logit, pointers)

    def answer(params, embedding, prompts, ambiguous):
      first = jnp.ones(1, bool)
      return decode(params, embedding.coarse, embedding, prompts, ambiguous, first)

    def answer_with_memory(params, bank, embedding, reads, slot, prompts, ambiguous):
      own = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, slot, 1), bank)
      image = read(params, own, embedding, reads)
      return decode(params, image, embedding, prompts, ambiguous, _reads_nothing(reads))

    def answer_mask(params, embedding, mask):
      logits = network(params, VideoTracker.mask_prompt_logits, mask)
      given = jnp.ones(len(mask), bool)
      prompts = dataclasses.replace(no_prompts(len(mask)), mask=logits, has_mask=given)
      single = jnp.zeros(len(mask), bool)
      return decode(params, embedding.coarse, embedding, prompts, single, None)

    def memorize(params, embedding, masks, present, as_map=lambda mask: mask):
      def block(rows):
        mask, absent = rows
        args = embedding.coarse[0], as_map(mask), absent
        return network(params, VideoTracker.encode_memory, *args)

      rows = masks, ~present
      memory = block(rows) if len(masks) <= BLOCK else _in_blocks(block, rows)
      return jnp.swapaxes(memory, 1, 2).astype(dtype)

    def enlarge(logits):
      return resize(logits, (config.image_size, config.image_size))

    def soft_map(logits):
      return jax.nn.sigmoid(enlarge(logits)) * MASK_SCALE + MASK_OFFSET

    def track(params, bank, embedding, reads, rows):
      image = read(params, bank, embedding, reads)
      count = len(rows)
      ambiguous = jnp.ones(count, bool)
      unread = _reads_nothing(reads)
      found = decode(params, image, embedding, no_prompts(count), ambiguous, unread)
      memory = memorize(params, embedding, found.mask_logits, found.object_logit > 0, soft_map)
      return banks.write(bank, rows, memory, found.pointers), found, memory

    def remember(params, bank, embedding, objects, group, order, rows):
      own = without_overlap(enlarge(objects.mask_logits), group, order) > 0
      maps = own * MASK_SCALE + MASK_OFFSET
      memory = memorize(params, embedding, maps, objects.object_logit > 0)
      return banks.write(bank, rows, memory, objects.pointers), memory

    self.encode: Any = jax.jit(encode)
    self.read: Any = jax.jit(read)
    self.answer: Any = jax.jit(answer)
    self.answer_with_memory: Any = jax.jit(answer_with_memory)
    self.answer_mask: Any = jax.jit(answer_mask)
    self.track: Any = jax.jit(track, donate_argnames="bank")
    self.remember: Any = jax.jit(remember, donate_argnames="bank")
    self.write: Any = jax.jit(banks.write, donate_argnames="bank")

  @property
  def compilations(self) -> dict[str, int]:
    """How often each function was compiled."""
    return {name: x._cache_size() for name, x in vars(self).items() if hasattr(x, "_cache_size")}


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
