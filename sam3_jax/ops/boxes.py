"""Conversions between box formats, and the IoU of boxes; x before y everywhere."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

_MIN_AREA = 1e-12  # for denominators


def cxcywh_to_xyxy(boxes: Float[Array, "*rows 4"]) -> Float[Array, "*rows 4"]:
  """Converts center and extent to the corners x0, y0, x1, y1, in the same unit."""
  center, extent = boxes[..., :2], boxes[..., 2:]
  return jnp.concatenate([center - extent / 2, center + extent / 2], axis=-1)


def xyxy_to_cxcywh(boxes: Any) -> Any:
  """Converts the corners x0, y0, x1, y1 to center and extent, in the same unit.

  NumPy arrays give NumPy arrays, JAX arrays give JAX arrays.
  """
  low, high = boxes[..., :2], boxes[..., 2:]
  return _namespace(boxes, boxes).concatenate([(low + high) / 2, high - low], axis=-1)


def iou(boxes: Any, others: Any) -> Any:
  """The IoU of boxes xyxy, elementwise with broadcasting; 0 for boxes without area.

  NumPy arrays give NumPy arrays, JAX arrays give JAX arrays.
  """
  inner, union = _intersection_and_union(boxes, others)
  return inner / union


def iou_and_giou(boxes: Any, others: Any) -> tuple[Any, Any]:
  """As `iou`, and the generalized IoU (Rezatofighi et al. 2019, arXiv:1902.09630)."""
  xp = _namespace(boxes, others)
  inner, union = _intersection_and_union(boxes, others)
  low = xp.minimum(boxes[..., :2], others[..., :2])
  high = xp.maximum(boxes[..., 2:], others[..., 2:])
  outer = xp.maximum(_area(xp, low, high), _MIN_AREA)
  return inner / union, inner / union - (outer - union) / outer


def _intersection_and_union(boxes: Any, others: Any) -> tuple[Any, Any]:
  """Areas; the union is positive."""
  xp = _namespace(boxes, others)
  low = xp.maximum(boxes[..., :2], others[..., :2])
  high = xp.minimum(boxes[..., 2:], others[..., 2:])
  inner = _area(xp, low, high)
  areas = _area(xp, boxes[..., :2], boxes[..., 2:]) + _area(xp, others[..., :2], others[..., 2:])
  return inner, xp.maximum(areas - inner, _MIN_AREA)


def _area(xp: Any, low: Any, high: Any) -> Any:
  return xp.maximum(high - low, 0).prod(axis=-1)


def _namespace(*arrays: Any) -> Any:
  """jax.numpy if there is a JAX array, else NumPy."""
  return jnp if any(isinstance(array, jax.Array) for array in arrays) else np


def inverse_sigmoid(x: Float[Array, "*rows"], epsilon: float = 1e-3) -> Float[Array, "*rows"]:
  """log(x / (1 - x)) of x clipped to [0, 1], with numerator and denominator at least `epsilon`."""
  x = jnp.clip(x, 0, 1)
  return jnp.log(jnp.maximum(x, epsilon) / jnp.maximum(1 - x, epsilon))


def refine(boxes: Float[Array, "*rows 4"], delta: Float[Array, "*rows 4"]):
  """Moves boxes (fractions in [0, 1]) by `delta` in logit space, as in DETR's decoders."""
  return jax.nn.sigmoid(inverse_sigmoid(boxes) + delta)
