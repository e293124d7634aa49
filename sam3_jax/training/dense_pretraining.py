"""Dense pretraining: each cell of the image predicts which of the image's phrases it shows.

A small model trained from scratch learns much faster this way than through its queries. A cell that
shows an object also predicts its box and its mask, with the heads that the queries use later.
Trunk, neck, fusion encoder and mask head run once per image, the text encoder once per phrase. The
geometry encoder and the decoder's layers are not trained.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from sam3_jax.model.layers import Mlp
from sam3_jax.model.norms import LayerNorm
from sam3_jax.model.positions import sine_map
from sam3_jax.model.sam3 import Detector
from sam3_jax.ops.precision import einsum
from sam3_jax.training.batch import Batch, standard_promotion
from sam3_jax.training.mask_losses import (
  at_least_one,
  average_pool,
  cell_loss,
  dice_loss,
  fractions,
)
from sam3_jax.training.matcher import overlap
from sam3_jax.types import ImageMaps, TextEmbedding
from sam3_jax.utils.validation import check_numbers

# The terms that have a weight.
TERMS = ("coarse", "middle", "fine", "class", "box", "giou", "mask", "dice", "semantic_dice")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseConfig:
  """Losses and sampling of `dense_loss`."""

  # Weight of the phrase classification of cells in the neck's coarse map.
  coarse_weight: float = 1.0
  # Weight of the phrase classification of cells in the neck's middle map.
  middle_weight: float = 0.5
  # Weight of the phrase classification of cells in the neck's fine map.
  fine_weight: float = 0.5
  # Weight of the classification of cells after fusion.
  class_weight: float = 2.0
  # Weight of the L1 loss of boxes.
  box_weight: float = 5.0
  # Weight of the GIoU loss of boxes.
  giou_weight: float = 2.0
  # Weight of the cross-entropy of masks.
  mask_weight: float = 5.0
  # Weight of the dice loss of masks.
  dice_weight: float = 2.0
  # Weight of the dice loss of the semantic map.
  semantic_dice_weight: float = 0.5
  # Objects per image, sampled at random, whose masks are trained, each from one of its cells.
  sampled_objects: int = 8
  # Fraction of a cell that an object must cover for the cell's box to be trained.
  min_coverage: float = 0.4

  def __post_init__(self):
    check = functools.partial(check_numbers, self, "dense")
    check([f"{name}_weight" for name in TERMS], 0)
    check(("sampled_objects",), 1)
    check(("min_coverage",), 0, 1, "(]")


class CellPredictions(NamedTuple):
  """The model's output without queries.

  Attributes:
    logits: of each phrase in each cell.
    memory: features of the cells after fusion.
    mask_logits: masks of the sampled objects, each from one of its cells.
    semantic_logits: the semantic map of all phrases.
  """

  logits: Float[Array, "B R HW"]
  memory: Float[Array, "B HW D"]
  mask_logits: Float[Array, "B O Hm Wm"]
  semantic_logits: Float[Array, "B Hm Wm"]


class _Coverage(NamedTuple):
  """What the objects of each image cover, the objects of all its prompts along one axis."""

  valid: Bool[Array, "B O"]
  boxes: Float[Array, "B O 4"]
  objects: Float[Array, "B O Ht Wt"]
  cells: Float[Array, "B O HW"]
  phrases: Float[Array, "B R Ht Wt"]


@standard_promotion
def dense_loss(
  parameters: Any,
  detector: Detector,
  maps: ImageMaps,
  text: TextEmbedding,
  batch: Batch,
  key: Key[Array, ""],
  config: DenseConfig,
  mask_prompts: int | None = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
  """The weighted sum of the losses, and its terms.

  Args:
    parameters: the model's parameter tree.
    detector: the model.
    maps: of the batch's images.
    text: of its tokens, flattened.
    batch: images and targets; masks have the size of `maps.fine`, or a multiple of it.
    key: samples objects, cells and dropout.
    config: weights.
    mask_prompts: number of prompts of an image that may have objects, the first ones; None for all.

  Returns:
    The total and the terms. `coarse`, `middle`, `fine`: cross-entropy of the neck's cells over the
    phrases and none of them. After fusion: `class`, `cell_loss` summed over phrases; `box` (L1 of
    cxcywh) and `giou` of the cells that show an object; `mask` and `dice` of one cell of each
    sampled object; `semantic_dice` of the union of all phrases. `accuracy` of the coarse cells that
    show an object, and `iou`, the average of their boxes', are only logged.
  """
  side = maps.coarse.shape[1]
  targets = _coverage(batch, side, mask_prompts)
  sampling, cell_sampling, dropout = jax.random.split(key, 3)
  number = min(config.sampled_objects, targets.valid.shape[1])
  noise = jax.random.uniform(sampling, targets.valid.shape, jnp.float32)
  sampled, objects = jax.lax.top_k(targets.valid * (1 + noise), number)
  covered = jnp.take_along_axis(targets.cells, objects[..., None], axis=1)
  candidates = covered >= 0.5 * covered.max(axis=2, keepdims=True)
  noise = jax.random.uniform(cell_sampling, covered.shape, jnp.float32)
  cells = jnp.argmax(candidates * (1 + noise), axis=2)
  predictions: Any = detector.apply(
    {"params": parameters}, maps, text, batch.prompt_valid, cells,
    method=_predict_cells, rngs={"dropout": dropout},
  )  # fmt: skip

  terms = _phrase_terms(maps, text, batch, targets.phrases)
  classes = cell_loss(predictions.logits, targets.phrases)
  terms["class"] = jnp.where(batch.prompt_valid, classes, 0).sum(axis=1).mean()
  boxes = _box_head(parameters, predictions.memory)
  terms |= _box_terms(boxes, targets.cells, targets.boxes, config.min_coverage)
  masks = jnp.take_along_axis(targets.objects, objects[..., None, None], axis=1)
  terms |= _mask_terms(predictions.mask_logits, average_pool(masks, 4 * side), sampled > 0)
  union = average_pool(targets.phrases.max(axis=1), 4 * side)
  terms["semantic_dice"] = dice_loss(jax.nn.sigmoid(predictions.semantic_logits), union).mean()
  weighted = [getattr(config, f"{name}_weight") * terms[name] for name in TERMS]
  return jnp.stack(weighted).sum(), terms


def _coverage(batch: Batch, side: int, mask_prompts: int | None) -> _Coverage:
  """Coverage by objects and phrases, on the masks' grid and on a grid of `side` x `side` cells."""
  images, prompts = batch.prompt_valid.shape
  targets = jax.tree.map(lambda x: x[:, :mask_prompts], batch.targets)
  valid = (targets.valid & batch.prompt_valid[:, :mask_prompts, None]).reshape(images, -1)
  objects = fractions(targets.masks).reshape(images, -1, *targets.masks.shape[3:])
  objects = jnp.where(valid[..., None, None], objects, 0)
  cells = average_pool(objects, side).reshape(*objects.shape[:2], -1)
  phrases = objects.reshape(images, targets.valid.shape[1], -1, *objects.shape[2:]).max(axis=2)
  phrases = jnp.pad(phrases, [(0, 0), (0, prompts - phrases.shape[1]), (0, 0), (0, 0)])
  return _Coverage(valid, targets.boxes.reshape(images, -1, 4), objects, cells, phrases)


