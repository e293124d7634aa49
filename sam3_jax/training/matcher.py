"""Assignment of queries to objects: one to one (Hungarian), and one to many.

Meta's `BinaryHungarianMatcherV2` and `BinaryOneToManyMatcher`, under `jit`: the problems of all
layers and prompts are solved in parallel, in float32, without gradients.
"""

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from sam3_jax.ops.boxes import cxcywh_to_xyxy, iou_and_giou

FORBIDDEN = 1e3  # above any cost, for logits within +-12 and boxes inside the image


@struct.dataclass
class Pairs:
  """The queries that are assigned to each object.

  Attributes:
    query: index of the query; 0 for padding.
    matched: False for padding.
  """

  query: Int[Array, "*rows O M"]
  matched: Bool[Array, "*rows O M"]


def one_to_one(
  logits: Float[Array, "*rows Q"],
  boxes: Float[Array, "*rows Q 4"],
  wanted: Float[Array, "*rows O 4"],
  valid: Bool[Array, "*rows O"],
  *,
  class_weight: float,
  l1_weight: float,
  giou_weight: float,
) -> Pairs:
  """Assigns one query to each object, at the least total cost; M is 1.

  The cost is a weighted sum of the focal loss's difference between object and background
  (Deformable DETR, Zhu et al. 2021, arXiv:2010.04159), the L1 distance of the boxes and minus their
  GIoU.

  Args:
    logits: of the queries, without presence.
    boxes: of the queries, cxcywh.
    wanted: boxes of the objects, cxcywh.
    valid: False for padding.
    class_weight, l1_weight, giou_weight: weights of the costs.
  """
  probability = jax.nn.sigmoid(logits)[..., None, :]
  log_yes, log_no = (jnp.log(p + 1e-8) for p in (probability, 1 - probability))
  focal = -0.25 * (1 - probability) ** 2 * log_yes + 0.75 * probability**2 * log_no
  l1 = jnp.abs(boxes[..., None, :, :] - wanted[..., :, None, :]).sum(axis=-1)
  _, giou = _all_overlaps(boxes, wanted)
  cost = class_weight * focal + l1_weight * l1 - giou_weight * giou
  query, matched = assign(jax.lax.stop_gradient(cost), valid)
  return Pairs(query[..., None], matched[..., None])


def one_to_many(
  logits: Float[Array, "*rows Q"],
  boxes: Float[Array, "*rows Q 4"],
  wanted: Float[Array, "*rows O 4"],
  valid: Bool[Array, "*rows O"],
  *,
  alpha: float,
  threshold: float,
  top_k: int,
) -> Pairs:
  """Assigns up to `top_k` queries to each object; M is min(top_k, Q).

  A query is assigned if its quality, alpha * probability + (1 - alpha) * IoU, is above `threshold`
  and above the object's (1 - top_k / Q) quantile over all queries. It may be assigned to several
  objects.
  """
  probability = jax.nn.sigmoid(logits)[..., None, :]
  iou, _ = _all_overlaps(boxes, wanted)
  quality = jax.lax.stop_gradient(alpha * probability + (1 - alpha) * iou)
  queries = quality.shape[-1]
  best, query = jax.lax.top_k(quality, min(top_k + 1, queries))
  if queries > top_k:
    # As torch.quantile interpolates between the last of the best `top_k` and the next.
    low, high = best[..., top_k, None], best[..., top_k - 1, None]
    quantile = low + (top_k / queries) * (high - low)
    best, query = best[..., :top_k], query[..., :top_k]
    matched = best > jnp.maximum(quantile, threshold)
  else:
    matched = best > threshold
  matched &= valid[..., None]
  return Pairs(jnp.where(matched, query, 0), matched)


def overlap(
  a: Float[Array, "*rows 4"], b: Float[Array, "*rows 4"]
) -> tuple[Float[Array, "*rows"], Float[Array, "*rows"]]:
  """IoU and GIoU (Rezatofighi et al. 2019, arXiv:1902.09630) of cxcywh boxes, elementwise."""
  return iou_and_giou(cxcywh_to_xyxy(a), cxcywh_to_xyxy(b))


def assign(
  cost: Float[Array, "*rows O Q"], valid: Bool[Array, "*rows O"]
) -> tuple[Int[Array, "*rows O"], Bool[Array, "*rows O"]]:
  """Assigns a different query to each valid object, at the least total cost.

  Returns the queries, and which objects have one: with fewer queries than objects some have none.
  """
  *rows, objects, queries = cost.shape
  if not cost.size:
    return jnp.zeros((*rows, objects), jnp.int32), jnp.zeros((*rows, objects), bool)
  # Padding takes the remaining queries; where there may be too few, at the highest cost.
  padding = 0.0 if objects <= queries else FORBIDDEN
  cost = jnp.where(valid[..., None], cost.astype(jnp.float32), padding)
  # The algorithm does not terminate on NaN. The loss is NaN then, and is reported.
  cost = jnp.where(jnp.isfinite(cost), cost, FORBIDDEN)

  def solve(cost):
    row, column = optax.assignment.hungarian_algorithm(cost)
    return jnp.full(objects, -1, jnp.int32).at[row].set(column.astype(jnp.int32))

  query = jax.vmap(solve)(cost.reshape(-1, objects, queries)).reshape(*rows, objects)
  matched = (query >= 0) & valid
  return jnp.where(matched, query, 0), matched


def _all_overlaps(boxes: Float[Array, "*rows Q 4"], wanted: Float[Array, "*rows O 4"]):
  """IoU and GIoU of each object with each query, [..., O, Q]."""
  return overlap(boxes[..., None, :, :], wanted[..., :, None, :])
