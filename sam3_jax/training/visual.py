"""Training of the head for visual prompts: an object is asked for by a click or a box, then by a
click where the mask is wrong, again and again.

After Segment Anything (Kirillov et al. 2023, arXiv:2304.02643, appendix A), with SAM 2's losses
(Ravi et al. 2024, arXiv:2408.00714, appendix D). Four things differ. Masks are trained by plain
cross-entropy and much of dice, as from the focal loss the masks of a new head stay empty for long.
Every answer trains both the one mask and the best of the three readings, whatever was asked, as
either may be wanted. A click may lie on nothing: then no object is to be seen, and every mask is to
be known for worthless. And masks are compared on the decoder's own grid.
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
from sam3_jax.training.losses import dice_loss, fractions, shrunk
from sam3_jax.types import VisualEmbedding, VisualHeadOutput, VisualPrompts
from sam3_jax.utils.validation import check_numbers

Sums = dict[str, Array]

# The frequencies of positions are random and stay as they are.
TRAINED = r"visual/(?!prompt/frequencies$).*"
# What is added up: the terms that have a weight.
TERMS = ("mask", "dice", "iou", "object")
COVERED = 0.5  # of a cell, for it to belong to an object; less, where no cell is so covered


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisualConfig:
  """What is asked of an image, and the weights of the terms.

  Attributes:
    prompts: of an image; each is about one of its objects, drawn at random.
    rounds: answers to each: the first, and those after a click where the mask was wrong.
    boxed: share of the prompts that begin with a box, the others with a click.
    nothing: share of the clicks that lie on none of the objects. Only for images all of whose
      things are asked for, as scenes are.
    box_noise: standard deviation of each side of a box, as a share of the box's extent.
    box_noise_limit: its bound, as a share of the image's side.
  """

  prompts: int = 8
  rounds: int = 3
  boxed: float = 0.5
  nothing: float = 0.0
  box_noise: float = 0.1
  box_noise_limit: float = 20 / 1008
  mask_weight: float = 5.0
  dice_weight: float = 2.0
  iou_weight: float = 1.0
  object_weight: float = 1.0

  def __post_init__(self):
    check = functools.partial(check_numbers, self, "visual")
    check(("prompts", "rounds"), 1)
    check(("boxed", "nothing", "box_noise", "box_noise_limit"), 0, 1)
    check([f"{name}_weight" for name in TERMS], 0)


@struct.dataclass
class Asked:
  """Prompts, and what each means.

  Attributes:
    image: row of the image.
    covered: coverage of each cell by the object; zeros for a click on nothing.
    inside: which cells belong to it.
    valid: False for a prompt about an image without objects: no loss comes from it.
    xy, labels: of the first round, with room for the clicks of the others; see `VisualPrompts`.
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
  again: bool = False,
) -> Sums:
  """Asks for objects of each image, and adds up what `visual_loss` takes the means of.

  Args:
    parameters: of the head.
    head: the module.
    features: the trunk's map.
    targets: with the leading axes [B, R]; all of an image's prompts together have its objects.
    key: of what is asked.
    config: see there.
    again: a round's activations are computed again in the backward pass.

  Returns:
    The terms and the IoU of the masks in the first and in the last round, summed over prompts (and
    rounds); and the numbers of prompts and of those that are about an object.
  """
  variables = {"params": parameters}
  asking, clicking = jax.random.split(key)
  asked = ask(asking, targets, head.config.mask_size, config)
  embedding: Any = head.apply(variables, features, method=VisualHead.encode)

  def answer(carry: Any, number: Int[Array, ""]) -> tuple[Any, Sums]:
    xy, labels, mask = carry
    has_mask = jnp.broadcast_to(number > 0, len(xy))
    prompts = VisualPrompts(asked.image, xy, labels, mask, has_mask)
    found = _predict(head, variables, embedding, prompts)
    best = jax.lax.stop_gradient(_best(found))
    point, label = mend(jax.random.fold_in(clicking, number), best > 0, asked.inside)
    place = number + xy.shape[1] - config.rounds + 1  # beyond the last place it is dropped
    xy = xy.at[:, place].set(point, mode="drop")
    labels = labels.at[:, place].set(label, mode="drop")
    return (xy, labels, jnp.clip(best, -MASK_LIMIT, MASK_LIMIT)), _round_sums(found, asked, config)

  start = asked.xy, asked.labels, jnp.zeros(asked.covered.shape, jnp.float32)
  step = jax.checkpoint(answer) if again else answer
  _, rounds = jax.lax.scan(step, start, jnp.arange(config.rounds))
  shown = rounds.pop("shown")
  sums = {name: values.sum() for name, values in rounds.items()}
  count, objects = asked.valid.sum(), (asked.valid & asked.inside.any((1, 2))).sum()
  return sums | {
    "first_iou": shown[0], "last_iou": shown[-1], "prompts": count, "objects": objects,
  }  # fmt: skip


