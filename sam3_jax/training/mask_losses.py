"""Losses of masks and maps, and helpers that all objectives share."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def mask_losses(
  logits: Float[Array, "P Hm Wm"], masks: Array, alpha: float
) -> tuple[Float[Array, " P"], Float[Array, " P"]]:
  """Focal loss with gamma 2 (Lin et al. 2017, arXiv:1708.02002), averaged over cells, and dice
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


def cell_loss(
  logits: Float[Array, "*rows HW"], coverage: Float[Array, "*rows Ht Wt"]
) -> Float[Array, "*rows"]:
  """Cross-entropy of "this cell shows an object", averaged over cells.

  It is weighted by the error of the probability, and five times on objects.

  Args:
    logits: one per cell of a square grid.
    coverage: fraction of each cell that objects cover, on a grid that is finer by a whole factor.
  """
  target = average_pool(coverage, math.isqrt(logits.shape[-1])).reshape(logits.shape)
  bce = jax.nn.softplus(logits) - logits * target
  miss = jnp.abs(jax.nn.sigmoid(logits) - target)
  return (bce * (miss + 0.1) * (1 + 4 * target)).mean(axis=-1)


def average_pool(maps: Float[Array, "*rows Ht Wt"], side: int) -> Float[Array, "*rows H W"]:
  """Averages square maps down to `side` x `side` cells; `side` divides their size."""
  factor = maps.shape[-1] // side
  return maps.reshape(*maps.shape[:-2], side, factor, side, factor).mean(axis=(-3, -1))


def fractions(masks: Array) -> Float[Array, "*rows"]:
  """Converts coverage in bytes or floats to floats in [0, 1]."""
  return masks.astype(jnp.float32) / (255 if masks.dtype == jnp.uint8 else 1)


def at_least_one(valid: Bool[Array, "*any"]) -> Float[Array, ""]:
  """The number of valid elements, at least 1, as a divisor.

  It is float32 in 64-bit mode too, where the quotient of integers would be float64.
  """
  return jnp.maximum(valid.sum(), 1).astype(jnp.float32)
