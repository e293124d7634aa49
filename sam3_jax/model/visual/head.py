"""The head for visual prompts: wiring of neck, prompt encoder and mask decoder, and the choice of
masks to return. The behavior follows Meta's released code."""

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
from sam3_jax.types import VisualEmbedding, VisualHeadOutput, VisualPrompts

# From SAM 2: a mask is stable if its area hardly changes with the threshold.
STABILITY_OFFSET = 0.05
STABILITY = 0.98
MULTIMASK_OUTPUTS = MASKS - 1  # for an ambiguous prompt


class VisualHead(nn.Module):
  """Second neck and mask decoder, on the trunk's map.

  Attributes:
    config: sizes of the detector; the head has no others.
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

  def __call__(self, features: Float[Array, "B H W C"], prompts: VisualPrompts) -> VisualHeadOutput:
    """`encode`, then `detect`, so that `init` creates every parameter."""
    return self.detect(self.encode(features), prompts)

  def encode(self, features: Float[Array, "B H W C"]) -> VisualEmbedding:
    """Encodes the trunk's map for visual prompts."""
    width = self.config.width
    projections = self.fine_project(width), self.middle_project(width), None
    return VisualEmbedding(*self.neck(features, projections))

  def detect(self, embedding: VisualEmbedding, prompts: VisualPrompts) -> VisualHeadOutput:
    """All masks of each prompt, with their estimated quality.

    Args:
      embedding: of all images of the prompts.
      prompts: each with the index of its image.
    """
    # A single image is broadcast over the prompts: what they share is then computed once.
    if len(embedding.coarse) > 1:
      embedding = embedding[prompts.image]
    # A still image has no earlier frames: Meta adds this embedding in place of their memory.
    image = embedding.coarse + self.no_memory.astype(self.dtype)[:, :, None]
    image = image + self.prompt.masks(prompts.mask, prompts.has_mask)
    position = self.prompt.grid(image.shape[1], image.shape[2])
    levels = embedding.middle, embedding.fine
    tokens, valid = self.prompt.points(prompts.xy, prompts.labels)
    return self.decoder(image, position, levels, tokens, valid)

  def detect_tracked(
    self,
    image: Float[Array, "P2 H W D"],
    levels: tuple[Float[Array, "P3 H2 W2 C2"], Float[Array, "P3 Hm Wm C"]],
    prompts: VisualPrompts,
    unconditioned: Bool[Array, " P2"] | None = None,
  ) -> VisualHeadOutput:
    """As `detect`, for objects of a video frame.

    Differs from `detect` for a prompt without points: Meta's tracker then decodes two tokens that
    stand for no point.

    Args:
      image: the frame's coarse map, conditioned on each object's memory or not; a single row
        broadcasts over the objects.
      levels: the middle and the fine map of the frame, with one row.
      prompts: one for each object, with at least one slot for points (`no_prompts` for none);
        `prompts.image` is not used.
      unconditioned: True on rows of `image` that are the coarse map itself and get the embedding
        that stands for missing memory, as still images do. None for no row.
    """
    image = image.astype(self.dtype)
    if unconditioned is not None:
      no_memory = self.no_memory.astype(self.dtype)[:, :, None]
      image = image + jnp.where(unconditioned[:, None, None, None], no_memory, 0)
    image = image + self.prompt.masks(prompts.mask, prompts.has_mask)
    position = self.prompt.grid(image.shape[1], image.shape[2])
    tokens, valid = self.prompt.tracked_points(prompts.xy, prompts.labels)
    return self.decoder(image, position, levels, tokens, valid)


def no_prompts(objects: int) -> VisualPrompts:
  """Prompts without points and masks, for objects that are tracked to a frame."""
  return VisualPrompts(
    image=jnp.zeros(objects, jnp.int32),
    xy=jnp.zeros((objects, 1, 2), jnp.float32),
    labels=jnp.full((objects, 1), -1, jnp.int32),
  )


def select_masks(
  predictions: VisualHeadOutput, multimask: bool
) -> tuple[Float[Array, "P K Hm Wm"], Float[Array, "P K"]]:
  """The masks to return, and their estimated IoU.

  With `multimask` these are the three multimask outputs; without it, the output of `single_mask`
  for unambiguous prompts.
  """
  if multimask:
    return predictions.mask_logits[:, 1:], predictions.iou[:, 1:]
  return single_mask(predictions, jnp.zeros(len(predictions.iou), bool))


def single_mask(
  predictions: VisualHeadOutput, ambiguous: Bool[Array, " P"]
) -> tuple[Float[Array, "P 1 Hm Wm"], Float[Array, "P 1"]]:
  """One mask for each prompt, and its estimated IoU.

  For an ambiguous prompt it is the multimask output with the highest IoU; for any other prompt the
  single-mask output, or if that is unstable, the best multimask output (SAM 2's rule).
  """
  logits, iou = predictions.mask_logits, predictions.iou
  inner, outer = (
    jnp.sum(logits[:, 0] > x, axis=(1, 2), dtype=jnp.float32)  # exact up to 2^24 cells
    for x in (STABILITY_OFFSET, -STABILITY_OFFSET)
  )
  stable = inner >= STABILITY * outer  # an empty mask is stable
  best = 1 + jax.lax.argmax(iou[:, 1:], 1, jnp.int32)
  choice = jnp.where(stable & ~ambiguous, 0, best)[:, None]
  chosen = jnp.take_along_axis(logits, choice[:, :, None, None], axis=1)
  return chosen, jnp.take_along_axis(iou, choice, axis=1)


def init(config: Config, key: Array) -> dict[str, Any]:
  """Returns random parameters, float32: the subtree `visual` of a checkpoint.

  Raises:
    ValueError: the model's width is not a multiple of twice the attention heads.
  """
  if config.width % (2 * HEADS):
    raise ValueError(
      f"a head for visual prompts needs a model whose width is a multiple of {2 * HEADS}; got "
      f"{config.width}."
    )
  side, masks = config.grid, config.mask_size

  @jax.jit  # compiled, so that only the parameters are computed
  def make(key):
    prompts = VisualPrompts(
      jnp.zeros(1, jnp.int32),
      jnp.zeros((1, 1, 2), jnp.float32),
      jnp.ones((1, 1), jnp.int32),
      jnp.zeros((1, masks, masks), jnp.float32),
      jnp.ones(1, bool),
    )
    features = jnp.zeros((1, side, side, config.trunk.width), jnp.float32)
    return VisualHead(config).init(key, features, prompts)["params"]

  return make(key)


def parameter_shapes(config: Config) -> dict[str, Any]:
  """The tree of `init` with shapes instead of arrays; allocates nothing. Raises as `init`."""
  return jax.eval_shape(functools.partial(init, config), jax.random.key(0))
