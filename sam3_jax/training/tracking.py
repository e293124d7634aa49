"""Training of the tracker on clips: prompts on the first frame, tracking, and corrective clicks.

After SAM 2 (Ravi et al. 2024, arXiv:2408.00714, section 5 and appendix D). A clip runs as a session
does, with the same selection of memories; each object is a group of its own. Gradients go through
all frames. There are three differences:

- Only the tracker is trained; the encoder and the head for visual prompts are frozen.
- Of a tracked frame, the mask is trained that is shown and remembered: the one with the highest
  estimated IoU, not the one with the lowest loss.
- Masks are trained with cross-entropy, not with the focal loss, as in `visual`.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from sam3_jax.config import VideoConfig
from sam3_jax.inference.video.functions import (
  TrackedObjects,
  VideoFunctions,
  hide_absent,
  prompted_map,
)
from sam3_jax.inference.video.selection import POINTERS
from sam3_jax.inputs.visual_prompts import MASK_LIMIT
from sam3_jax.model.video.tracker import MASK_PROMPT_STRIDE, VideoTracker
from sam3_jax.model.visual.head import no_prompts
from sam3_jax.ops.bilinear import resize
from sam3_jax.training.batch import standard_promotion
from sam3_jax.training.mask_losses import average_pool, dice_loss, fractions
from sam3_jax.training.video_examples import CLICK, MASK, ClipBatch, ClipConfig
from sam3_jax.training.visual import corrective_click, covered_cells
from sam3_jax.types import VisualEmbedding, VisualPrompts
from sam3_jax.utils.validation import check_numbers

Sums = dict[str, Array]

TRAINABLE = r"video/.*"
TERMS = ("mask", "dice", "iou", "object")  # the terms that have a weight
SPAN = POINTERS - 1  # pointers' times are divided by this, as in a long video


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrackingConfig:
  """Losses of the tracker."""

  # Weight of the cross-entropy of masks.
  mask_weight: float = 5.0
  # Weight of the dice loss of masks.
  dice_weight: float = 2.0
  # Weight of the squared error of the predicted IoU.
  iou_weight: float = 1.0
  # Weight of the cross-entropy of the object score.
  object_weight: float = 1.0

  def __post_init__(self):
    check_numbers(self, "video", [f"{name}_weight" for name in TERMS], 0)


class _Objects(NamedTuple):
  """What the objects of a clip leave on a frame, before their memory is encoded.

  Attributes:
    maps: for the memory encoder.
    pointers: object pointers.
    present: whether an object is on the frame.
  """

  maps: Float[Array, "O S S"]
  pointers: Float[Array, "O D"]
  present: Bool[Array, " O"]


class _Remembered(NamedTuple):
  """What the objects of a clip leave on a frame.

  Attributes:
    memory: from `VideoTracker.encode_memory`.
    pointer: object pointers.
    score: how well an object was seen, as `selection.frame_score`.
    conditioning: whether the frame has prompts.
  """

  memory: Float[Array, "O HW C"]
  pointer: Float[Array, "O D"]
  score: Float[Array, " O"]
  conditioning: Bool[Array, ""]


class Reads(NamedTuple):
  """What a frame reads of the earlier frames 0, 1, ..., T - 1; see `VideoTracker.read_memory`."""

  memory_index: Int[Array, "O T"]
  memory_valid: Bool[Array, "O T"]
  pointer_time: Float[Array, "O T"]
  pointer_valid: Bool[Array, "O T"]


@standard_promotion
def tracking_sums(
  parameters: Any,
  functions: VideoFunctions,
  tracker: VideoConfig,
  clips: ClipBatch,
  key: Key[Array, ""],
  remat: bool = False,
) -> Sums:
  """Tracks the objects of clips, and sums the losses that `tracking_loss` averages.

  Args:
    parameters: of the whole model.
    functions: of a model with these sizes.
    tracker: sizes and rules of the tracker.
    clips: see `ClipBatch`.
    key: samples corrective clicks.
    remat: recompute the activations of each frame in the backward pass.

  Returns:
    Sums over the tracked frames of valid objects of the terms and of the IoU of the masks, and the
    numbers of objects and of visible objects on these frames.
  """

  def one(rows: tuple[ClipBatch, Array]) -> Sums:
    return _track_clip(parameters, functions, tracker, *rows, remat=remat)

  # One clip after another, so that a frame without corrections skips them.
  sums = jax.lax.map(one, (clips, jax.random.split(key, len(clips.frames))))
  return jax.tree.map(lambda x: x.sum(axis=0), sums)


@standard_promotion
def tracking_loss(sums: Sums, config: TrackingConfig) -> tuple[Float[Array, ""], Sums]:
  """The total loss, and its terms before their weights, from the sums over a whole batch."""
  count, seen = (jnp.maximum(sums[x], 1).astype(jnp.float32) for x in ("objects", "visible"))
  divisors = {"mask": seen, "dice": seen, "iou": count, "object": count}
  terms = {name: sums[name] / divisors[name] for name in TERMS}
  total = sum(getattr(config, f"{name}_weight") * value for name, value in terms.items())
  log = {"tracked_iou": sums["tracked_iou"] / seen}
  return jnp.asarray(total), terms | log | {name: sums[name] for name in ("objects", "visible")}


def check_clips(clips: ClipConfig, tracker: VideoConfig) -> None:
  """Refuses clips of which a session would not read all frames; see `plan_reads`.

  Raises:
    ValueError: too many frames, or too many of them with prompts.
  """
  if clips.frames > POINTERS:
    raise ValueError(f"clips.frames must be at most {POINTERS}; got {clips.frames}.")
  if clips.max_corrected >= tracker.conditioning:
    raise ValueError(
      f"clips.max_corrected {clips.max_corrected} must be less than the {tracker.conditioning} "
      "conditioning frames that the tracker reads."
    )


def plan_reads(
  scores: Float[Array, "O T"], conditioning: Bool[Array, " T"], tracker: VideoConfig
) -> Reads:
  """What frame T reads, as `selection.plan_reading` decides for a long video.

  Args:
    scores: of each object on the earlier frames.
    conditioning: whether an earlier frame has prompts; the first one has.
    tracker: sizes and rules.
  """
  last = jnp.arange(len(conditioning)) == len(conditioning) - 1
  # The last frame has a rank even if it is a conditioning frame, which is not read twice.
  good = (scores > tracker.rules.min_memory_score) | (not tracker.rules.memory_selection)
  ranked = (~conditioning & good) | last
  rank = jnp.cumsum(ranked[:, ::-1], axis=1)[:, ::-1]  # 1 for the latest
  read = ranked & ~conditioning
  # The oldest frame gives a memory, but no pointer.
  oldest = rank == rank[:, :1]
  age = jnp.arange(len(conditioning), 0, -1)
  return Reads(
    memory_index=jnp.where(conditioning, tracker.memories - 1, rank - 1),
    memory_valid=conditioning | (read & (rank < tracker.memories)),
    pointer_time=jnp.where(conditioning, age, rank) / SPAN,
    pointer_valid=conditioning | (read & ~oldest),
  )


def _track_clip(
  params: Any,
  functions: VideoFunctions,
  tracker: VideoConfig,
  clip: ClipBatch,
  key: Array,
  *,
  remat: bool,
) -> Sums:
  """The sums of one clip, whose arrays have no axis B."""
  embedding: Any = jax.lax.stop_gradient(functions.encode(params, clip.frames))
  side = embedding.fine.shape[1]
  covered = average_pool(fractions(clip.masks), side)
  inside = jax.vmap(covered_cells)(covered)

  def track(t: int, seen: list[_Remembered]) -> tuple[_Remembered, Sums]:
    frame = embedding[t : t + 1]
    found = _track_frame(params, functions, tracker, frame, seen)
    shown = functions.shown(params, found, jnp.ones_like(clip.valid), clip.valid)

    def correct() -> _Objects:
      mask = jax.lax.stop_gradient(shown.mask_logits)
      point, label = corrective_click(jax.random.fold_in(key, t), mask > 0, inside[t])
      logits = jnp.clip(mask, -MASK_LIMIT, MASK_LIMIT)
      count = len(mask)
      prompts = VisualPrompts(
        jnp.zeros(count, jnp.int32), point[:, None], label[:, None], logits, jnp.ones(count, bool)
      )
      answer = functions.decode_prompts(params, frame, prompts, jnp.ones(count, bool))
      return _prompted(functions, hide_absent(answer))

    def keep() -> _Objects:
      maps = functions.soft_map(shown.mask_logits)
      return _Objects(maps, shown.pointers, shown.object_logit > 0)

    objects = jax.lax.cond(clip.corrected[t], correct, keep)
    remembered = _remember(params, functions, frame, objects, _score(shown), clip.corrected[t])
    return remembered, _frame_sums(found, covered[t], inside[t], clip.valid)

  first, score, conditioning = embedding[:1], jnp.ones(len(clip.valid)), jnp.array(True)
  start = _start(params, functions, first, clip)
  seen = [_remember(params, functions, first, start, score, conditioning)]
  sums: list[Sums] = []
  for t in range(1, len(clip.frames)):
    step = functools.partial(track, t)
    remembered, frame_sums = (jax.checkpoint(step) if remat else step)(seen)
    seen.append(remembered)
    sums.append(frame_sums)
  return jax.tree.map(lambda *xs: sum(xs), *sums)


def _start(
  params: Any, functions: VideoFunctions, frame: VisualEmbedding, clip: ClipBatch
) -> _Objects:
  """The objects that are prompted on the first frame."""
  count = len(clip.valid)
  prompts = VisualPrompts(jnp.zeros(count, jnp.int32), clip.xy, clip.labels)
  ambiguous = jnp.broadcast_to(clip.kind == CLICK, count)
  answer = hide_absent(functions.decode_prompts(params, frame, prompts, ambiguous))
  prompted = _prompted(functions, answer)
  side = MASK_PROMPT_STRIDE * frame.fine.shape[1]
  mask = resize(fractions(clip.masks[0]), (side, side))
  given = functions.answer_mask(params, frame, mask)
  by_mask = clip.kind == MASK
  masked = _Objects(prompted_map(functions.enlarge(mask - 0.5)), given.pointers, by_mask)
  return jax.tree.map(lambda a, b: jnp.where(by_mask, a, b), masked, prompted)


def _prompted(functions: VideoFunctions, answer: TrackedObjects) -> _Objects:
  """The objects that are prompted by points."""
  maps = prompted_map(functions.enlarge(jax.lax.stop_gradient(answer.mask_logits)))
  return _Objects(maps, answer.pointers, answer.object_logit > 0)


def _track_frame(
  params: Any,
  functions: VideoFunctions,
  tracker: VideoConfig,
  frame: VisualEmbedding,
  seen: list[_Remembered],
) -> TrackedObjects:
  """Tracks all objects to a frame; masks of absent objects are not hidden."""
  memory, pointers, scores = (
    jnp.stack([getattr(one, name) for one in seen], axis=1)
    for name in ("memory", "pointer", "score")
  )
  conditioning = jnp.stack([one.conditioning for one in seen])
  reads = plan_reads(jax.lax.stop_gradient(scores), conditioning, tracker)
  image = functions.network(
    params, VideoTracker.read_memory, frame.coarse[0],
    memory, reads.memory_index, reads.memory_valid,
    pointers, reads.pointer_time, reads.pointer_valid,
  )  # fmt: skip
  count = len(image)
  ambiguous = jnp.ones(count, bool)
  return functions.decode(params, image, frame, no_prompts(count), ambiguous, ~ambiguous)


def _remember(
  params: Any,
  functions: VideoFunctions,
  frame: VisualEmbedding,
  objects: _Objects,
  score: Float[Array, " O"],
  conditioning: Bool[Array, ""],
) -> _Remembered:
  args = frame.coarse[0], objects.maps, ~objects.present
  memory = functions.network(params, VideoTracker.encode_memory, *args)
  return _Remembered(memory, objects.pointers, score, conditioning)


def _score(shown: TrackedObjects) -> Float[Array, " O"]:
  logit = shown.object_logit
  return jnp.where(logit > 0, 2 * jax.nn.sigmoid(logit) - 1, 0) * shown.iou


def _frame_sums(
  found: TrackedObjects,
  covered: Float[Array, "O Hm Wm"],
  inside: Bool[Array, "O Hm Wm"],
  valid: Bool[Array, " O"],
) -> Sums:
  """Sums of one frame over objects: the terms, the IoU of the masks, and the divisors."""
  logits = found.mask_logits
  cross = (jax.nn.softplus(logits) - logits * covered).mean(axis=(1, 2))
  dice = dice_loss(jax.nn.sigmoid(logits), covered)
  predicted, exists = logits > 0, inside.any(axis=(1, 2))
  both, either = ((x.sum(axis=(1, 2))) for x in (predicted & inside, predicted | inside))
  overlap = both.astype(jnp.float32) / jnp.maximum(either, 1).astype(jnp.float32)
  presence = jax.nn.softplus(found.object_logit) - found.object_logit * exists
  visible = valid & exists
  return {
    "mask": jnp.where(visible, cross, 0).sum(),
    "dice": jnp.where(visible, dice, 0).sum(),
    "iou": jnp.where(valid, (found.iou - overlap) ** 2, 0).sum(),
    "object": jnp.where(valid, presence, 0).sum(),
    "tracked_iou": jnp.where(visible, overlap, 0).sum(),
    "objects": valid.sum(),
    "visible": visible.sum(),
  }
