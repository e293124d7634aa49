"""What is minimised in training: classification, presence, boxes, masks and the semantic map.

Meta's `sam3/train/loss` with the weights of its fine-tuning configurations, as arrays of fixed
shape: padding, of objects and of prompts, adds nothing to any sum, and all means are over the whole
batch, so that a batch sharded over devices has the loss it has on one.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num

from sam3_jax.training.batch import Targets, standard_promotion
from sam3_jax.training.matcher import Pairs, one_to_many, one_to_one, overlap
from sam3_jax.types import DetectorOutput
from sam3_jax.utils.validation import check_numbers

Terms = dict[str, Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
  """Weights and shapes of the losses; a weight of 0 leaves its work out where it is large."""

  class_weight: float = 20.0
  positive_weight: float = 10.0  # of a positive query in the classification; 5 for ODinW
  negative_power: float = 2.0  # of a negative query's probability, its weight: focal gamma
  pad_queries: int = 200  # the classification's mean is over at least so many queries; 0 for as is
  presence_weight: float = 20.0
  box_weight: float = 5.0
  giou_weight: float = 2.0
  mask_weight: float = 200.0
  dice_weight: float = 10.0
  semantic_weight: float = 20.0
  semantic_dice_weight: float = 30.0
  cell_weight: float = 0.0  # of `cell_loss`, which Meta does not have; for training from scratch
  many_weight: float = 2.0  # of each loss of the one-to-many queries
  many_masks: bool = True  # whether their masks are trained
  match_class: float = 2.0  # costs of the one-to-one assignment
  match_box: float = 5.0
  match_giou: float = 2.0
  # Of a positive query's target: the probability's exponent; IoU's is the rest.
  quality_alpha: float = 0.25
  mask_alpha: float = 0.25  # focal weight of a mask's cells that are covered; of the others 1 - it
  semantic_alpha: float = 0.6
  many_alpha: float = 0.3  # one to many: probability's share of a query's quality, IoU has the rest
  many_threshold: float = 0.4
  many_top: int = 4

  def __post_init__(self):
    check = functools.partial(check_numbers, self, "losses")
    names = [field.name for field in dataclasses.fields(self)]
    check([name for name in names if name.endswith("_weight")], 0)
    check(("negative_power", "pad_queries", "match_class", "match_box", "match_giou"), 0)
    check([name for name in names if name.endswith("_alpha")], 0, 1)
    check(("many_threshold",), 0, 1)
    check(("many_top",), 1)


@standard_promotion
def loss(
  predictions: DetectorOutput,
  queries: int,
  targets: Targets,
  prompt_valid: Bool[Array, " P"],
  config: LossConfig,
  images: int = 1,
) -> tuple[Float[Array, ""], Terms]:
  """The total, and its terms before their weights.

  Args:
    predictions: of `Detector.detect_all_layers`; logits of [L, P, queries] or, with duplicates,
      [L, P, 2 * queries]; masks of all prompts, or of the first n of each image's: the others' do
      not count.
    queries: one-to-one queries of the model, `Config.queries`.
    targets: of the same prompts; objects beyond the `queries` get no query.
    prompt_valid: False on padding.
    config: weights.
    images: that the prompts are about, equally many each, image by image; matters only where masks
      are of some prompts.

  Returns:
    The sum of all terms times their weights, times the square root of the number of prompts; and
    `class`, `presence`, `box`, `giou` of the last layer, the same with `_aux_i` of layer i before
    it, `mask`, `dice`, `semantic`, `semantic_dice` of the last, and `cells` if it has a weight.
    Names that end in `_many` are of the one-to-many queries, `many_weight` included. `prompts`,
    `objects` and `matched_iou` (mean over the last layer's one-to-one pairs) are for the log.
  """
  layers, prompts = predictions.presence_logit.shape
  valid = targets.valid & prompt_valid[:, None]
  # Padding may hold any box; one that is sound keeps NaN out of gradients.
  wanted = jnp.where(valid[..., None], targets.boxes, 0.5).astype(jnp.float32)
  some, objects = valid.any(axis=1), at_least_one(valid)
  count = at_least_one(prompt_valid)

  # The one-to-one queries, then the one-to-many ones: [sets, L, P, queries, ...].
  logits, boxes = (
    jnp.moveaxis(x.reshape(layers, prompts, -1, queries, *x.shape[3:]), 2, 0).astype(jnp.float32)
    for x in (predictions.logits, predictions.boxes)
  )
  pairs = match(logits, boxes, wanted, valid, config)
  box, giou, iou = _box_losses(boxes, wanted, pairs)
  classes = _class_losses(logits, iou, pairs, some, config)
  presence = _presence_losses(predictions.presence_logit, some, prompt_valid)
  terms = {
    **_by_layer("class", classes / count, config),
    **_by_layer("box", box / objects, config),
    **_by_layer("giou", giou / objects, config),
    **_by_layer("presence", presence[None] / count, config),
  }

  if config.cell_weight:
    covered = fractions(jnp.where(valid[..., None, None], targets.masks, 0).max(axis=1, initial=0))
    cells = cell_loss(predictions.cell_logits, covered)
    terms["cells"] = jnp.where(prompt_valid, cells, 0).sum() / count

  with_masks = functools.partial(_first_rows, rows=len(predictions.mask_logits), images=images)
  last, masks, shown = jax.tree.map(
    with_masks, (jax.tree.map(lambda x: jnp.moveaxis(x[:, -1], 1, 0), pairs), targets.masks, valid)
  )
  terms |= _mask_terms(predictions.mask_logits, queries, last, masks, shown, config)
  terms |= _semantic_terms(predictions.semantic_logits, masks, shown, config)

  total = sum(_weight(name, config) * value for name, value in terms.items())
  log = {
    "prompts": jnp.maximum(prompt_valid.sum(), 1),
    "objects": valid.sum(),
    "matched_iou": iou[0, -1].sum() / at_least_one(pairs.matched[0, -1]),
  }
  return total * jnp.sqrt(count), terms | log


def match(
  logits: Float[Array, "sets L P Q"],
  boxes: Float[Array, "sets L P Q 4"],
  wanted: Float[Array, "P O 4"],
  valid: Bool[Array, "P O"],
  config: LossConfig,
) -> Pairs:
  """The pairs [sets, L, P, O, M] of each set of queries in each layer: one to one, but one to many
  in the last layer of the second set, if there are two."""
  wanted = jnp.broadcast_to(wanted, (*logits.shape[:3], *wanted.shape[1:]))
  valid = jnp.broadcast_to(valid, wanted.shape[:-1])
  pairs = one_to_one(
    logits, boxes, wanted, valid,
    class_weight=config.match_class, l1_weight=config.match_box, giou_weight=config.match_giou,
  )  # fmt: skip
  if len(logits) == 1:
    return pairs
  many = one_to_many(
    *(x[1, -1] for x in (logits, boxes, wanted, valid)),
    alpha=config.many_alpha, threshold=config.many_threshold, top=config.many_top,
  )  # fmt: skip
  padding = [(0, 0)] * 4 + [(0, many.query.shape[-1] - 1)]
  return jax.tree.map(lambda x, last: jnp.pad(x, padding).at[1, -1].set(last), pairs, many)


def _box_losses(
  boxes: Float[Array, "sets L P Q 4"], wanted: Float[Array, "P O 4"], pairs: Pairs
) -> tuple[Float[Array, "sets L"], Float[Array, "sets L"], Float[Array, "sets L P O M"]]:
  """Sums [sets, L] of L1 distance and of 1 - GIoU, and each pair's IoU without gradient."""
  found = _take(boxes, pairs.query)
  l1 = jnp.abs(found - wanted[..., None, :]).sum(axis=-1)
  iou, giou = overlap(found, wanted[..., None, :])
  l1, giou = (jnp.where(pairs.matched, x, 0).sum(axis=(2, 3, 4)) for x in (l1, 1 - giou))
  return l1, giou, jax.lax.stop_gradient(jnp.where(pairs.matched, iou, 0))


def _class_losses(
  logits: Float[Array, "sets L P Q"],
  iou: Float[Array, "sets L P O M"],
  pairs: Pairs,
  some: Bool[Array, " P"],
  config: LossConfig,
) -> Float[Array, "sets L"]:
  """Sums [sets, L] over prompts that have objects of the mean over queries.

  A positive query is to score by how well its box fits, a negative one 0 (IoU-aware BCE, as in
  Align-DETR, Cai et al. 2023, arXiv:2304.07527). A query of several objects goes by the best.
  """
  probability = jax.nn.sigmoid(logits)
  paired = _take(probability[..., None], pairs.query)[..., 0]
  alpha = config.quality_alpha
  quality = jnp.maximum(paired**alpha * iou ** (1 - alpha), 0.01)
  numbers = jnp.arange(logits.shape[-1])
  chosen = (pairs.query[..., None] == numbers) & pairs.matched[..., None]
  quality = jnp.where(chosen, quality[..., None], 0).max(axis=(3, 4), initial=0)
  quality = jax.lax.stop_gradient(quality)

  absent = jax.nn.softplus(logits)  # BCE to 0
  positive = config.positive_weight * (absent - logits * quality)
  losses = jnp.where(quality > 0, positive, absent * probability**config.negative_power)
  mean = losses.sum(axis=-1) / max(logits.shape[-1], config.pad_queries)
  return jnp.where(some, mean, 0).sum(axis=-1)


def _presence_losses(
  presence: Float[Array, "L P"], some: Bool[Array, " P"], prompt_valid: Bool[Array, " P"]
) -> Float[Array, " L"]:
  """Sums [L] over prompts; half of the BCE, as a focal loss of alpha 0.5 has it."""
  presence = presence.astype(jnp.float32)
  losses = 0.5 * (jax.nn.softplus(presence) - presence * some)
  return jnp.where(prompt_valid, losses, 0).sum(axis=-1)


def _mask_terms(
  logits: Float[Array, "P _ Hm Wm"],
  queries: int,
  pairs: Pairs,
  masks: Num[Array, "P O Ht Wt"],
  valid: Bool[Array, "P O"],
  config: LossConfig,
) -> Terms:
  """Focal and dice loss of the pairs [P, sets, O, M], summed in each set; `logits` are of all sets'
  queries, one set after the other."""
  sets = [jax.tree.map(lambda x: x[:, 0, :, :1], pairs)]  # one to one
  if pairs.query.shape[1] == 2 and config.many_masks:
    many = jax.tree.map(lambda x: x[:, 1], pairs)
    sets.append(many.replace(query=many.query + queries))
  joined = jax.tree.map(lambda *x: jnp.concatenate(x, axis=-1), *sets)

  # One pair of each prompt at a time, matched ones first, so that most of the steps have nothing to
  # do: at the size of the targets all pairs would take gigabytes, and most of them are padding.
  flat = jax.tree.map(lambda x: x.reshape(len(masks), -1), joined)
  order = jnp.argsort(~flat.matched, axis=1)
  query, matched = (jnp.take_along_axis(x, order, axis=1) for x in (flat.query, flat.matched))
  target, place = jnp.divmod(order, joined.query.shape[-1])
  found = jax.vmap(lambda maps, query: maps[query], out_axes=1)(logits, query)

  @jax.checkpoint
  def step(found, target, matched):
    def losses(found):
      mask = jnp.take_along_axis(masks, target[:, None, None, None], axis=1)[:, 0]
      return mask_losses(found, mask, config.mask_alpha)

    nothing = jnp.zeros(len(found), jnp.float32)
    return jax.lax.cond(matched.any(), losses, lambda _: (nothing, nothing), found)

  focal, dice = jax.lax.map(lambda pair: step(*pair), (found, target.T, matched.T))
  terms = {}
  for kind, chosen, scale in (("", place == 0, 1.0), ("_many", place > 0, config.many_weight)):
    if not kind or len(sets) > 1:
      weights = jnp.where(matched & chosen, scale / at_least_one(valid), 0).T
      terms["mask" + kind] = (weights * focal).sum()
      terms["dice" + kind] = (weights * dice).sum()
  return terms


def cell_loss(
  logits: Float[Array, "*rows HW"], covered: Float[Array, "*rows Ht Wt"]
) -> Float[Array, "*rows"]:
  """Of "this cell shows an object": cross-entropy that follows the misses and counts objects five
  times, the mean over cells. `covered` is finer than the cells by a whole number."""
  wanted = shrunk(covered, math.isqrt(logits.shape[-1])).reshape(logits.shape)
  bce = jax.nn.softplus(logits) - logits * wanted
  miss = jnp.abs(jax.nn.sigmoid(logits) - wanted)
  return (bce * (miss + 0.1) * (1 + 4 * wanted)).mean(axis=-1)


def shrunk(maps: Float[Array, "*rows Ht Wt"], side: int) -> Float[Array, "*rows H W"]:
  """Means over squares of cells, `side` of them a side."""
  factor = maps.shape[-1] // side
  return maps.reshape(*maps.shape[:-2], side, factor, side, factor).mean(axis=(-3, -1))


def at_least_one(chosen: Bool[Array, "*any"]) -> Float[Array, ""]:
  """How many are chosen, to divide by; float32 in 64-bit mode too, where quotients of whole numbers
  are float64."""
  return jnp.maximum(chosen.sum(), 1).astype(jnp.float32)


def fractions(masks: Array) -> Float[Array, "*rows"]:
  """Coverage in [0, 1], of bytes or of floats."""
  return masks.astype(jnp.float32) / (255 if masks.dtype == jnp.uint8 else 1)


def _semantic_terms(
  logits: Float[Array, "P Hm Wm"],
  masks: Num[Array, "P O Ht Wt"],
  valid: Bool[Array, "P O"],
  config: LossConfig,
) -> Terms:
  """Of the union of a prompt's objects; the mean over prompts that have any."""
  union = jnp.where(valid[..., None, None], masks, 0).max(axis=1, initial=0)
  focal, dice = mask_losses(logits, union, config.semantic_alpha)
  some = valid.any(axis=1)
  weights = some / at_least_one(some)
  return {"semantic": (weights * focal).sum(), "semantic_dice": (weights * dice).sum()}


def mask_losses(
  logits: Float[Array, "P Hm Wm"], masks: Array, alpha: float
) -> tuple[Float[Array, " P"], Float[Array, " P"]]:
  """Focal loss with gamma 2 (Lin et al. 2017, arXiv:1708.02002), the mean over cells, and dice
  loss, at the size of `masks` [P, Ht, Wt]."""
  masks, logits = fractions(masks), logits.astype(jnp.float32)
  if logits.shape != masks.shape:
    logits = jax.image.resize(logits, masks.shape, "linear", antialias=False)
  probability = jax.nn.sigmoid(logits)
  miss = probability + masks - 2 * probability * masks
  bce = jax.nn.softplus(logits) - logits * masks
  focal = bce * miss**2 * (1 - alpha + (2 * alpha - 1) * masks)
  return focal.mean(axis=(1, 2)), dice_loss(probability, masks)


def dice_loss(
  probability: Float[Array, "*rows H W"], masks: Float[Array, "*rows H W"]
) -> Float[Array, "*rows"]:
  """1 - (2 intersection + 1) / (sum of areas + 1)."""
  areas = (probability + masks).sum(axis=(-2, -1))
  return 1 - (2 * (probability * masks).sum(axis=(-2, -1)) + 1) / (areas + 1)


def _take(values: Float[Array, "*rows Q C"], query: Array) -> Float[Array, "*rows O M C"]:
  """The rows of `values` that `query` [*rows, O, M] names."""
  flat = query.reshape(*query.shape[:-2], -1, 1)
  return jnp.take_along_axis(values, flat, axis=-2).reshape(*query.shape, values.shape[-1])


def _first_rows(x: Array, rows: int, images: int) -> Array:
  """The first rows of each image's, `rows` in all, of prompts image by image."""
  if len(x) == rows:
    return x
  return x.reshape(images, -1, *x.shape[1:])[:, : rows // images].reshape(rows, *x.shape[1:])


def _by_layer(name: str, values: Float[Array, "sets L"], config: LossConfig) -> Terms:
  terms = {}
  for values_of_set, kind, scale in zip(
    values, ("", "_many"), (1.0, config.many_weight), strict=False
  ):
    for i, value in enumerate(values_of_set):
      layer = "" if i == len(values_of_set) - 1 else f"_aux_{i}"
      terms[name + layer + kind] = scale * value
  return terms


def _weight(name: str, config: LossConfig) -> float:
  return {
    "class": config.class_weight,
    "presence": config.presence_weight,
    "box": config.box_weight,
    "giou": config.giou_weight,
    "mask": config.mask_weight,
    "dice": config.dice_weight,
    "semantic": config.semantic_weight,
    "cells": config.cell_weight,
    "semantic_dice": config.semantic_dice_weight,
  }[name.removesuffix("_many").partition("_aux_")[0]]
