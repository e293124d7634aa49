"""KerasHub's names: a preset of `SAM3PromptableConceptBackbone` (keras_hub 0.32).

A preset is a directory with config.json, model.weights.h5 (or shards) and assets/tokenizer. A
variable is a dataset `layers/LAYER/.../vars/N`: N is 0 for kernel, gamma or embeddings, and 1 for
bias or beta. The first of several layers of one class has no number. Kernels are channels-last.
Only the weights are imported: where KerasHub's code differs from Meta's, ours follows Meta's. A
preset has no tensors of concept points, no third pair of the pixel decoder, no CLIP projection and
no tracker.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from sam3_jax.config import Config
from sam3_jax.model.rope import rope_table

from ..rules import Rule, rule
from ..source import Source
from ..table import Table
from ..transforms import DENSE, Axes, Grid, HalfSplit, Transform
from .keras_hub_config import read_config as read_config
from .unread import DETECTOR

_DECONV = Axes((0, 1, 3, 2))  # Conv2DTranspose: (height, width, out, in)
_HALF_SPLIT_COLUMNS = (DENSE, HalfSplit(), DENSE)  # as rows, by transposing


class Heads:
  """Merges the text encoder's axis of heads, `axis`, with the axis after it."""

  def __init__(self, axis: int):
    self.axis = axis

  def apply(self, array: np.ndarray, config: Config) -> np.ndarray:
    shape = array.shape
    return array.reshape(*shape[: self.axis], -1, *shape[self.axis + 2 :])

  def undo(self, array: np.ndarray, config: Config) -> np.ndarray:
    shape, heads = array.shape, config.text.heads
    return array.reshape(*shape[: self.axis], heads, -1, *shape[self.axis + 1 :])


def matches(names: Iterable[str]) -> bool:
  """Whether these are KerasHub's names for SAM 3."""
  return any(name.startswith("layers/sam3_vision_encoder/") for name in names)


def layer_suffix(layer: int) -> str:
  """The suffix that Keras appends to the class name of a layer."""
  return f"_{layer}" if layer else ""


def names_in_huggingface() -> list[str]:
  """Hugging Face's names of the unread tensors of a preset."""
  prefix = "detector_model.vision_encoder.neck.fpn_layers.3"
  return [f"{prefix}.proj{i}.{leaf}" for i in (1, 2) for leaf in ("weight", "bias")]


