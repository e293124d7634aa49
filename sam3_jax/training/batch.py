"""What a training step takes: padded arrays of a fixed shape, one row an image.

B images, R prompts of an image (static), T text tokens, N example boxes of a prompt, O objects of a
prompt, Hi and Wi pixels of the model's square input, Ht and Wt cells of a target mask.
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
  """A function whose own arithmetic, gradients and optimizer (Optax) mix dtypes as JAX does by
  default, whatever `jax_numpy_dtype_promotion` is set to for other work."""

  @functools.wraps(function)
  def promoting(*args, **options):
    with jax.numpy_dtype_promotion("standard"):
      return function(*args, **options)

  return promoting  # pyright: ignore[reportReturnType]


@struct.dataclass
class Targets:
  """The objects that a prompt names; padding may hold any finite numbers, wherever it stands.

  In a `Batch` all arrays have the leading axes [B, R] in place of [P].

  Attributes:
    boxes: cxcywh as fractions of the model's square, which a resized or cropped image need not
      fill.
    masks: coverage of each cell by the object, 0..255 as uint8 or 0..1 as floats; edges may be
      soft. The grid spans the square.
    valid: False on padding.
  """

  boxes: Float[Array, "P O 4"]
  masks: UInt8[Array, "P O Ht Wt"] | Float[Array, "P O Ht Wt"]
  valid: Bool[Array, "P O"]


@struct.dataclass
class Batch:
  """Images, their prompts, and what is to be found.

  Prompts with objects come first among an image's, so that masks can be made for a fixed number of
  them only; see `Detector.detect_all_layers`.

  Attributes:
    images: resized, cropped or padded to the model's square; see `preprocess.normalize`.
    sizes: height and width of the source image in pixels.
    ids: of the images, for messages.
    tokens: of the phrases (start, phrase, end, then 0).
    boxes: example boxes, cxcywh as fractions of the model's square.
    positive: True on an example box, False on a counterexample.
    box_valid: False on padding, wherever it stands; may be False throughout.
    prompt_valid: False on a padding prompt: no loss of any kind comes from it.
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
  """The prompts of all images as rows, image by image, so that row p is prompt p % R of image
  p // R; `text` are their tokens, encoded in this order."""
  images, rows = batch.tokens.shape[:2]
  image = jnp.repeat(jnp.arange(images), rows)
  flat = flatten(batch)
  return Prompts(image, jnp.zeros_like(image), text, flat.boxes, flat.positive, flat.box_valid)


def flatten(batch: Batch) -> Batch:
  """The batch with the axes [B, R] of its prompts and targets made one, [B * R]."""
  prompts = ("tokens", "boxes", "positive", "box_valid", "prompt_valid", "targets")
  flat = {
    name: jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), getattr(batch, name))
    for name in prompts
  }
  return dataclasses.replace(batch, **flat)