@standard_promotion
def visual_loss(sums: Sums, config: VisualConfig) -> tuple[Float[Array, ""], Sums]:
  """The total, and its terms before their weights: means over prompts, or over those about an
  object, and over rounds; from what `visual_sums` gives for the whole batch."""
  count, objects = (jnp.maximum(sums[x], 1).astype(jnp.float32) for x in ("prompts", "objects"))
  of = {"mask": objects, "dice": objects, "iou": count, "object": count}
  terms = {name: sums[name] / (of[name] * config.rounds) for name in TERMS}
  total = sum(getattr(config, f"{name}_weight") * value for name, value in terms.items())
  log = {name: sums[name] / objects for name in ("first_iou", "last_iou")}
  return jnp.asarray(total), terms | log | {name: sums[name] for name in ("prompts", "objects")}


def ask(key: Key[Array, ""], targets: Targets, side: int, config: VisualConfig) -> Asked:
  """Draws the first prompts: clicks on objects or on nothing, and boxes.

  Args:
    key: decides all of it.
    targets: with the leading axes [B, R].
    side: cells a side of the decoder's grid, of which the targets' is a multiple.
    config: see there.
  """

  def of_image(key: Array, boxes: Array, masks: Array, valid: Array) -> tuple[Array, ...]:
    keys, count = jax.random.split(key, 5), config.prompts
    chosen = jax.random.categorical(keys[0], _logits(valid), shape=(count,))
    on_nothing = jax.random.uniform(keys[1], (count,), jnp.float32) < config.nothing
    boxed = jax.random.uniform(keys[2], (count,), jnp.float32) < config.boxed
    on_nothing &= ~boxed
    # Few of the masks become floats: most are padding.
    anywhere = jnp.where(valid[:, None, None], masks, 0).max(axis=0, initial=0)
    free = shrunk(fractions(anywhere), side) == 0
    covered = jnp.where(on_nothing[:, None, None], 0, shrunk(fractions(masks[chosen]), side))
    inside = _inside(covered)
    clicks = _draw(keys[3], jnp.where(on_nothing[:, None, None], free, inside))
    corners = _noisy(keys[4], boxes[chosen], config).reshape(count, 2, 2)
    xy = jnp.concatenate([corners, clicks[:, None]], axis=1)
    labels = jnp.where(
      boxed[:, None], jnp.array([*CORNERS, PADDING]), jnp.array([PADDING] * 2 + [1])
    )
    # Where all is covered, there is no click on nothing.
    asks = valid.any() & (~on_nothing | free.any())
    return covered, inside, jnp.broadcast_to(asks, count), xy, labels

  flat = jax.tree.map(lambda x: x.reshape(len(x), -1, *x.shape[3:]), targets)
  keys = jax.random.split(key, len(flat.valid))
  found = jax.vmap(of_image)(keys, flat.boxes, flat.masks, flat.valid)
  covered, inside, valid, xy, labels = (x.reshape(-1, *x.shape[2:]) for x in found)
  room = (0, 0), (0, config.rounds - 1)
  return Asked(
    image=jnp.repeat(jnp.arange(len(keys)), config.prompts),
    covered=covered,
    inside=inside,
    valid=valid,
    xy=jnp.pad(xy, (*room, (0, 0))),
    labels=jnp.pad(labels, room, constant_values=PADDING),
  )


def mend(
  key: Key[Array, ""], mask: Bool[Array, "P Hm Wm"], inside: Bool[Array, "P Hm Wm"]
) -> tuple[Float[Array, "P 2"], Int[Array, " P"]]:
  """A click somewhere where the mask is wrong, and its label: 1 on the object, 0 off it. Of a mask
  without fault, one anywhere on the object, or if there is none, anywhere."""
  wrong = mask != inside
  somewhere = inside | ~inside.any(axis=(1, 2), keepdims=True)
  cells = jnp.where(wrong.any(axis=(1, 2), keepdims=True), wrong, somewhere)
  xy = _draw(key, cells)
  column, row = (jnp.floor(xy * inside.shape[-1]).astype(jnp.int32)[:, i] for i in (0, 1))
  return xy, inside[jnp.arange(len(inside)), row, column].astype(jnp.int32)


