"""The detector: wiring of SAM 3's promptable concept segmentation (Meta, arXiv:2511.16719).

Heavy and once an image: `encode_image`, which is `map_image`, then `prepare`. Light and once a
prompt: `encode_text`, then `detect` (scores, boxes, masks) or `predict` (every layer, for
training). Behaviour follows Meta's released code, with which the weights were trained.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from sam3_jax.config import Config, LiteTextConfig
from sam3_jax.model.decoder import Decoder
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
  ImageEmbedding,
  ImageMaps,
  Predictions,
  Prompts,
  Scored,
  TextEmbedding,
)


class Detector(nn.Module):
  """SAM 3's image model, parameters only.

  Attributes:
    config: sizes.
    dtype: of the computation; norms' statistics, softmax, boxes and scores are float32 regardless.
    train: dropout and stochastic depth are on; `apply` then needs `rngs={"dropout": key}`.
    layering: how stacked layers run, for the sake of memory.
    axis: of a mesh, whose devices share the fusion encoder's work on the tokens of an image; under
      `jax.shard_map` only. None for none.
  """

  config: Config
  dtype: DTypeLike = jnp.float32
  train: bool = False
  layering: Layering = PLAIN
  axis: str | None = None

  def setup(self):
    config, rest = self.config, (self.dtype, self.train, self.layering)
    self.trunk = Trunk(config.trunk, config.patch, *rest)
    self.neck = Neck(config.width, self.dtype)
    lite = isinstance(config.text, LiteTextConfig)
    encoder: Any = LiteTextEncoder if lite else TextEncoder
    self.text = encoder(config.text, config.width, *rest)
    self.geometry = GeometryEncoder(config, *rest)
    self.fusion = FusionEncoder(config, *rest, self.axis)
    self.decoder = Decoder(config, *rest)
    self.scoring = Scoring(config, self.dtype, self.train)
    self.masks = MaskHead(config, self.dtype)

  def encode_image(
    self, images: Float[Array, "B Hi Wi 3"], sizes: Int[Array, "B 2"]
  ) -> ImageEmbedding:
    """Encodes square images, normalised to [-1, 1]; `sizes` are height and width of the sources."""
    return self.encode_and_keep(images, sizes)[0]

  def encode_and_keep(
    self, images: Float[Array, "B Hi Wi 3"], sizes: Int[Array, "B 2"]
  ) -> tuple[ImageEmbedding, Float[Array, "B H W C"]]:
    """What `encode_image` makes, and the trunk's map, from which another neck can start."""
    features = self.trunk(images)
    return self.prepare(self._map(features, sizes)), features

  def map_image(self, images: Float[Array, "B Hi Wi 3"], sizes: Int[Array, "B 2"]) -> ImageMaps:
    """Trunk and neck; arguments as of `encode_image`."""
    return self._map(self.trunk(images), sizes)

  def prepare(self, maps: ImageMaps) -> ImageEmbedding:
    """What decoding does with an image whatever the prompt. In training its dropout is the same for
    all prompts of an image."""
    coarse, position = maps.coarse, self._position(maps.coarse)
    tokens = coarse.reshape(len(coarse), -1, self.config.width)
    attended = self.fusion.attend(tokens, position).reshape(coarse.shape)
    middle, fine = self.masks.prepare(maps.middle, maps.fine)
    return ImageEmbedding(fine, middle, coarse, attended, maps.sizes)

  def encode_text(self, tokens: Int[Array, "P T"]) -> TextEmbedding:
    """Encodes token ids (start, phrase, end, then 0)."""
    return self.text(tokens)

  def predict(
    self,
    embedding: ImageEmbedding,
    prompts: Prompts,
    duplicate: bool = False,
    masked: int | None = None,
  ) -> Predictions:
    """Every decoder layer's predictions, and the masks of all queries of the last one.

    Args:
      embedding: of all images that the prompts are about.
      prompts: each names its image.
      duplicate: predicts for 2 Q queries: the Q, as ever, then their copies, which do not attend to
        each other and so may find an object together (DAC-DETR, Hu et al. 2023).
      masked: makes masks for the first so many prompts of each image only; `prompts` then holds
        equally many of each, image by image. None makes all.

    Raises:
      ValueError: `masked` with prompts that are no multiple of the images.
    """
    prompt, valid, memory, states, boxes, presence = self._decode(embedding, prompts, duplicate)
    logits = self.scoring(states, prompt, valid)
    cells = self.scoring(memory.reshape(len(memory), -1, self.config.width), prompt, valid)
    seen = prompts.image, states[-1], memory, prompt, valid
    if masked is not None:
      images, rows = len(embedding.coarse), len(prompt)
      if rows % images:
        raise ValueError(
          f"masked={masked} needs equally many prompts of each image; got {rows} of {images} "
          "images. Pad the prompts, or leave masked at None."
        )
      seen = jax.tree.map(lambda x: _first_of_each(x, images, masked), seen)
    masks, semantic = self._masks(embedding, *seen)
    return Predictions(logits, boxes, presence, masks, semantic, cells)

  def detect(
    self, embedding: ImageEmbedding, prompts: Prompts, max_detections: int | None = None
  ) -> Detections:
    """Scores, boxes and masks: `score`, then `mask`."""
    return self.mask(embedding, self.score(embedding, prompts, max_detections))

  def score(
    self, embedding: ImageEmbedding, prompts: Prompts, max_detections: int | None = None
  ) -> Scored:
    """All but the masks.

    Args:
      embedding: of all images that the prompts are about.
      prompts: each names its image.
      max_detections: keeps the best so many queries by score, in descending order, ties by query
        number, before masks are made. None keeps all, in the queries' order.
    """
    prompt, valid, memory, states, boxes, presence = self._decode(embedding, prompts)
    states, boxes, presence = states[-1], boxes[-1], presence[-1]
    logits = self.scoring(states, prompt, valid)
    scores = jax.nn.sigmoid(logits) * jax.nn.sigmoid(presence)[:, None]
    query = jnp.broadcast_to(jnp.arange(scores.shape[1], dtype=jnp.int32), scores.shape)
    if max_detections is not None:
      scores, query = jax.lax.top_k(scores, min(max_detections, scores.shape[1]))
      states = jnp.take_along_axis(states, query[..., None], axis=1)
      boxes = jnp.take_along_axis(boxes, query[..., None], axis=1)
    return Scored(
      scores=scores,
      boxes=cxcywh_to_xyxy(boxes),
      presence=presence,
      image_index=prompts.image,
      sizes=embedding.sizes[prompts.image],
      ids=prompts.first_id[:, None] + query,
      states=states, memory=memory, prompt=prompt, valid=valid,
    )  # fmt: skip

  def mask(self, embedding: ImageEmbedding, scored: Scored) -> Detections:
    """The masks, of any of the rows that `score` returned."""
    image = scored.image_index
    seen = scored.states, scored.memory, scored.prompt, scored.valid
    masks, semantic = self._masks(embedding, image, *seen)
    return Detections(
      scores=scored.scores,
      boxes=scored.boxes,
      mask_logits=masks,
      presence=scored.presence,
      semantic_logits=semantic,
      image_index=image,
      sizes=scored.sizes,
      ids=scored.ids,
    )

  def _decode(
    self, embedding: ImageEmbedding, prompts: Prompts, duplicate: bool = False
  ) -> tuple[Array, ...]:
    """Prompt tokens and which are valid, conditioned image map, states, boxes, presence."""
    image, position = _rows(embedding.coarse, prompts.image), self._position(embedding.coarse)
    geometry, geometry_valid = self.geometry(image, prompts)
    prompt = jnp.concatenate([prompts.text.features, geometry], axis=1)
    valid = jnp.concatenate([prompts.text.valid, geometry_valid], axis=1)
    tokens = _rows(embedding.attended, prompts.image).reshape(len(image), -1, self.config.width)
    memory = self.fusion(tokens, position, prompt, valid).reshape(image.shape)
    return prompt, valid, memory, *self.decoder(memory, position, prompt, valid, duplicate)

  def _map(self, features: Float[Array, "B H W C"], sizes: Int[Array, "B 2"]) -> ImageMaps:
    fine, middle, coarse = self.neck(features)
    return ImageMaps(fine, middle, coarse, sizes)

  def _position(self, coarse: Float[Array, "B H W D"]) -> Float[Array, "HW D"]:
    return sine_map(*coarse.shape[1:]).reshape(-1, self.config.width)

  def _masks(
    self,
    embedding: ImageEmbedding,
    image: Int[Array, " P"],
    states: Float[Array, "P K D"],
    memory: Float[Array, "P H W D"],
    prompt: Float[Array, "P S D"],
    valid: Bool[Array, "P S"],
  ) -> tuple[Float[Array, "P K Hm Wm"], Float[Array, "P Hm Wm"]]:
    levels = _rows(embedding.middle, image), _rows(embedding.fine, image)
    return self.masks(states, memory, levels, prompt, valid)

  def everything(self, images, tokens, boxes) -> Predictions:
    """All parts once, one prompt an image: what `init` runs to make every parameter."""
    rows = jnp.arange(len(images), dtype=jnp.int32)
    labels = jnp.ones(boxes.shape[:2], bool)
    embedding = self.encode_image(images, jnp.ones((len(images), 2), jnp.int32))
    prompts = Prompts(rows, rows, self.encode_text(tokens), boxes, labels, labels)
    return self.predict(embedding, prompts)


def _rows(x: Array, index: Int[Array, " P"]) -> Array:
  """Rows of x; where there is only one, without a copy for each."""
  return x[index] if len(x) > 1 else jnp.broadcast_to(x, (len(index), *x.shape[1:]))


def _first_of_each(x: Array, images: int, count: int) -> Array:
  """The first `count` rows of each image's, of rows image by image."""
  shape = x.shape[1:]
  return x.reshape(images, -1, *shape)[:, :count].reshape(-1, *shape)


def init(config: Config, key: Array) -> dict[str, Any]:
  """Random parameters, float32."""
  side = config.image_size

  @jax.jit  # so that nothing but the parameters is computed
  def make(key):
    images = jnp.zeros((1, side, side, 3), jnp.float32)
    tokens = jnp.zeros((1, config.text.context), jnp.int32)
    boxes = jnp.full((1, 1, 4), 0.5, jnp.float32)
    return Detector(config).init(key, images, tokens, boxes, method=Detector.everything)["params"]

  return make(key)


def parameter_shapes(config: Config) -> dict[str, Any]:
  """The tree of `init` with shapes in place of arrays; costs no memory, however large the model."""
  return jax.eval_shape(functools.partial(init, config), jax.random.key(0))
