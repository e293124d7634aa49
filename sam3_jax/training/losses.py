"""Losses of detection: classification, presence, boxes, masks and the semantic map.

Meta's `sam3/train/loss` with the weights of its fine-tuning configurations, on arrays of a fixed
shape. Padding objects and prompts add nothing to any sum, and all averages are over the whole
batch, so that a batch sharded over devices has the same loss as on one device.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num

from sam3_jax.training.batch import Targets, standard_promotion
from sam3_jax.training.mask_losses import at_least_one, cell_loss, fractions, mask_losses
from sam3_jax.training.matcher import Pairs, one_to_many, one_to_one, overlap
from sam3_jax.types import DetectorOutput
from sam3_jax.utils.validation import check_numbers

Terms = dict[str, Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
  """Weights and parameters of the losses; the defaults are Meta's.

  A weight of 0 also skips the work of an expensive loss.
  """

  # Weight of the classification loss.
  class_weight: float = 20.0
  # Factor on the classification loss of matched queries; Meta uses 5 for ODinW.
  positive_weight: float = 10.0
  # Focal loss gamma of unmatched queries in the classification.
  focal_gamma: float = 2.0
  # Smallest number of queries to average the classification loss over; 0 for the model's number.
  pad_queries: int = 200
  # Weight of the presence loss.
  presence_weight: float = 20.0
  # Weight of the L1 loss of boxes.
  box_weight: float = 5.0
  # Weight of the GIoU loss of boxes.
  giou_weight: float = 2.0
  # Weight of the focal loss of masks.
  mask_weight: float = 200.0
  # Weight of the dice loss of masks.
  dice_weight: float = 10.0
  # Weight of the focal loss of the semantic map.
  semantic_weight: float = 20.0
  # Weight of the dice loss of the semantic map.
  semantic_dice_weight: float = 30.0
  # Weight of the loss of the encoder's cells (`cell_loss`), for training from scratch; not in
  # Meta's code.
  cell_weight: float = 0.0
  # Factor on each loss of the one-to-many queries.
  one_to_many_weight: float = 2.0
  # Train the masks of the one-to-many queries.
  one_to_many_masks: bool = True
  # Weight of the classification in the cost of the one-to-one assignment.
  cost_class: float = 2.0
  # Weight of the boxes' L1 distance in the cost of the one-to-one assignment.
  cost_box: float = 5.0
  # Weight of the boxes' GIoU in the cost of the one-to-one assignment.
  cost_giou: float = 2.0
  # The classification target of a matched query is probability^alpha * IoU^(1 - alpha).
  quality_alpha: float = 0.25
  # Focal loss alpha of masks: weight of covered cells; 1 - alpha is the weight of the others.
  mask_focal_alpha: float = 0.25
  # Focal loss alpha of the semantic map.
  semantic_focal_alpha: float = 0.6
  # A query's quality in the one-to-many assignment is alpha * probability + (1 - alpha) * IoU.
  one_to_many_alpha: float = 0.3
  # Quality that a query must exceed in the one-to-many assignment.
  one_to_many_threshold: float = 0.4
  # Maximum number of queries per object in the one-to-many assignment.
  one_to_many_top_k: int = 4

  def __post_init__(self):
    check = functools.partial(check_numbers, self, "losses")
    names = [field.name for field in dataclasses.fields(self)]
    check([name for name in names if name.endswith("_weight")], 0)
    check(("focal_gamma", "pad_queries", "cost_class", "cost_box", "cost_giou"), 0)
    check([name for name in names if name.endswith("_alpha")], 0, 1)
    check(("one_to_many_threshold",), 0, 1)
    check(("one_to_many_top_k",), 1)


@standard_promotion
def loss(
  predictions: DetectorOutput,
  queries: int,
  targets: Targets,
  prompt_valid: Bool[Array, " P"],
  config: LossConfig,
  images: int = 1,
) -> tuple[Float[Array, ""], Terms]:
  """The total loss, and its terms before their weights.

  Args:
    predictions: from `Detector.detect_all_layers`. Logits are [L, P, queries], or
      [L, P, 2 * queries] with one-to-many queries. Masks are of all prompts, or of the first
      prompts of each image; then the masks of the other prompts have no loss.
    queries: one-to-one queries of the model, `Config.queries`.
    targets: of the same prompts. Objects beyond the number of queries are not matched.
    prompt_valid: False for padding.
    config: weights.
    images: number of images. Each has the same number of prompts, and prompts are ordered by image.
      Only needed if masks are of some of the prompts.

  Returns:
    The weighted sum of all terms, times the square root of the number of prompts; and the terms:
    `class`, `presence`, `box` and `giou` of the last layer, with `_aux_i` of layer i before it;
    `mask`, `dice`, `semantic` and `semantic_dice` of the last layer; `cells` if it has a weight.
    Names that end in `_many` are of the one-to-many queries, and include `one_to_many_weight`.
    `prompts`, `objects` and `matched_iou` (average over the last layer's one-to-one pairs) are only
    logged.
  """
  valid = targets.valid & prompt_valid[:, None]
  terms, pairs, log = _query_terms(predictions, queries, targets, valid, prompt_valid, config)
  count = at_least_one(prompt_valid)

  if config.cell_weight:
    coverage = fractions(jnp.where(valid[..., None, None], targets.masks, 0).max(axis=1, initial=0))
    cells = cell_loss(predictions.cell_logits, coverage)
    terms["cells"] = jnp.where(prompt_valid, cells, 0).sum() / count

  with_masks = functools.partial(_first_prompts, count=len(predictions.mask_logits), images=images)
  last, masks, shown = jax.tree.map(
    with_masks, (jax.tree.map(lambda x: jnp.moveaxis(x[:, -1], 1, 0), pairs), targets.masks, valid)
  )
  terms |= _mask_terms(predictions.mask_logits, queries, last, masks, shown, config)
  terms |= _semantic_terms(predictions.semantic_logits, masks, shown, config)

  total = sum(_weight(name, config) * value for name, value in terms.items())
  return total * jnp.sqrt(count), terms | log


def _query_terms(
  predictions: DetectorOutput,
  queries: int,
  targets: Targets,
  valid: Bool[Array, "P O"],
  prompt_valid: Bool[Array, " P"],
  config: LossConfig,
) -> tuple[Terms, Pairs, Terms]:
  """Terms of classification, boxes and presence; the matched pairs; and figures for the log."""
  layers, prompts = predictions.presence_logit.shape
  # Padding may hold any box; a valid one keeps NaN out of the gradients.
  wanted = jnp.where(valid[..., None], targets.boxes, 0.5).astype(jnp.float32)
  present, objects = valid.any(axis=1), at_least_one(valid)
  count = at_least_one(prompt_valid)

  # The one-to-one queries, then the one-to-many ones: [sets, L, P, queries, ...].
  logits, boxes = (
    jnp.moveaxis(x.reshape(layers, prompts, -1, queries, *x.shape[3:]), 2, 0).astype(jnp.float32)
    for x in (predictions.logits, predictions.boxes)
  )
  pairs = match(logits, boxes, wanted, valid, config)
  box, giou, iou = _box_losses(boxes, wanted, pairs)
  classes = _class_losses(logits, iou, pairs, present, config)
  presence = _presence_losses(predictions.presence_logit, present, prompt_valid)
  terms = {
    **_by_layer("class", classes / count, config),
    **_by_layer("box", box / objects, config),
    **_by_layer("giou", giou / objects, config),
    **_by_layer("presence", presence[None] / count, config),
  }
  log = {
    "prompts": jnp.maximum(prompt_valid.sum(), 1),
    "objects": valid.sum(),
    "matched_iou": iou[0, -1].sum() / at_least_one(pairs.matched[0, -1]),
  }
  return terms, pairs, log


def match(
  logits: Float[Array, "sets L P Q"],
  boxes: Float[Array, "sets L P Q 4"],
  wanted: Float[Array, "P O 4"],
  valid: Bool[Array, "P O"],
  config: LossConfig,
) -> Pairs:
  """Matches each set of queries with the targets in each layer: pairs [sets, L, P, O, M].

  The assignment is one to one, but one to many in the last layer of the second set if there is one.
  """
  wanted = jnp.broadcast_to(wanted, (*logits.shape[:3], *wanted.shape[1:]))
  valid = jnp.broadcast_to(valid, wanted.shape[:-1])
  pairs = one_to_one(
    logits, boxes, wanted, valid,
    class_weight=config.cost_class, l1_weight=config.cost_box, giou_weight=config.cost_giou,
  )  # fmt: skip
  if len(logits) == 1:
    return pairs
  many = one_to_many(
    *(x[1, -1] for x in (logits, boxes, wanted, valid)),
    alpha=config.one_to_many_alpha,
    threshold=config.one_to_many_threshold,
    top_k=config.one_to_many_top_k,
  )
  padding = [(0, 0)] * 4 + [(0, many.query.shape[-1] - 1)]
  return jax.tree.map(lambda x, last: jnp.pad(x, padding).at[1, -1].set(last), pairs, many)


def _box_losses(
  boxes: Float[Array, "sets L P Q 4"], wanted: Float[Array, "P O 4"], pairs: Pairs
) -> tuple[Float[Array, "sets L"], Float[Array, "sets L"], Float[Array, "sets L P O M"]]:
  """Sums of L1 distance and of 1 - GIoU, and each pair's IoU without gradient."""
  matched = _take(boxes, pairs.query)
  l1 = jnp.abs(matched - wanted[..., None, :]).sum(axis=-1)
  iou, giou = overlap(matched, wanted[..., None, :])
  l1, giou = (jnp.where(pairs.matched, x, 0).sum(axis=(2, 3, 4)) for x in (l1, 1 - giou))
  return l1, giou, jax.lax.stop_gradient(jnp.where(pairs.matched, iou, 0))


def _class_losses(
  logits: Float[Array, "sets L P Q"],
  iou: Float[Array, "sets L P O M"],
  pairs: Pairs,
  present: Bool[Array, " P"],
  config: LossConfig,
) -> Float[Array, "sets L"]:
  """Averages over queries, summed over prompts that have objects.

  The target of a matched query is the quality of its box, of the others 0 (IoU-aware BCE, as in
  Align-DETR, Cai et al. 2023, arXiv:2304.07527). A query of several objects uses the best quality.
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
  losses = jnp.where(quality > 0, positive, absent * probability**config.focal_gamma)
  mean = losses.sum(axis=-1) / max(logits.shape[-1], config.pad_queries)
  return jnp.where(present, mean, 0).sum(axis=-1)


def _presence_losses(
  presence: Float[Array, "L P"], present: Bool[Array, " P"], prompt_valid: Bool[Array, " P"]
) -> Float[Array, " L"]:
  """Sums over prompts of half the BCE, as in a focal loss with alpha 0.5."""
  presence = presence.astype(jnp.float32)
  losses = 0.5 * (jax.nn.softplus(presence) - presence * present)
  return jnp.where(prompt_valid, losses, 0).sum(axis=-1)


def _mask_terms(
  logits: Float[Array, "P _ Hm Wm"],
  queries: int,
  pairs: Pairs,
  masks: Num[Array, "P O Ht Wt"],
  valid: Bool[Array, "P O"],
  config: LossConfig,
) -> Terms:
  """Focal and dice loss of the pairs [P, sets, O, M], summed in each set; `logits` has the queries
  of all sets, one set after the other."""
  sets = [jax.tree.map(lambda x: x[:, 0, :, :1], pairs)]  # one to one
  if pairs.query.shape[1] == 2 and config.one_to_many_masks:
    many = jax.tree.map(lambda x: x[:, 1], pairs)
    sets.append(many.replace(query=many.query + queries))
  joined = jax.tree.map(lambda *x: jnp.concatenate(x, axis=-1), *sets)

  # One pair of each prompt at a time: all pairs at the size of the targets would take gigabytes.
  # Most pairs are padding, so matched pairs come first and later steps have nothing to do.
  flat = jax.tree.map(lambda x: x.reshape(len(masks), -1), joined)
  order = jnp.argsort(~flat.matched, axis=1)
  query, matched = (jnp.take_along_axis(x, order, axis=1) for x in (flat.query, flat.matched))
  target, slot = jnp.divmod(order, joined.query.shape[-1])
  paired = jax.vmap(lambda maps, query: maps[query], out_axes=1)(logits, query)

  @jax.checkpoint
  def step(logits, target, matched):
    def losses(logits):
      mask = jnp.take_along_axis(masks, target[:, None, None, None], axis=1)[:, 0]
      return mask_losses(logits, mask, config.mask_focal_alpha)

    zeros = jnp.zeros(len(logits), jnp.float32)
    return jax.lax.cond(matched.any(), losses, lambda _: (zeros, zeros), logits)

  focal, dice = jax.lax.map(lambda pair: step(*pair), (paired, target.T, matched.T))
  terms = {}
  for kind, chosen, scale in (
    ("", slot == 0, 1.0),
    ("_many", slot > 0, config.one_to_many_weight),
  ):
    if not kind or len(sets) > 1:
      weights = jnp.where(matched & chosen, scale / at_least_one(valid), 0).T
      terms["mask" + kind] = (weights * focal).sum()
      terms["dice" + kind] = (weights * dice).sum()
  return terms


def _semantic_terms(
  logits: Float[Array, "P Hm Wm"],
  masks: Num[Array, "P O Ht Wt"],
  valid: Bool[Array, "P O"],
  config: LossConfig,
) -> Terms:
  """Losses of the union of each prompt's objects, averaged over prompts that have any."""
  union = jnp.where(valid[..., None, None], masks, 0).max(axis=1, initial=0)
  focal, dice = mask_losses(logits, union, config.semantic_focal_alpha)
  present = valid.any(axis=1)
  weights = present / at_least_one(present)
  return {"semantic": (weights * focal).sum(), "semantic_dice": (weights * dice).sum()}


def _take(values: Float[Array, "*rows Q C"], query: Array) -> Float[Array, "*rows O M C"]:
  """Gathers the rows of `values` at the indices `query` [*rows, O, M]."""
  flat = query.reshape(*query.shape[:-2], -1, 1)
  return jnp.take_along_axis(values, flat, axis=-2).reshape(*query.shape, values.shape[-1])


def _first_prompts(x: Array, count: int, images: int) -> Array:
  """The first prompts of each image, `count` in all, from prompts that are ordered by image."""
  if len(x) == count:
    return x
  return x.reshape(images, -1, *x.shape[1:])[:, : count // images].reshape(count, *x.shape[1:])


def _by_layer(name: str, values: Float[Array, "sets L"], config: LossConfig) -> Terms:
  """Names the values of each set and layer."""
  terms = {}
  for values_of_set, kind, scale in zip(
    values, ("", "_many"), (1.0, config.one_to_many_weight), strict=False
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
