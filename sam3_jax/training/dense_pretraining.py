"""Dense pretraining: every cell of the image is a query of all its image's phrases at once.

A small model trained from scratch learns so, many times faster than through its queries, what
things look like, what they are called, and where they end: a cell says which of the phrases it
shows, and where there is an object, its box and its mask, by the same heads that later serve the
queries. Trunk, neck, fusion encoder and mask head run once an image, the text encoder once a
phrase; the geometry encoder and the decoder's layers are left for what follows.
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
from sam3_jax.training.losses import at_least_one, cell_loss, dice_loss, fractions, shrunk
from sam3_jax.training.matcher import overlap
from sam3_jax.types import ImageMaps, TextEmbedding
from sam3_jax.utils.validation import check_numbers

# What is added up: the terms that have a weight.
TERMS = ("coarse", "middle", "fine", "class", "box", "giou", "mask", "dice", "semantic_dice")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseConfig:
  """Weights of the terms of `dense_loss`, and what is asked of an image."""

  coarse_weight: float = 1.0  # of what the cells of the neck's maps are called
  middle_weight: float = 0.5
  fine_weight: float = 0.5
  class_weight: float = 2.0
  box_weight: float = 5.0
  giou_weight: float = 2.0
  mask_weight: float = 5.0
  dice_weight: float = 2.0
  semantic_dice_weight: float = 0.5
  objects: int = 8  # of an image, drawn at random, whose masks are asked of one of their cells
  inside: float = 0.4  # of a cell: so much of it an object must cover to be asked for its box

  def __post_init__(self):
    check = functools.partial(check_numbers, self, "dense")
    check([f"{name}_weight" for name in TERMS], 0)
    check(("objects",), 1)
    check(("inside",), 0, 1, "(]")


class Survey(NamedTuple):
  """What the cells say: `logits` of each phrase, `memory` after fusion, masks of some cells."""

  logits: Float[Array, "B R HW"]
  memory: Float[Array, "B HW D"]
  mask_logits: Float[Array, "B O Hm Wm"]
  semantic_logits: Float[Array, "B Hm Wm"]


@standard_promotion
def dense_loss(
  parameters: Any,
  detector: Detector,
  maps: ImageMaps,
  text: TextEmbedding,
  batch: Batch,
  key: Key[Array, ""],
  config: DenseConfig,
  masked: int | None = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
  """The weighted sum of the losses, and its terms.

  Args:
    parameters: the model's tree.
    detector: the model.
    maps: of the batch's images.
    text: of its tokens, flattened.
    batch: masks of the size of `maps.fine`, or larger by a whole number.
    key: draws objects, cells and dropout.
    config: weights.
    masked: only the first so many phrases of an image have objects; None for all.

  Returns:
    Total and terms. `coarse`, `middle`, `fine`: cross-entropy of the neck's cells over the phrases
    and none of them. After fusion, `class`: `cell_loss`, added up over phrases; `box` (L1 of
    cxcywh), `giou`: of the cells that show an object; `mask`, `dice`: of one cell of each of some
    objects; `semantic_dice`: of all phrases' union. For the log, `accuracy` of the coarse cells
    that show an object, and `iou`, the mean of their boxes'.
  """
  images, rows = batch.prompt_valid.shape
  side = maps.coarse.shape[1]
  targets = jax.tree.map(lambda x: x[:, :masked], batch.targets)
  valid = (targets.valid & batch.prompt_valid[:, :masked, None]).reshape(images, -1)
  covered = fractions(targets.masks).reshape(images, -1, *targets.masks.shape[3:])
  covered = jnp.where(valid[..., None, None], covered, 0)  # [B, R * O, Ht, Wt]
  in_cells = shrunk(covered, side).reshape(*covered.shape[:2], -1)
  phrases = covered.reshape(images, targets.valid.shape[1], -1, *covered.shape[2:]).max(axis=2)
  phrases = jnp.pad(phrases, [(0, 0), (0, rows - phrases.shape[1]), (0, 0), (0, 0)])

  which, cells, dropout = jax.random.split(key, 3)
  number = min(config.objects, valid.shape[1])
  drawn, chosen = jax.lax.top_k(
    valid * (1 + jax.random.uniform(which, valid.shape, jnp.float32)), number
  )
  shares = jnp.take_along_axis(in_cells, chosen[..., None], axis=1)
  likely = shares >= 0.5 * shares.max(axis=2, keepdims=True)
  cell = jnp.argmax(likely * (1 + jax.random.uniform(cells, shares.shape, jnp.float32)), axis=2)
  found: Any = detector.apply(
    {"params": parameters}, maps, text, batch.prompt_valid, cell,
    method=_survey, rngs={"dropout": dropout},
  )  # fmt: skip

  terms = _naming(maps, text, batch, phrases)
  classes = jnp.where(batch.prompt_valid, cell_loss(found.logits, phrases), 0)
  terms["class"] = classes.sum(axis=1).mean()
  boxes = targets.boxes.reshape(images, -1, 4)
  terms |= _boxes(_box_head(parameters, found.memory), in_cells, boxes, config.inside)
  wanted = shrunk(jnp.take_along_axis(covered, chosen[..., None, None], axis=1), 4 * side)
  weights = (drawn > 0) / at_least_one(drawn > 0)
  bce = jax.nn.softplus(found.mask_logits) - found.mask_logits * wanted
  terms["mask"] = (weights * bce.mean(axis=(2, 3))).sum()
  terms["dice"] = (weights * dice_loss(jax.nn.sigmoid(found.mask_logits), wanted)).sum()
  union = shrunk(phrases.max(axis=1), 4 * side)
  terms["semantic_dice"] = dice_loss(jax.nn.sigmoid(found.semantic_logits), union).mean()
  weighted = [getattr(config, f"{name}_weight") * terms[name] for name in TERMS]
  return jnp.stack(weighted).sum(), terms


def _survey(
  detector: Any,
  maps: ImageMaps,
  text: TextEmbedding,
  valid: Bool[Array, "B R"],
  cells: Int[Array, "B O"],
) -> Survey:
  """The model without its queries. A phrase is one token here, the mean of its own."""
  images, rows = valid.shape
  coarse, width = maps.coarse, maps.coarse.shape[-1]
  position = sine_map(coarse.shape[1], coarse.shape[2], width).reshape(-1, width)
  phrases = _means(text).reshape(images, rows, width).astype(coarse.dtype)
  valid = valid.at[:, 0].set(True)  # attention needs something to look at
  embedding = detector.prepare(maps)
  tokens = embedding.attended.reshape(images, -1, width)
  memory = detector.fusion(tokens, position, phrases, valid)
  states = jnp.take_along_axis(memory, cells[..., None], axis=1)
  levels = embedding.middle, embedding.fine
  masks, semantic = detector.masks(states, memory.reshape(coarse.shape), levels, phrases, valid)
  logits = detector.scoring(jnp.repeat(memory, rows, axis=0), text.features, text.valid)
  masks, semantic = masks.astype(jnp.float32), semantic.astype(jnp.float32)
  return Survey(logits.reshape(images, rows, -1), memory, masks, semantic)


def _naming(
  maps: ImageMaps, text: TextEmbedding, batch: Batch, phrases: Float[Array, "B R Ht Wt"]
) -> dict[str, Array]:
  """Cross-entropy of the neck's cells. The logit of a phrase is the scaled product of a cell's
  features with the mean of the phrase's, that of none of them is 0; an edge is shared by coverage,
  and a cell of two phrases for the same thing between them."""
  names = _means(text).reshape(*batch.prompt_valid.shape, -1)
  terms = {}
  for level in ("coarse", "middle", "fine"):
    features = getattr(maps, level).astype(jnp.float32)
    logits = einsum("bhwd,brd->brhw", features, names) / features.shape[-1] ** 0.5
    logits = jnp.where(batch.prompt_valid[..., None, None], logits, -1e9)
    logits = jnp.concatenate([jnp.zeros_like(logits[:, :1]), logits], axis=1)
    wanted = _with_none(shrunk(phrases, logits.shape[-1]))
    terms[level] = -(wanted * jax.nn.log_softmax(logits, axis=1)).sum(axis=1).mean()
    if level == "coarse":
      shown = wanted[:, 0] < 0.5
      right = shown & (logits.argmax(axis=1) == wanted.argmax(axis=1))
      terms["accuracy"] = right.sum().astype(jnp.float32) / at_least_one(shown)
  return terms


def _box_head(parameters: Any, memory: Float[Array, "B HW D"]) -> Float[Array, "B HW 4"]:
  """The decoder's own, from a box in the middle: cxcywh."""
  alone: dict[str, Any] = {"dtype": jnp.float32, "parent": None}
  heads, width = parameters["decoder"], memory.shape[-1]

  def apply(module: nn.Module, name: str, x: Array) -> Any:
    return module.apply({"params": heads[name]}, x)

  normed = apply(LayerNorm(**alone), "norm", memory)
  return jax.nn.sigmoid(apply(Mlp((width, width, 4), **alone), "box_head", normed))


