"""The head for visual prompts: wiring of neck, prompt encoder and mask decoder, and the choice of
the masks to show. Behaviour follows Meta's released code."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from sam3_jax.config import Config
from sam3_jax.model.neck import Neck, Parameters
from sam3_jax.model.visual.mask_decoder import MASKS, MaskDecoder
from sam3_jax.model.visual.prompt_encoder import PromptEncoder
from sam3_jax.model.visual.two_way import HEADS
from sam3_jax.types import VisualEmbedding, VisualPredictions, VisualPrompts

# SAM 2's: a mask is stable if its area hardly changes with the threshold.
STABILITY_OFFSET = 0.05
STABILITY = 0.98
READINGS = MASKS - 1  # of a prompt that leaves doubt


class VisualHead(nn.Module):
  """Second neck and mask decoder, on the trunk's map.

  Attributes:
    config: sizes, of which the head has none of its own.
    dtype: of the computation; norms' statistics, softmax, positions and scores are float32.
  """

  config: Config
  dtype: DTypeLike = jnp.float32

  def setup(self):
    width = self.config.width
    self.neck = Neck(width, self.dtype)
    self.fine_project, self.middle_project = (Parameters((1, 1), width // n) for n in (8, 4))
    self.no_memory = self.param(
      "no_memory", nn.initializers.normal(0.02), (1, 1, width), jnp.float32
    )
    self.prompt = PromptEncoder(width, self.config.image_size, self.dtype)
    self.decoder = MaskDecoder(width, self.dtype)

  def encode(self, features: Float[Array, "B H W C"]) -> VisualEmbedding:
    """The trunk's map, as visual prompts need it."""
    width = self.config.width
    projections = self.fine_project(width), self.middle_project(width), None
    return VisualEmbedding(*self.neck(features, projections))

  def predict(self, embedding: VisualEmbedding, prompts: VisualPrompts) -> VisualPredictions:
    """All masks of each prompt, with their quality.

    Args:
      embedding: of all images that the prompts are about.
      prompts: each names its image.
    """
    # One image serves all prompts as it is: what they share is then computed once.
    if len(embedding.coarse) > 1:
      embedding = embedding[prompts.image]
    # A still image has no past: what stands for the memory of earlier frames is added instead.
    image = embedding.coarse + self.no_memory.astype(self.dtype)[:, :, None]
    image = image + self.prompt.masks(prompts.mask, prompts.has_mask)
    position = self.prompt.grid(image.shape[1], image.shape[2])
    levels = embedding.middle, embedding.fine
    return self.decoder(image, position, levels, *self.prompt.points(prompts.xy, prompts.labels))

  def everything(self, features: Array, prompts: VisualPrompts) -> VisualPredictions:
    """All parts once: what `init` runs to make every parameter."""
    return self.predict(self.encode(features), prompts)


def choose(
  predictions: VisualPredictions, multimask: bool
) -> tuple[Float[Array, "P K Hm Wm"], Float[Array, "P K"]]:
  """The masks to show, and their IoU.

  With `multimask` the three readings. Otherwise the one mask, or if it is unstable the reading with
  the highest IoU (SAM 2's rule).
  """
  if multimask:
    return predictions.mask_logits[:, 1:], predictions.iou[:, 1:]
  return answer(predictions, jnp.zeros(len(predictions.iou), bool))


def answer(
  predictions: VisualPredictions, doubt: Bool[Array, " P"]
) -> tuple[Float[Array, "P 1 Hm Wm"], Float[Array, "P 1"]]:
  """One mask a prompt, and its IoU: the best reading where there is doubt; elsewhere as `choose`
  without `multimask`."""
  logits, iou = predictions.mask_logits, predictions.iou
  inner, outer = (
    jnp.sum(logits[:, 0] > x, axis=(1, 2), dtype=jnp.float32)  # exact up to 2^24 cells
    for x in (STABILITY_OFFSET, -STABILITY_OFFSET)
  )
  stable = inner >= STABILITY * outer  # an empty mask is stable
  best = 1 + jax.lax.argmax(iou[:, 1:], 1, jnp.int32)
  choice = jnp.where(stable & ~doubt, 0, best)[:, None]
  chosen = jnp.take_along_axis(logits, choice[:, :, None, None], axis=1)
  return chosen, jnp.take_along_axis(iou, choice, axis=1)


def init(config: Config, key: Array) -> dict[str, Any]:
  """Random parameters, float32: the part `visual` of a checkpoint's tree.

  Raises:
    ValueError: the model's width cannot be shared by the heads of attention.
  """
  if config.width % (2 * HEADS):
    raise ValueError(
      f"a head for visual prompts needs a model whose width is a multiple of {2 * HEADS}; this one "
      f"is {config.width} wide."
    )
  side, masks = config.grid, config.mask_size

  @jax.jit  # so that nothing but the parameters is computed
  def make(key):
    prompts = VisualPrompts(
      jnp.zeros(1, jnp.int32),
      jnp.zeros((1, 1, 2), jnp.float32),
      jnp.ones((1, 1), jnp.int32),
      jnp.zeros((1, masks, masks), jnp.float32),
      jnp.ones(1, bool),
    )
    features = jnp.zeros((1, side, side, config.trunk.width), jnp.float32)
    return VisualHead(config).init(key, features, prompts, method=VisualHead.everything)["params"]

  return make(key)


def parameter_shapes(config: Config) -> dict[str, Any]:
  """The tree of `init` with shapes in place of arrays; costs no memory, however large the model;
  raises as `init`."""
  return jax.eval_shape(functools.partial(init, config), jax.random.key(0))
