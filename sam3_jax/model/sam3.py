"""The detector: wiring of SAM 3's promptable concept segmentation (Meta, arXiv:2511.16719).

Expensive, and run once per image: `encode_image`, which is `map_image`, then `prepare`. Cheap, and
run once per prompt: `encode_text`, then `detect` (scores, boxes, masks) or `detect_all_layers` (for
training). The behavior follows Meta's released code, with which the weights were trained.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from sam3_jax.config import Config, LiteTextConfig
from sam3_jax.model.decoder import DecodedLayers, Decoder
from sam3_jax.model.fusion import FusionEncoder
from sam3_jax.model.geometry import GeometryEncoder
from sam3_jax.model.layers import PLAIN, Layering
from sam3_jax.model.lite_text import LiteTextEncoder
from sam3_jax.model.masks import MaskHead
from sam3_jax.model.neck import Neck
from sam3_jax.model.positions import sine_map
from sam3_jax.model.scoring import Scoring
from sam3_jax.model.text import TextEncoder
from sam3_jax.model.vit import Trunk
from sam3_jax.ops.boxes import cxcywh_to_xyxy
from sam3_jax.types import (
  Detections,
  DetectorOutput,
  ImageEmbedding,
  ImageMaps,
  Prompts,
  ScoredQueries,
  TextEmbedding,
)


class _Decoded(NamedTuple):
  """Prompts decoded against their images.

  Attributes:
    prompt: tokens of the phrase and the exemplar boxes.
    valid: False on padding tokens.
    memory: the coarse map, conditioned on the prompt.
    layers: the decoder's output.
  """

  prompt: Float[Array, "P S D"]
  valid: Bool[Array, "P S"]
  memory: Float[Array, "P H W D"]
  layers: DecodedLayers


class _MaskInputs(NamedTuple):
  """Inputs of the mask head; the first axis is the prompt."""

  image: Int[Array, " P"]
  states: Float[Array, "P K D"]
  memory: Float[Array, "P H W D"]
  prompt: Float[Array, "P S D"]
  valid: Bool[Array, "P S"]


class Detector(nn.Module):
  """SAM 3's image model; holds parameters only.

  Attributes:
    config: sizes.
    dtype: of the computation; norms' statistics, softmax, boxes and scores are always float32.
    train: turns on dropout and stochastic depth; `apply` then needs `rngs={"dropout": key}`.
    layering: how stacked layers run, to save memory.
    axis: axis of a mesh whose devices split the fusion encoder's work on an image's tokens, under
      `jax.shard_map` only; None for a single device.
  """

  config: Config
  dtype: DTypeLike = jnp.float32
  train: bool = False
  layering: Layering = PLAIN
  axis: str | None = None

  def setup(self):
    config = self.config
    shared: dict[str, Any] = {"dtype": self.dtype, "train": self.train, "layering": self.layering}
    self.trunk = Trunk(config.trunk, config.patch, **shared)
    self.neck = Neck(config.width, self.dtype)
    lite = isinstance(config.text, LiteTextConfig)
    encoder: Any = LiteTextEncoder if lite else TextEncoder
    self.text = encoder(config.text, config.width, **shared)
    self.geometry = GeometryEncoder(config, **shared)
    self.fusion = FusionEncoder(config, axis=self.axis, **shared)
    self.decoder = Decoder(config, **shared)
    self.scoring = Scoring(config, self.dtype, self.train)
    self.masks = MaskHead(config, self.dtype)

  def __call__(
    self,
    images: Float[Array, "B Hi Wi 3"],
    tokens: Int[Array, "B T"],
    boxes: Float[Array, "B N 4"],
  ) -> DetectorOutput:
    """Runs all parts, with one prompt per image, so that `init` creates every parameter."""
    index = jnp.arange(len(images), dtype=jnp.int32)
    labels = jnp.ones(boxes.shape[:2], bool)
    embedding = self.encode_image(images, jnp.ones((len(images), 2), jnp.int32))
    prompts = Prompts(index, index, self.encode_text(tokens), boxes, labels, labels)
    return self.detect_all_layers(embedding, prompts)

  def encode_image(
    self, images: Float[Array, "B Hi Wi 3"], sizes: Int[Array, "B 2"]
  ) -> ImageEmbedding:
    """Encodes square images, normalized to [-1, 1]; `sizes` are height and width of the sources."""
    return self.encode_and_keep(images, sizes)[0]

  def encode_and_keep(
    self, images: Float[Array, "B Hi Wi 3"], sizes: Int[Array, "B 2"]
  ) -> tuple[ImageEmbedding, Float[Array, "B H W C"]]:
    """As `encode_image`, and the trunk's map, the input of the second neck."""
    features = self.trunk(images)
    return self.prepare(self._map(features, sizes)), features

  def map_image(self, images: Float[Array, "B Hi Wi 3"], sizes: Int[Array, "B 2"]) -> ImageMaps:
    """Trunk and neck; arguments as of `encode_image`."""
    return self._map(self.trunk(images), sizes)

  def prepare(self, maps: ImageMaps) -> ImageEmbedding:
    """The part of decoding that does not depend on the prompt. In training all prompts of an image
    share its dropout."""
    coarse, position = maps.coarse, self._position(maps.coarse)
    tokens = coarse.reshape(len(coarse), -1, self.config.width)
    attended = self.fusion.attend(tokens, position).reshape(coarse.shape)
    middle, fine = self.masks.prepare(maps.middle, maps.fine)
    return ImageEmbedding(fine, middle, coarse, attended, maps.sizes)

  def encode_text(self, tokens: Int[Array, "P T"]) -> TextEmbedding:
    """Encodes token ids (start, phrase, end, then 0)."""
    return self.text(tokens)

  def encode_exemplars(
    self,
    coarse: Float[Array, "P H W D"],
    boxes: Float[Array, "P N 4"],
    positive: Bool[Array, "P N"],
  ) -> Float[Array, "P N D"]:
    """Encodes exemplar boxes (cxcywh) for use with other images. `coarse` is the map of the image
    that each prompt's boxes are in."""
    return self.geometry.exemplars(coarse, boxes, positive)

  def detect_all_layers(
    self,
    embedding: ImageEmbedding,
    prompts: Prompts,
    duplicate: bool = False,
    masked: int | None = None,
  ) -> DetectorOutput:
    """The output of every decoder layer, and the masks of all queries of the last one.

    Args:
      embedding: of all images of the prompts.
      prompts: each with the index of its image.
      duplicate: runs 2 Q queries: the Q, then copies of them that do not attend to each other and
        so may find the same object (DAC-DETR, Hu et al. 2023).
      masked: computes masks only for the first `masked` prompts of each image; `prompts` must then
        have equally many prompts of each image, image by image. None computes all.

    Raises:
      ValueError: `masked` with a number of prompts that is not a multiple of the images.
    """
    decoded = self._decode(embedding, prompts, duplicate)
    layers, memory = decoded.layers, decoded.memory
    logits = self.scoring(layers.states, decoded.prompt, decoded.valid)
    cells = memory.reshape(len(memory), -1, self.config.width)
    cell_logits = self.scoring(cells, decoded.prompt, decoded.valid)
    inputs = _MaskInputs(prompts.image, layers.states[-1], memory, decoded.prompt, decoded.valid)
    if masked is not None:
      images, count = len(embedding.coarse), len(memory)
      if count % images:
        raise ValueError(
          f"masked={masked} needs equally many prompts of each image; got {count} prompts of "
          f"{images} images. Pad the prompts, or leave masked at None."
        )
      inputs = jax.tree.map(lambda x: _first_of_each(x, images, masked), inputs)
    mask_logits, semantic_logits = self._masks(embedding, inputs)
    return DetectorOutput(
      logits=logits,
      boxes=layers.boxes,
      presence_logit=layers.presence_logit,
      mask_logits=mask_logits,
      semantic_logits=semantic_logits,
      cell_logits=cell_logits,
    )

  def detect(
    self, embedding: ImageEmbedding, prompts: Prompts, max_detections: int | None = None
  ) -> Detections:
    """Scores, boxes and masks: `score`, then `mask`."""
    return self.mask(embedding, self.score(embedding, prompts, max_detections))

  def score(
    self, embedding: ImageEmbedding, prompts: Prompts, max_detections: int | None = None
  ) -> ScoredQueries:
    """Scores and boxes, without masks.

    Args:
      embedding: of all images of the prompts.
      prompts: each with the index of its image.
      max_detections: keeps at most N queries, those with the highest scores, in descending order,
        ties by query number. None keeps all, in the order of the queries.
    """
    decoded = self._decode(embedding, prompts)
    states, boxes, presence_logit = (x[-1] for x in decoded.layers)
    logits = self.scoring(states, decoded.prompt, decoded.valid)
    scores = jax.nn.sigmoid(logits) * jax.nn.sigmoid(presence_logit)[:, None]
    query = jnp.broadcast_to(jnp.arange(scores.shape[1], dtype=jnp.int32), scores.shape)
    if max_detections is not None:
      scores, query = jax.lax.top_k(scores, min(max_detections, scores.shape[1]))
      states = jnp.take_along_axis(states, query[..., None], axis=1)
      boxes = jnp.take_along_axis(boxes, query[..., None], axis=1)
    return ScoredQueries(
      scores=scores,
      boxes=cxcywh_to_xyxy(boxes),
      presence_logit=presence_logit,
      image_index=prompts.image,
      sizes=embedding.sizes[prompts.image],
      ids=prompts.first_id[:, None] + query,
      states=states,
      memory=decoded.memory,
      prompt=decoded.prompt,
      valid=decoded.valid,
    )

  def mask(self, embedding: ImageEmbedding, scored: ScoredQueries) -> Detections:
    """Adds the masks to the output of `score`, or to a slice of it."""
    inputs = _MaskInputs(
      scored.image_index, scored.states, scored.memory, scored.prompt, scored.valid
    )
    mask_logits, semantic_logits = self._masks(embedding, inputs)
    return Detections(
      scores=scored.scores,
      boxes=scored.boxes,
      mask_logits=mask_logits,
      presence_logit=scored.presence_logit,
      semantic_logits=semantic_logits,
      image_index=scored.image_index,
      sizes=scored.sizes,
      ids=scored.ids,
    )

  def _decode(
    self, embedding: ImageEmbedding, prompts: Prompts, duplicate: bool = False
  ) -> _Decoded:
    image, position = _select(embedding.coarse, prompts.image), self._position(embedding.coarse)
    geometry, geometry_valid = self.geometry(image, prompts)
    prompt = jnp.concatenate([prompts.text.features, geometry], axis=1)
    valid = jnp.concatenate([prompts.text.valid, geometry_valid], axis=1)
    tokens = _select(embedding.attended, prompts.image).reshape(len(image), -1, self.config.width)
    memory = self.fusion(tokens, position, prompt, valid).reshape(image.shape)
    layers = self.decoder(memory, position, prompt, valid, duplicate)
    return _Decoded(prompt, valid, memory, layers)

  def _map(self, features: Float[Array, "B H W C"], sizes: Int[Array, "B 2"]) -> ImageMaps:
    fine, middle, coarse = self.neck(features)
    return ImageMaps(fine, middle, coarse, sizes)

  def _position(self, coarse: Float[Array, "B H W D"]) -> Float[Array, "HW D"]:
    return sine_map(*coarse.shape[1:]).reshape(-1, self.config.width)

  def _masks(
    self, embedding: ImageEmbedding, inputs: _MaskInputs
  ) -> tuple[Float[Array, "P K Hm Wm"], Float[Array, "P Hm Wm"]]:
    """Mask logits of the queries, and those of the whole concept."""
    middle, fine = (_select(x, inputs.image) for x in (embedding.middle, embedding.fine))
    return self.masks(inputs.states, inputs.memory, (middle, fine), inputs.prompt, inputs.valid)


def _select(x: Array, index: Int[Array, " P"]) -> Array:
  """`x[index]`; broadcast, not copied, if x has a single row."""
  return x[index] if len(x) > 1 else jnp.broadcast_to(x, (len(index), *x.shape[1:]))


def _first_of_each(x: Array, images: int, count: int) -> Array:
  """The first `count` rows of each image; x has equally many rows of each, image by image."""
  shape = x.shape[1:]
  return x.reshape(images, -1, *shape)[:, :count].reshape(-1, *shape)


def init(config: Config, key: Array) -> dict[str, Any]:
  """Returns random parameters, float32."""
  side = config.image_size

  @jax.jit  # compiled, so that only the parameters are computed
  def make(key):
    images = jnp.zeros((1, side, side, 3), jnp.float32)
    tokens = jnp.zeros((1, config.text.context), jnp.int32)
    boxes = jnp.full((1, 1, 4), 0.5, jnp.float32)
    return Detector(config).init(key, images, tokens, boxes)["params"]

  return make(key)


def parameter_shapes(config: Config) -> dict[str, Any]:
  """The tree of `init` with shapes instead of arrays; allocates nothing."""
  return jax.eval_shape(functools.partial(init, config), jax.random.key(0))