def _predict_cells(
  detector: Any,
  maps: ImageMaps,
  text: TextEmbedding,
  valid: Bool[Array, "B R"],
  cells: Int[Array, "B O"],
) -> CellPredictions:
  """Runs the model without its queries. Each phrase is one token, the average of its tokens."""
  images, prompts = valid.shape
  coarse, width = maps.coarse, maps.coarse.shape[-1]
  position = sine_map(coarse.shape[1], coarse.shape[2], width).reshape(-1, width)
  phrases = _averages(text).reshape(images, prompts, width).astype(coarse.dtype)
  valid = valid.at[:, 0].set(True)  # attention needs at least one token
  embedding = detector.prepare(maps)
  tokens = embedding.attended.reshape(images, -1, width)
  memory = detector.fusion(tokens, position, phrases, valid)
  states = jnp.take_along_axis(memory, cells[..., None], axis=1)
  levels = embedding.middle, embedding.fine
  masks, semantic = detector.masks(states, memory.reshape(coarse.shape), levels, phrases, valid)
  logits = detector.scoring(jnp.repeat(memory, prompts, axis=0), text.features, text.valid)
  masks, semantic = masks.astype(jnp.float32), semantic.astype(jnp.float32)
  return CellPredictions(logits.reshape(images, prompts, -1), memory, masks, semantic)


