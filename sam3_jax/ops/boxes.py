"""Conversions between box formats; x before y everywhere."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def cxcywh_to_xyxy(boxes: Float[Array, "*rows 4"]) -> Float[Array, "*rows 4"]:
  """Converts centre and extent to the corners x0, y0, x1, y1, in the same unit."""
  centre, extent = boxes[..., :2], boxes[..., 2:]
  return jnp.concatenate([centre - extent / 2, centre + extent / 2], axis=-1)


def xyxy_to_cxcywh(boxes: Float[Array, "*rows 4"]) -> Float[Array, "*rows 4"]:
  """Converts the corners x0, y0, x1, y1 to centre and extent, in the same unit."""
  low, high = boxes[..., :2], boxes[..., 2:]
  return jnp.concatenate([(low + high) / 2, high - low], axis=-1)


def inverse_sigmoid(x: Float[Array, "*rows"], epsilon: float = 1e-3) -> Float[Array, "*rows"]:
  """log(x / (1 - x)) of x clipped to [0, 1], with numerator and denominator at least `epsilon`."""
  x = jnp.clip(x, 0, 1)
  return jnp.log(jnp.maximum(x, epsilon) / jnp.maximum(1 - x, epsilon))


def refine(boxes: Float[Array, "*rows 4"], delta: Float[Array, "*rows 4"]):
  """Moves boxes (fractions in [0, 1]) by `delta` in logit space, as in DETR's decoders."""
  return jax.nn.sigmoid(inverse_sigmoid(boxes) + delta)
