"""The input of a training step: padded arrays of a fixed shape, one row per image.

B images, R prompts of an image (static), T text tokens, N exemplar boxes of a prompt, O objects of
a prompt, Hi and Wi pixels of the model's input square, Ht and Wt cells of a target mask.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, UInt8

from sam3_jax.types import Prompts, TextEmbedding

_Function = TypeVar("_Function", bound=Callable)


def standard_promotion(function: _Function) -> _Function:
  """Runs a function, its gradients and its optimizer (Optax) with JAX's default dtype promotion,
  whatever `jax_numpy_dtype_promotion` is set to."""

  @functools.wraps(function)
  def promoting(*args, **options):
    with jax.numpy_dtype_promotion("standard"):
      return function(*args, **options)

  return promoting  # pyright: ignore[reportReturnType]


@struct.dataclass
class Targets:
  """The objects of a prompt. Padding may be anywhere, and may hold any finite numbers.

  In a `Batch` all arrays have the leading axes [B, R] instead of [P].

  Attributes:
    boxes: cxcywh as fractions of the model's square, which a resized or cropped image need not
      fill.
    masks: how much of each cell the object covers, 0..255 as uint8 or 0..1 as floats. The grid
      spans the square.
    valid: False for padding.
  """

  boxes: Float[Array, "P O 4"]
  masks: UInt8[Array, "P O Ht Wt"] | Float[Array, "P O Ht Wt"]
  valid: Bool[Array, "P O"]


@struct.dataclass
class Batch:
  """Images, their prompts and targets.

  Prompts with objects come first in each image, so that masks can be computed for a fixed number of
  prompts; see `Detector.detect_all_layers`.

  Attributes:
    images: resized, cropped or padded to the model's square; see `preprocess.normalize`.
    sizes: height and width of the source image in pixels.
    ids: the images' indices, for messages.
    tokens: token ids of the phrases (start, phrase, end, then 0).
    boxes: exemplar boxes, cxcywh as fractions of the model's square.
    positive: True for a positive exemplar box, False for a negative one.
    box_valid: False for padding, which may be anywhere.
    prompt_valid: False for a padding prompt, which has no loss.
    targets: with the leading axes [B, R].
  """

  images: UInt8[Array, "B Hi Wi 3"]
  sizes: Int[Array, "B 2"]
  ids: Int[Array, " B"]
  tokens: Int[Array, "B R T"]
  boxes: Float[Array, "B R N 4"]
  positive: Bool[Array, "B R N"]
  box_valid: Bool[Array, "B R N"]
  prompt_valid: Bool[Array, "B R"]
  targets: Targets


def flat_prompts(batch: Batch, text: TextEmbedding) -> Prompts:
  """The prompts of all images along one axis: prompt p is prompt p % R of image p // R.

  Args:
    batch: the batch.
    text: its encoded tokens, in this order.
  """
  images, prompts = batch.tokens.shape[:2]
  image = jnp.repeat(jnp.arange(images), prompts)
  flat = flatten(batch)
  return Prompts(image, jnp.zeros_like(image), text, flat.boxes, flat.positive, flat.box_valid)


def flatten(batch: Batch) -> Batch:
  """Merges the axes [B, R] of a batch's prompts and targets into one, [B * R]."""
  prompts = ("tokens", "boxes", "positive", "box_valid", "prompt_valid", "targets")
  flat = {
    name: jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), getattr(batch, name))
    for name in prompts
  }
  return dataclasses.replace(batch, **flat)
