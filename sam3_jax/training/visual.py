"""Training of the head for visual prompts: a click or a box on an object, then corrective clicks.

After Segment Anything (Kirillov et al. 2023, arXiv:2304.02643, appendix A), with SAM 2's losses
(Ravi et al. 2024, arXiv:2408.00714, appendix D). There are four differences:

- Masks are trained with cross-entropy and much dice loss. With the focal loss the masks of a new
  head stay empty for long.
- Each round trains the single mask and the best of the three multimask outputs, because either may
  be requested for any prompt.
- A click may be on the background. The head then learns that no object exists, and a low IoU for
  every mask.
- Masks are compared on the decoder's own grid.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from sam3_jax.inputs.visual_prompts import CORNERS, MASK_LIMIT, PADDING
from sam3_jax.model.visual.head import VisualHead
from sam3_jax.training.batch import Targets, standard_promotion
from sam3_jax.training.mask_losses import average_pool, dice_loss, fractions
from sam3_jax.types import VisualEmbedding, VisualHeadOutput, VisualPrompts
from sam3_jax.utils.validation import check_numbers

Sums = dict[str, Array]

# The positional frequencies are random and fixed.
TRAINABLE = r"visual/(?!prompt/frequencies$).*"
# The terms that have a weight.
TERMS = ("mask", "dice", "iou", "object")
# Fraction of a cell that an object must cover to own it; less if the object covers no cell so much.
COVERED = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisualConfig:
  """Prompts and losses of the head for visual prompts."""

  # Prompts per image; each is for one object of the image, sampled at random.
  prompts_per_image: int = 8
  # Rounds per prompt: the first prediction, and one after each corrective click.
  rounds: int = 3
  # Probability that a prompt starts with a box instead of a click.
  box_probability: float = 0.5
  # Probability that a click is on the background. Only for images in which every object is
  # annotated, such as scenes.
  background_click_probability: float = 0.0
  # Standard deviation of the noise on each side of a box, as a fraction of its size.
  box_noise: float = 0.1
  # Largest noise on a side of a box, as a fraction of the image's side.
  box_noise_limit: float = 20 / 1008
  # Weight of the cross-entropy of masks.
  mask_weight: float = 5.0
  # Weight of the dice loss of masks.
  dice_weight: float = 2.0
  # Weight of the squared error of the predicted IoU.
  iou_weight: float = 1.0
  # Weight of the cross-entropy of the object score.
  object_weight: float = 1.0

  def __post_init__(self):
    check = functools.partial(check_numbers, self, "visual")
    check(("prompts_per_image", "rounds"), 1)
    check(("box_probability", "background_click_probability"), 0, 1)
    check(("box_noise", "box_noise_limit"), 0, 1)
    check([f"{name}_weight" for name in TERMS], 0)


@struct.dataclass
class SampledPrompts:
  """Prompts and their targets.

  Attributes:
    image: index of the image.
    covered: coverage of each cell by the object; zeros for a click on the background.
    inside: the cells that belong to the object.
    valid: False for a prompt on an image without objects, which has no loss.
    xy, labels: points of the first round, padded for the clicks of the others; see `VisualPrompts`.
  """

  image: Int[Array, " P"]
  covered: Float[Array, "P Hm Wm"]
  inside: Bool[Array, "P Hm Wm"]
  valid: Bool[Array, " P"]
  xy: Float[Array, "P M 2"]
  labels: Int[Array, "P M"]


@standard_promotion
def visual_sums(
  parameters: Any,
  head: VisualHead,
  features: Float[Array, "B H W C"],
  targets: Targets,
  key: Key[Array, ""],
  config: VisualConfig,
  remat: bool = False,
) -> Sums:
  """Samples prompts for each image, and sums the losses that `visual_loss` averages.

  Args:
    parameters: of the head.
    head: the module.
    features: the trunk's map.
    targets: with the leading axes [B, R]; all prompts of an image together have its objects.
    key: samples prompts and clicks.
    config: prompts and losses.
    remat: recompute the activations of each round in the backward pass.

  Returns:
    Sums over prompts and rounds of the terms; sums over prompts of the IoU of the masks in the
    first and in the last round; and the numbers of prompts and of prompts on an object.
  """
  variables = {"params": parameters}
  prompt_key, click_key = jax.random.split(key)
  sampled = sample_prompts(prompt_key, targets, head.config.mask_size, config)
  embedding: Any = head.apply(variables, features, method=VisualHead.encode)

  def predict_round(carry: Any, number: Int[Array, ""]) -> tuple[Any, Sums]:
    xy, labels, mask = carry
    has_mask = jnp.broadcast_to(number > 0, len(xy))
    prompts = VisualPrompts(sampled.image, xy, labels, mask, has_mask)
    predictions = _predict(head, variables, embedding, prompts)
    best = jax.lax.stop_gradient(_best(predictions))
    point, label = corrective_click(jax.random.fold_in(click_key, number), best > 0, sampled.inside)
    slot = number + xy.shape[1] - config.rounds + 1  # after the last round it is dropped
    xy = xy.at[:, slot].set(point, mode="drop")
    labels = labels.at[:, slot].set(label, mode="drop")
    mask = jnp.clip(best, -MASK_LIMIT, MASK_LIMIT)
    return (xy, labels, mask), _round_sums(predictions, sampled, config)

  start = sampled.xy, sampled.labels, jnp.zeros(sampled.covered.shape, jnp.float32)
  step = jax.checkpoint(predict_round) if remat else predict_round
  _, rounds = jax.lax.scan(step, start, jnp.arange(config.rounds))
  best_iou = rounds.pop("best_iou")
  sums = {name: values.sum() for name, values in rounds.items()}
  count, objects = sampled.valid.sum(), (sampled.valid & sampled.inside.any((1, 2))).sum()
  return sums | {
    "first_iou": best_iou[0], "last_iou": best_iou[-1], "prompts": count, "objects": objects,
  }  # fmt: skip


@standard_promotion
def visual_loss(sums: Sums, config: VisualConfig) -> tuple[Float[Array, ""], Sums]:
  """The total loss, and its terms before their weights, from the sums over a whole batch.

  Terms are averages over rounds, and over prompts or prompts on an object.
  """
  count, objects = (jnp.maximum(sums[x], 1).astype(jnp.float32) for x in ("prompts", "objects"))
  divisors = {"mask": objects, "dice": objects, "iou": count, "object": count}
  terms = {name: sums[name] / (divisors[name] * config.rounds) for name in TERMS}
  total = sum(getattr(config, f"{name}_weight") * value for name, value in terms.items())
  log = {name: sums[name] / objects for name in ("first_iou", "last_iou")}
  return jnp.asarray(total), terms | log | {name: sums[name] for name in ("prompts", "objects")}


def sample_prompts(
  key: Key[Array, ""], targets: Targets, side: int, config: VisualConfig
) -> SampledPrompts:
  """Samples the first prompts: clicks on objects or on the background, and boxes.

  Args:
    key: of all random choices.
    targets: with the leading axes [B, R].
    side: cells per side of the decoder's grid; the targets' grid is a multiple of it.
    config: prompts.
  """

  def of_image(key: Array, boxes: Array, masks: Array, valid: Array) -> tuple[Array, ...]:
    keys, count = jax.random.split(key, 5), config.prompts_per_image
    chosen = jax.random.categorical(keys[0], _uniform_logits(valid), shape=(count,))
    noise, other_noise = (jax.random.uniform(k, (count,), jnp.float32) for k in keys[1:3])
    background = noise < config.background_click_probability
    boxed = other_noise < config.box_probability
    background &= ~boxed
    # Convert few of the masks to floats: most are padding.
    union = jnp.where(valid[:, None, None], masks, 0).max(axis=0, initial=0)
    free = average_pool(fractions(union), side) == 0
    covered = average_pool(fractions(masks[chosen]), side)
    covered = jnp.where(background[:, None, None], 0, covered)
    inside = covered_cells(covered)
    clicks = _sample_point(keys[3], jnp.where(background[:, None, None], free, inside))
    corners = _noisy_corners(keys[4], boxes[chosen], config).reshape(count, 2, 2)
    xy = jnp.concatenate([corners, clicks[:, None]], axis=1)
    labels = jnp.where(
      boxed[:, None], jnp.array([*CORNERS, PADDING]), jnp.array([PADDING] * 2 + [1])
    )
    # If objects cover everything, there is no background to click on.
    prompt_valid = valid.any() & (~background | free.any())
    return covered, inside, jnp.broadcast_to(prompt_valid, count), xy, labels

  flat = jax.tree.map(lambda x: x.reshape(len(x), -1, *x.shape[3:]), targets)
  keys = jax.random.split(key, len(flat.valid))
  sampled = jax.vmap(of_image)(keys, flat.boxes, flat.masks, flat.valid)
  covered, inside, valid, xy, labels = (x.reshape(-1, *x.shape[2:]) for x in sampled)
  padding = (0, 0), (0, config.rounds - 1)
  return SampledPrompts(
    image=jnp.repeat(jnp.arange(len(keys)), config.prompts_per_image),
    covered=covered,
    inside=inside,
    valid=valid,
    xy=jnp.pad(xy, (*padding, (0, 0))),
    labels=jnp.pad(labels, padding, constant_values=PADDING),
  )


def corrective_click(
  key: Key[Array, ""], mask: Bool[Array, "P Hm Wm"], inside: Bool[Array, "P Hm Wm"]
) -> tuple[Float[Array, "P 2"], Int[Array, " P"]]:
  """Samples a click where the mask is wrong, and its label: 1 on the object, 0 off it.

  If the mask is correct, the click is anywhere on the object, or anywhere if there is no object.
  """
  wrong = mask != inside
  fallback = inside | ~inside.any(axis=(1, 2), keepdims=True)
  cells = jnp.where(wrong.any(axis=(1, 2), keepdims=True), wrong, fallback)
  xy = _sample_point(key, cells)
  column, row = (jnp.floor(xy * inside.shape[-1]).astype(jnp.int32)[:, i] for i in (0, 1))
  return xy, inside[jnp.arange(len(inside)), row, column].astype(jnp.int32)


def _predict(
  head: VisualHead, variables: Any, embedding: VisualEmbedding, prompts: VisualPrompts
) -> VisualHeadOutput:
  """Predictions for the same number of prompts of each image, ordered by image.

  Mapping over images avoids gathering their maps, whose gradients would have to be scattered.
  """

  def of_image(embedding: VisualEmbedding, prompts: VisualPrompts) -> VisualHeadOutput:
    one = jax.tree.map(lambda x: x[None], embedding)
    prompts = dataclasses.replace(prompts, image=jnp.zeros_like(prompts.image))
    found: Any = head.apply(variables, one, prompts, method=VisualHead.detect)
    return found

  images = len(embedding.coarse)
  by_image = jax.tree.map(lambda x: x.reshape(images, -1, *x.shape[1:]), prompts)
  found = jax.vmap(of_image)(embedding, by_image)
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found)


def _best(found: VisualHeadOutput) -> Float[Array, "P Hm Wm"]:
  """The mask of each prompt with the highest predicted IoU."""
  choice = found.iou.argmax(axis=1)[:, None, None, None]
  return jnp.take_along_axis(found.mask_logits, choice, axis=1)[:, 0].astype(jnp.float32)


def _round_sums(found: VisualHeadOutput, sampled: SampledPrompts, config: VisualConfig) -> Sums:
  """Sums of one round over prompts: the terms, and `best_iou`, the IoU of the masks with the
  highest predicted IoU."""
  logits, masks = found.mask_logits, sampled.covered
  wide, wanted = logits.astype(jnp.float32), masks[:, None]
  cross = (jax.nn.softplus(wide) - wide * wanted).mean(axis=(2, 3))
  dice = dice_loss(jax.nn.sigmoid(wide), wanted)
  # Only the multimask output with the lowest loss is trained.
  costs = config.mask_weight * cross + config.dice_weight * dice
  lowest = 1 + costs[:, 1:].argmin(axis=1)[:, None]
  cross, dice = (x[:, 0] + jnp.take_along_axis(x, lowest, axis=1)[:, 0] for x in (cross, dice))

  present, inside = sampled.inside.any(axis=(1, 2)), sampled.inside[:, None]
  predicted = logits > 0
  both, either = ((x.sum(axis=(2, 3))) for x in (predicted & inside, predicted | inside))
  overlap = both.astype(jnp.float32) / jnp.maximum(either, 1).astype(jnp.float32)
  iou = ((found.iou - overlap) ** 2).mean(axis=1)
  best = jnp.take_along_axis(overlap, found.iou.argmax(axis=1)[:, None], axis=1)[:, 0]
  exists = jax.nn.softplus(found.object_logit) - found.object_logit * present

  on_object = sampled.valid & present
  return {
    "mask": jnp.where(on_object, cross, 0).sum(),
    "dice": jnp.where(on_object, dice, 0).sum(),
    "iou": jnp.where(sampled.valid, iou, 0).sum(),
    "object": jnp.where(sampled.valid, exists, 0).sum(),
    "best_iou": jnp.where(on_object, best, 0).sum(),
  }


def covered_cells(covered: Float[Array, "P Hm Wm"]) -> Bool[Array, "P Hm Wm"]:
  """The cells that belong to each object: at least one, unless there is no object."""
  most = covered.max(axis=(1, 2), keepdims=True)
  return (covered >= jnp.minimum(COVERED, most)) & (covered > 0)


def _sample_point(key: Key[Array, ""], cells: Bool[Array, "P Hm Wm"]) -> Float[Array, "P 2"]:
  """Samples a point (x, y fractions) in the given cells of each prompt."""
  cell_key, offset_key = jax.random.split(key)
  prompts, side = len(cells), cells.shape[-1]
  logits = _uniform_logits(cells).reshape(prompts, -1)
  row, column = jnp.divmod(jax.random.categorical(cell_key, logits), side)
  # Not on the far edge of a cell, which rounding could move into the next one.
  within = jax.random.uniform(offset_key, (prompts, 2), jnp.float32, maxval=0.999)
  return (jnp.stack([column, row], axis=1) + within) / side


def _uniform_logits(allowed: Bool[Array, "*rows"]) -> Float[Array, "*rows"]:
  """Logits of a uniform distribution over the allowed elements."""
  return jnp.where(allowed, jnp.float32(0), -jnp.inf)


def _noisy_corners(
  key: Key[Array, ""], boxes: Float[Array, "P 4"], config: VisualConfig
) -> Float[Array, "P 4"]:
  """Converts cxcywh boxes to xyxy, and adds noise to their sides, which do not cross."""
  center, extent = boxes[:, :2], boxes[:, 2:]
  scale = jnp.minimum(config.box_noise * extent, config.box_noise_limit)
  shift = scale[:, None] * jax.random.normal(key, (len(boxes), 2, 2), jnp.float32)
  limit = jnp.minimum(config.box_noise_limit, extent / 2)[:, None]
  shift = jnp.clip(shift, -limit, limit)
  corners = jnp.stack([center - extent / 2, center + extent / 2], axis=1) + shift
  return jnp.clip(corners, 0, 1).reshape(-1, 4)