def _phrase_terms(
  maps: ImageMaps, text: TextEmbedding, batch: Batch, phrases: Float[Array, "B R Ht Wt"]
) -> dict[str, Array]:
  """Cross-entropy of the neck's cells over the phrases and none of them.

  The logit of a phrase is the scaled product of a cell's features and the average of the phrase's
  tokens; the logit of none is 0. The target of a cell is divided among phrases by their coverage.
  """
  names = _averages(text).reshape(*batch.prompt_valid.shape, -1)
  terms = {}
  for level in ("coarse", "middle", "fine"):
    features = getattr(maps, level).astype(jnp.float32)
    logits = einsum("bhwd,brd->brhw", features, names) / features.shape[-1] ** 0.5
    logits = jnp.where(batch.prompt_valid[..., None, None], logits, -1e9)
    logits = jnp.concatenate([jnp.zeros_like(logits[:, :1]), logits], axis=1)
    target = _with_none(average_pool(phrases, logits.shape[-1]))
    terms[level] = -(target * jax.nn.log_softmax(logits, axis=1)).sum(axis=1).mean()
    if level == "coarse":
      present = target[:, 0] < 0.5
      correct = present & (logits.argmax(axis=1) == target.argmax(axis=1))
      terms["accuracy"] = correct.sum().astype(jnp.float32) / at_least_one(present)
  return terms


def _box_head(parameters: Any, memory: Float[Array, "B HW D"]) -> Float[Array, "B HW 4"]:
  """Boxes (cxcywh) from the decoder's box head, relative to a box in the center."""
  alone: dict[str, Any] = {"dtype": jnp.float32, "parent": None}
  heads, width = parameters["decoder"], memory.shape[-1]

  def apply(module: nn.Module, name: str, x: Array) -> Any:
    return module.apply({"params": heads[name]}, x)

  normed = apply(LayerNorm(**alone), "norm", memory)
  return jax.nn.sigmoid(apply(Mlp((width, width, 4), **alone), "box_head", normed))


def _box_terms(
  predicted: Float[Array, "B HW 4"],
  coverage: Float[Array, "B O HW"],
  boxes: Float[Array, "B O 4"],
  min_coverage: float,
) -> dict[str, Array]:
  """Losses of each cell's box. Its target is the object that covers most of the cell, if any covers
  at least `min_coverage` of it."""
  owner, valid = coverage.argmax(axis=1), coverage.max(axis=1) >= min_coverage
  target = jnp.take_along_axis(boxes, owner[..., None], axis=1)
  target = jnp.where(valid[..., None], target, 0.5)
  iou, giou = overlap(predicted, target)
  weights = valid / at_least_one(valid)
  l1 = jnp.abs(predicted - target).sum(axis=-1)
  return {name: (weights * x).sum() for name, x in (("box", l1), ("giou", 1 - giou), ("iou", iou))}


def _mask_terms(
  logits: Float[Array, "B O Hm Wm"], masks: Float[Array, "B O Hm Wm"], valid: Bool[Array, "B O"]
) -> dict[str, Array]:
  """Losses of the sampled objects' masks."""
  weights = valid / at_least_one(valid)
  bce = jax.nn.softplus(logits) - logits * masks
  return {
    "mask": (weights * bce.mean(axis=(2, 3))).sum(),
    "dice": (weights * dice_loss(jax.nn.sigmoid(logits), masks)).sum(),
  }


def _averages(text: TextEmbedding) -> Float[Array, "P D"]:
  return jnp.mean(text.features, axis=1, where=text.valid[..., None]).astype(jnp.float32)


def _with_none(coverage: Float[Array, "B R H W"]) -> Float[Array, "B R1 H W"]:
  """Each cell's distribution over none and the phrases; it sums to 1."""
  total = coverage.sum(axis=1, keepdims=True)
  none = 1 - coverage.max(axis=1, keepdims=True)
  return jnp.concatenate([none, coverage * (1 - none) / jnp.maximum(total, 1e-6)], axis=1)