def as_huggingface(unread: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Converts a preset's unread tensors to Hugging Face's layout, for export."""
  found = {}
  for i in (1, 2):
    prefix = f"detector_model.vision_encoder.neck.fpn_layers.3.proj{i}"
    kernel, bias = (unread.get(f"{_LEVEL3}/proj{i}/vars/{n}") for n in (0, 1))
    if kernel is not None and bias is not None:
      found |= {f"{prefix}.weight": kernel.transpose(3, 2, 0, 1), f"{prefix}.bias": bias}
  return found


def _dense(source: str, target: str, *kernel: Transform, bias: tuple[Transform, ...] = ()):
  return (
    *rule(f"{source}/vars/0", f"{target}/kernel", *kernel),
    *rule(f"{source}/vars/1", f"{target}/bias", *bias),
  )


def _norm(source: str, target: str) -> tuple[Rule, ...]:
  return (
    *rule(f"{source}/vars/0", f"{target}/scale"),
    *rule(f"{source}/vars/1", f"{target}/bias"),
  )


def _attention(source: str, target: str) -> tuple[Rule, ...]:
  names = {"q": "query", "k": "key", "v": "value", "o": "out"}
  return sum((_dense(f"{source}/{q}_proj", f"{target}/{n}") for q, n in names.items()), ())


def _trunk_attention(source: str, target: str) -> tuple[Rule, ...]:
  return (
    *_dense(f"{source}/q_proj", f"{target}/query", *_HALF_SPLIT_COLUMNS, bias=(HalfSplit(),)),
    *_dense(f"{source}/k_proj", f"{target}/key", *_HALF_SPLIT_COLUMNS, bias=(HalfSplit(),)),
    *_dense(f"{source}/v_proj", f"{target}/value"),
    *_dense(f"{source}/o_proj", f"{target}/out"),
  )


def _text_attention(source: str, target: str) -> tuple[Rule, ...]:
  rules = _dense(f"{source}/output_dense", f"{target}/out", Heads(0))
  for name in ("query", "key", "value"):
    rules += _dense(f"{source}/{name}_dense", f"{target}/{name}", Heads(1), bias=(Heads(0),))
  return rules


def _mlp(source: str, target: str, layers: int) -> tuple[Rule, ...]:
  return sum((_dense(f"{source}/layer{i}", f"{target}/fc{i}") for i in range(1, layers + 1)), ())


def _feed_forward(source: str, target: str) -> tuple[Rule, ...]:
  return _dense(f"{source}/fc1", f"{target}/fc1") + _dense(f"{source}/fc2", f"{target}/fc2")


def _encoder_layer(source: str, target: str) -> tuple[Rule, ...]:
  return (
    *_norm(f"{source}/layer_norm1", f"{target}/norm1"),
    *_attention(f"{source}/self_attn", f"{target}/self_attn"),
    *_norm(f"{source}/layer_norm2", f"{target}/norm2"),
    *_attention(f"{source}/cross_attn", f"{target}/cross_attn"),
    *_norm(f"{source}/layer_norm3", f"{target}/norm3"),
    *_feed_forward(f"{source}/mlp", f"{target}/mlp"),
  )


def _unread_shapes(config: Config, _: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
  d = config.width
  return {
    f"{_LEVEL3}/proj1/vars/0": (DETECTOR, (1, 1, config.trunk.width, d)),
    f"{_LEVEL3}/proj1/vars/1": (DETECTOR, (d,)),
    f"{_LEVEL3}/proj2/vars/0": (DETECTOR, (3, 3, d, d)),
    f"{_LEVEL3}/proj2/vars/1": (DETECTOR, (d,)),
  }


def _derived(config: Config, sources: Mapping[str, Source]) -> dict[str, Source]:
  """RoPE tables, and the position table tiled over the image, which Keras computes when it loads.

  A table that is not tiled was trained; our model cannot hold it, and KerasHub loses it too.
  """
  trunk = config.trunk
  window, image = (
    [Source.of(np.repeat(table, 2, axis=1)) for table in rope_table(side, scale, channels)]
    for channels in [trunk.width // trunk.heads]
    for side, scale in ((trunk.window, 1.0), (config.grid, trunk.window / config.grid))
  )
  found = {}
  for block in range(trunk.blocks):
    path = f"{_TRUNK}/layers/sam3_vi_t_layer{layer_suffix(block)}/rotary_emb/vars"
    tables = window if (block + 1) % (trunk.windowed + 1) else image
    found |= {f"{path}/{i}": table for i, table in enumerate(tables)}
  position, side = sources.get(f"{_TRUNK}/embeddings/vars/1"), trunk.pretrain_grid
  if position is not None and position.shape == (1, side**2, trunk.width):

    def tile() -> np.ndarray:
      times = -(-config.grid // side)
      square = np.tile(position.read().reshape(side, side, -1), (times, times, 1))
      return square[: config.grid, : config.grid].reshape(shape)

    shape = 1, config.grid**2, trunk.width
    found[f"{_TRUNK}/embeddings/vars/0"] = Source(shape, position.dtype, tile)
  return found


_TRUNK = "layers/sam3_vision_encoder/backbone"
_BLOCK = f"{_TRUNK}/layers/sam3_vi_t_layer*"
_NECK = "layers/sam3_vision_encoder/vision_neck/fpn_layers/sam3fpn_layer"
_LEVEL3 = f"{_NECK}_3"
_TEXT = "layers/sam3_text_encoder"
_TEXT_BLOCK = f"{_TEXT}/encoder_layers/clip_encoder_layer*"
_GEOMETRY = "layers/sam3_geometry_encoder"
_DECODER = "layers/sam3_detr_decoder"
_DECODER_LAYER = f"{_DECODER}/layers/sam3_detr_decoder_layer*"
_SCORING = "layers/sam3_dot_product_scoring"
_MASKS = "layers/sam3_mask_decoder"
_DOUBLE = "scale_layers/conv2d_transpose"

TABLE = Table(
  name="keras",
  prefix="",
  canonical=str,
  format_layer=layer_suffix,
  rules=(
    *rule(f"{_TRUNK}/embeddings/vars/1", "trunk/position", Grid()),
    *rule(f"{_TRUNK}/embeddings/patch_embeddings/projection/vars/0", "trunk/patch_embed/kernel"),
    *_norm(f"{_TRUNK}/layer_norm", "trunk/norm_pre"),
    *_norm(f"{_BLOCK}/layer_norm1", "trunk/blocks/*/norm1"),
    *_trunk_attention(f"{_BLOCK}/attention", "trunk/blocks/*/attn"),
    *_norm(f"{_BLOCK}/layer_norm2", "trunk/blocks/*/norm2"),
    *_feed_forward(f"{_BLOCK}/mlp", "trunk/blocks/*/mlp"),
    *_dense(f"{_NECK}/{_DOUBLE}", "neck/level0/up1", _DECONV),
    *_dense(f"{_NECK}/{_DOUBLE}_1", "neck/level0/up2", _DECONV),
    *_dense(f"{_NECK}/proj1", "neck/level0/project"),
    *_dense(f"{_NECK}/proj2", "neck/level0/smooth"),
    *_dense(f"{_NECK}_1/{_DOUBLE}", "neck/level1/up1", _DECONV),
    *_dense(f"{_NECK}_1/proj1", "neck/level1/project"),
    *_dense(f"{_NECK}_1/proj2", "neck/level1/smooth"),
    *_dense(f"{_NECK}_2/proj1", "neck/level2/project"),
    *_dense(f"{_NECK}_2/proj2", "neck/level2/smooth"),
    *rule(f"{_TEXT}/embedding/token_embedding/vars/0", "text/token_embedding/embedding"),
    *rule(f"{_TEXT}/embedding/position_embedding/vars/0", "text/position"),
    *_norm(f"{_TEXT_BLOCK}/layer_norm_1", "text/blocks/*/norm1"),
    *_text_attention(f"{_TEXT_BLOCK}/attention", "text/blocks/*/attn"),
    *_norm(f"{_TEXT_BLOCK}/layer_norm_2", "text/blocks/*/norm2"),
    *_dense(f"{_TEXT_BLOCK}/dense_1", "text/blocks/*/mlp/fc1"),
    *_dense(f"{_TEXT_BLOCK}/dense_2", "text/blocks/*/mlp/fc2"),
    *_norm(f"{_TEXT}/layer_norm", "text/norm_final"),
    *_dense("layers/dense", "text/project"),
    *rule(f"{_GEOMETRY}/label_embed/vars/0", "geometry/label_embedding"),
    *rule(f"{_GEOMETRY}/cls_embed/vars/0", "geometry/cls_token"),
    *_dense(f"{_GEOMETRY}/boxes_direct_project", "geometry/box_project"),
    *_dense(f"{_GEOMETRY}/boxes_pool_project", "geometry/box_pool_project"),
    *_dense(f"{_GEOMETRY}/boxes_pos_enc_project", "geometry/box_position_project"),
    *_dense(f"{_GEOMETRY}/final_proj", "geometry/project"),
    *_norm(f"{_GEOMETRY}/prompt_layer_norm", "geometry/norm"),
    *_norm(f"{_GEOMETRY}/vision_layer_norm", "geometry/image_norm"),
    *_norm(f"{_GEOMETRY}/output_layer_norm", "geometry/norm_final"),
    *_encoder_layer(f"{_GEOMETRY}/layers/sam3_geometry_encoder_layer*", "geometry/layers/*"),
    *_encoder_layer("layers/sam3_detr_encoder/layers/sam3_detr_encoder_layer*", "fusion/layers/*"),
    *_attention(f"{_DECODER_LAYER}/self_attn", "decoder/layers/*/self_attn"),
    *_norm(f"{_DECODER_LAYER}/self_attn_layer_norm", "decoder/layers/*/norm_self"),
    *_attention(f"{_DECODER_LAYER}/text_cross_attn", "decoder/layers/*/text_attn"),
    *_norm(f"{_DECODER_LAYER}/text_cross_attn_layer_norm", "decoder/layers/*/norm_text"),
    *_attention(f"{_DECODER_LAYER}/vision_cross_attn", "decoder/layers/*/image_attn"),
    *_norm(f"{_DECODER_LAYER}/vision_cross_attn_layer_norm", "decoder/layers/*/norm_image"),
    *_feed_forward(f"{_DECODER_LAYER}/mlp", "decoder/layers/*/mlp"),
    *_norm(f"{_DECODER_LAYER}/mlp_layer_norm", "decoder/layers/*/norm_mlp"),
    *_norm(f"{_DECODER}/output_layer_norm", "decoder/norm"),
    *_norm(f"{_DECODER}/presence_layer_norm", "decoder/presence_norm"),
    *rule(f"{_DECODER}/query_embed/vars/0", "decoder/query_embedding"),
    *rule(f"{_DECODER}/reference_points/vars/0", "decoder/reference_points"),
    *rule(f"{_DECODER}/presence_token/vars/0", "decoder/presence_token"),
    *_mlp(f"{_DECODER}/box_head", "decoder/box_head", 3),
    *_mlp(f"{_DECODER}/ref_point_head", "decoder/query_position", 2),
    *_mlp(f"{_DECODER}/presence_head", "decoder/presence_head", 3),
    *_mlp(f"{_DECODER}/box_rpb_embed_x", "decoder/box_bias/x", 2),
    *_mlp(f"{_DECODER}/box_rpb_embed_y", "decoder/box_bias/y", 2),
    *_mlp(f"{_SCORING}/text_mlp", "scoring/prompt_mlp", 2),
    *_norm(f"{_SCORING}/text_mlp_out_norm", "scoring/prompt_norm"),
    *_dense(f"{_SCORING}/text_proj", "scoring/prompt_project"),
    *_dense(f"{_SCORING}/query_proj", "scoring/query_project"),
    *_norm(f"{_MASKS}/prompt_cross_attn_norm", "masks/prompt_norm"),
    *_attention(f"{_MASKS}/prompt_cross_attn", "masks/prompt_attn"),
    *_dense(f"{_MASKS}/pixel_decoder/conv_layers/conv2d", "masks/conv0"),
    *_dense(f"{_MASKS}/pixel_decoder/conv_layers/conv2d_1", "masks/conv1"),
    *_norm(f"{_MASKS}/pixel_decoder/norms/group_normalization", "masks/norm0"),
    *_norm(f"{_MASKS}/pixel_decoder/norms/group_normalization_1", "masks/norm1"),
    *_dense(f"{_MASKS}/instance_projection", "masks/instance_project"),
    *_dense(f"{_MASKS}/semantic_projection", "masks/semantic_project"),
    *_dense(f"{_MASKS}/mask_embedder/layers/dense", "masks/mask_embed/fc1"),
    *_dense(f"{_MASKS}/mask_embedder/layers/dense_1", "masks/mask_embed/fc2"),
    *_dense(f"{_MASKS}/mask_embedder/layers/dense_2", "masks/mask_embed/fc3"),
  ),
  unread={rf"{_LEVEL3}/.*": "half-resolution level: unused"},
  dropped={
    rf"{_TRUNK}/layers/.*/rotary_emb/vars/[01]": "recomputed",
    rf"{_TRUNK}/embeddings/vars/0": "tiles of the position table",
  },
  unread_shapes=_unread_shapes,
  derived=_derived,
)