def _boxes(
  found: Float[Array, "B HW 4"],
  in_cells: Float[Array, "B O HW"],
  boxes: Float[Array, "B O 4"],
  inside: float,
) -> dict[str, Array]:
  """Of each cell's object, the one that covers most of it, if that is so much of the cell."""
  owner, asked = in_cells.argmax(axis=1), in_cells.max(axis=1) >= inside
  wanted = jnp.take_along_axis(boxes, owner[..., None], axis=1)
  wanted = jnp.where(asked[..., None], wanted, 0.5)
  iou, giou = overlap(found, wanted)
  weights = asked / at_least_one(asked)
  l1 = jnp.abs(found - wanted).sum(axis=-1)
  return {name: (weights * x).sum() for name, x in (("box", l1), ("giou", 1 - giou), ("iou", iou))}


def _means(text: TextEmbedding) -> Float[Array, "P D"]:
  return jnp.mean(text.features, axis=1, where=text.valid[..., None]).astype(jnp.float32)


def _with_none(covered: Float[Array, "B R H W"]) -> Float[Array, "B R1 H W"]:
  """Each cell's distribution over none and the phrases; it adds up to 1."""
  total = covered.sum(axis=1, keepdims=True)
  none = 1 - covered.max(axis=1, keepdims=True)
  return jnp.concatenate([none, covered * (1 - none) / jnp.maximum(total, 1e-6)], axis=1)