def _predict(
  head: VisualHead, variables: Any, embedding: VisualEmbedding, prompts: VisualPrompts
) -> VisualHeadOutput:
  """Predictions for prompts that are equally many of each image, image by image: so no
  image's maps are gathered, whose gradients would have to be scattered."""

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
  """Each prompt's mask that the model itself thinks best."""
  choice = found.iou.argmax(axis=1)[:, None, None, None]
  return jnp.take_along_axis(found.mask_logits, choice, axis=1)[:, 0].astype(jnp.float32)


def _round_sums(found: VisualHeadOutput, asked: Asked, config: VisualConfig) -> Sums:
  """Of one round, over prompts: the terms, and as `shown` the IoU of the masks thought best."""
  logits, masks = found.mask_logits, asked.covered
  wide, wanted = logits.astype(jnp.float32), masks[:, None]
  cross = (jax.nn.softplus(wide) - wide * wanted).mean(axis=(2, 3))
  dice = dice_loss(jax.nn.sigmoid(wide), wanted)
  # Of the readings the one that costs least; the others' masks do not learn.
  costs = config.mask_weight * cross + config.dice_weight * dice
  reading = 1 + costs[:, 1:].argmin(axis=1)[:, None]
  cross, dice = (x[:, 0] + jnp.take_along_axis(x, reading, axis=1)[:, 0] for x in (cross, dice))

  there, inside = asked.inside.any(axis=(1, 2)), asked.inside[:, None]
  shown = logits > 0
  both, either = ((x.sum(axis=(2, 3))) for x in (shown & inside, shown | inside))
  overlap = both.astype(jnp.float32) / jnp.maximum(either, 1).astype(jnp.float32)
  iou = ((found.iou - overlap) ** 2).mean(axis=1)
  best = jnp.take_along_axis(overlap, found.iou.argmax(axis=1)[:, None], axis=1)[:, 0]
  exists = jax.nn.softplus(found.object_logit) - found.object_logit * there

  of_object = asked.valid & there
  return {
    "mask": jnp.where(of_object, cross, 0).sum(),
    "dice": jnp.where(of_object, dice, 0).sum(),
    "iou": jnp.where(asked.valid, iou, 0).sum(),
    "object": jnp.where(asked.valid, exists, 0).sum(),
    "shown": jnp.where(of_object, best, 0).sum(),
  }


def _inside(covered: Float[Array, "P Hm Wm"]) -> Bool[Array, "P Hm Wm"]:
  """The cells of each object: at least one, unless there is no object."""
  most = covered.max(axis=(1, 2), keepdims=True)
  return (covered >= jnp.minimum(COVERED, most)) & (covered > 0)


def _draw(key: Key[Array, ""], cells: Bool[Array, "P Hm Wm"]) -> Float[Array, "P 2"]:
  """A point, x and y as fractions, anywhere in these cells of each row."""
  choosing, placing = jax.random.split(key)
  rows, side = len(cells), cells.shape[-1]
  logits = _logits(cells).reshape(rows, -1)
  row, column = jnp.divmod(jax.random.categorical(choosing, logits), side)
  # Not on the far edge of a cell, which rounding could make the next one's.
  within = jax.random.uniform(placing, (rows, 2), jnp.float32, maxval=0.999)
  return (jnp.stack([column, row], axis=1) + within) / side


def _logits(chosen: Bool[Array, "*rows"]) -> Float[Array, "*rows"]:
  """Of a draw among what is chosen, each as likely."""
  return jnp.where(chosen, jnp.float32(0), -jnp.inf)


def _noisy(
  key: Key[Array, ""], boxes: Float[Array, "P 4"], config: VisualConfig
) -> Float[Array, "P 4"]:
  """Boxes, cxcywh, as xyxy whose sides were moved a little; not past each other."""
  centre, extent = boxes[:, :2], boxes[:, 2:]
  scale = jnp.minimum(config.box_noise * extent, config.box_noise_limit)
  shift = scale[:, None] * jax.random.normal(key, (len(boxes), 2, 2), jnp.float32)
  limit = jnp.minimum(config.box_noise_limit, extent / 2)[:, None]
  shift = jnp.clip(shift, -limit, limit)
  corners = jnp.stack([centre - extent / 2, centre + extent / 2], axis=1) + shift
  return jnp.clip(corners, 0, 1).reshape(-1, 4)
