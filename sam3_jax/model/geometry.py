"""The geometry encoder: encodes exemplar boxes (and points) as tokens that follow those of the
phrase.

Tokens have no position in the prompt, so padding may be anywhere, and the class token comes last
(Meta's code moves it behind the last valid box of each prompt).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from sam3_jax.config import Config
from sam3_jax.model.layers import PLAIN, ContextLayer, Layering, conv, dense, stacked
from sam3_jax.model.norms import LayerNorm
from sam3_jax.model.positions import sine_code, sine_map
from sam3_jax.ops.boxes import cxcywh_to_xyxy
from sam3_jax.ops.precision import einsum
from sam3_jax.ops.roi_align import roi_align
from sam3_jax.types import Points, Prompts

ROI_SIZE = 7


class GeometryEncoder(nn.Module):
  """Encodes boxes, optionally points, and a class token, which attend to the image."""

  config: Config
  dtype: DTypeLike = jnp.float32
  train: bool = False
  layering: Layering = PLAIN

  def setup(self):
    config, width = self.config, self.config.width
    table = nn.initializers.normal(1.0)
    self.label_embedding = self.param("label_embedding", table, (2, width), jnp.float32)
    self.cls_token = self.param("cls_token", table, (1, width), jnp.float32)
    self.image_norm = LayerNorm(dtype=self.dtype)
    self.box_pool_project = conv(width, ROI_SIZE, self.dtype, None, padding="VALID")
    self.box_project = dense(width, self.dtype, None)
    self.box_position_project = dense(width, self.dtype, None)
    if config.concept_points:
      self.point_project = dense(width, self.dtype, None)
      self.point_pool_project = dense(width, self.dtype, None)
      self.point_position_project = dense(width, self.dtype, None)
    self.project = dense(width, self.dtype, None)
    self.norm = LayerNorm(dtype=self.dtype)
    layers = stacked(ContextLayer, config.geometry_layers, layering=self.layering)
    self.layers = layers(
      width, config.heads, config.mlp_width, self.dtype, config.dropout, self.train
    )
    self.norm_final = LayerNorm(dtype=self.dtype)

  def __call__(
    self, image: Float[Array, "P H W D"], prompts: Prompts
  ) -> tuple[Float[Array, "P G D"], Bool[Array, "P G"]]:
    """Returns tokens (points, boxes, class token) and which of them are valid. `image` is the
    coarse map of each prompt's image."""
    config, width = self.config, self.config.width
    normed = self.image_norm(image)
    class_token = self.cls_token.astype(self.dtype)
    class_tokens = jnp.broadcast_to(class_token, (len(image), 1, width))
    tokens = [self._boxes(normed, prompts.boxes) + self._label(prompts.positive), class_tokens]
    valid = [prompts.valid, jnp.ones((len(image), 1), bool)]
    if prompts.exemplars is not None:
      tokens.insert(0, prompts.exemplars.tokens)
      valid.insert(0, prompts.exemplars.valid)
    if config.concept_points:
      points = prompts.points if prompts.points is not None else _no_points(len(image))
      tokens.insert(0, self._points(normed, points.xy) + self._label(points.positive))
      valid.insert(0, points.valid)
    elif prompts.points is not None:
      raise ValueError(
        "this checkpoint has no concept points (its config says concept_points=False); "
        "use boxes, or convert Meta's checkpoint, which has them."
      )
    x, valid = jnp.concatenate(tokens, axis=1), jnp.concatenate(valid, axis=1)

    x = self.norm(self.project(x))
    context = image.reshape(len(image), -1, width)
    position = sine_map(image.shape[1], image.shape[2], width).reshape(-1, width)
    x, _ = self.layers(x, None, valid, context + position.astype(self.dtype), context, None)
    return self.norm_final(x), valid

  def exemplars(
    self,
    image: Float[Array, "P H W D"],
    boxes: Float[Array, "P N 4"],
    positive: Bool[Array, "P N"],
  ) -> Float[Array, "P N D"]:
    """The tokens of boxes (cxcywh) before they attend to an image, for use with other images."""
    return self._boxes(self.image_norm(image), boxes) + self._label(positive)

  def _boxes(self, image: Float[Array, "P H W D"], boxes: Float[Array, "P N 4"]):
    """Sums three embeddings of each box (cxcywh): coordinates, pooled features, sine encoding."""
    width = self.config.width
    regions = roi_align(image, cxcywh_to_xyxy(boxes), ROI_SIZE)
    pooled = self.box_pool_project(regions.reshape(-1, ROI_SIZE, ROI_SIZE, width))
    pooled = pooled.reshape(*boxes.shape[:2], width)
    # y before x, then height before width: the weights were trained this way.
    codes = [sine_code(boxes[..., 1], width // 2), sine_code(boxes[..., 0], width // 2)]
    code = jnp.concatenate([*codes, boxes[..., 3:], boxes[..., 2:3]], axis=-1)
    return self.box_project(boxes) + pooled + self.box_position_project(code)

  def _points(self, image: Float[Array, "P H W D"], xy: Float[Array, "P M 2"]):
    """Sums three embeddings of each point: coordinates, sampled feature, sine encoding (xy)."""
    width = self.config.width
    feature = jax.vmap(_sample)(image, xy)
    code = [sine_code(xy[..., 0], width // 2), sine_code(xy[..., 1], width // 2)]
    pooled = self.point_pool_project(feature)
    return self.point_project(xy) + pooled + self.point_position_project(jnp.concatenate(code, -1))

  def _label(self, positive: Bool[Array, "P N"]):
    return self.label_embedding.astype(self.dtype)[positive.astype(jnp.int32)]


def _no_points(prompts: int) -> Points:
  flags = jnp.zeros((prompts, 0), bool)
  return Points(jnp.zeros((prompts, 0, 2), jnp.float32), flags, flags)


def _sample(image: Float[Array, "H W D"], xy: Float[Array, "M 2"]) -> Float[Array, "M D"]:
  """Bilinear samples at fractional coordinates, zero outside the image (PyTorch's `grid_sample`
  with align_corners=False)."""

  def weights(fraction, cells):
    return jnp.maximum(
      0, 1 - jnp.abs(fraction[:, None] * cells - 0.5 - jnp.arange(cells, dtype=jnp.float32))
    )

  rows, columns = weights(xy[:, 1], image.shape[0]), weights(xy[:, 0], image.shape[1])
  return einsum("mh,mw,hwd->md", rows, columns, image.astype(jnp.float32)).astype(image.dtype)
