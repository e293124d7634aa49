"""KerasHub's names: a preset of `SAM3PromptableConceptBackbone` (keras_hub 0.32).

A preset is a folder of config.json, model.weights.h5 (or shards) and assets/tokenizer. A variable
is a dataset `layers/LAYER/.../vars/N`: kernel, gamma or embeddings are 0, bias or beta are 1. Of
several layers of one class the first has no number. Kernels are channels-last. What KerasHub
computes otherwise than Meta's code is not imported, the weights are; it has no tensors of concept
points, no third pair of the pixel decoder, no CLIP projection and no tracker.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from sam3_jax.config import Config, TextConfig, TrunkConfig
from sam3_jax.model.rope import rope_table
from sam3_jax.utils.json_text import shown

from ..rules import DENSE, Axes, Grid, HalfSplit, Rule, Source, Table, Transform, rule
from ..settings import Settings
from .unread import DETECTOR

CLASS = "SAM3PromptableConceptBackbone"
_DECONV = Axes((0, 1, 3, 2))  # Conv2DTranspose: (rows, columns, out, in)
_TURN = (DENSE, HalfSplit(), DENSE)  # columns of outputs as rows, and back
_FIXED = {
  "vision_encoder.hidden_activation": "gelu",
  "vision_encoder.rope_theta": 10000.0,
  "vision_encoder.fpn_scale_factors": [4.0, 2.0, 1.0, 0.5],
  "text_encoder.intermediate_activation": "gelu",
  "geometry_encoder.hidden_activation": "relu",
  "geometry_encoder.roi_size": 7,
  "detr_encoder.hidden_activation": "relu",
  "detr_decoder.hidden_activation": "relu",
  "mask_decoder.num_upsampling_stages": 3,
}


class Heads:
  """The text encoder's attention has an axis of heads: before (kernels) or after (output) it."""

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


def number(layer: int) -> str:
  """What Keras appends to the name of a layer's class."""
  return f"_{layer}" if layer else ""


class _Settings(Settings):
  """A preset says everything."""

  def get(self, path: str, like: Any) -> Any:
    """`like` may be a type too."""
    kind = like if isinstance(like, type) else type(like)
    part, _, key = path.partition(".")
    try:
      value = self.values["config"][part]["config"][key]
    except (KeyError, TypeError) as error:
      raise ValueError(f"{self.where} lacks {path}; {_AGAIN}") from error
    if type(value) is not kind or (kind is int and value < 1):
      raise ValueError(f"{self.where} has {path} = {shown(value)}; expected a {kind.__name__}.")
    return value

  def side(self, path: str) -> int:
    """Of a square image [side, side, channels]."""
    shape = self.get(path, list)
    square = len(shape) == 3 and shape[0] == shape[1] and type(shape[0]) is int
    if not square or shape[0] < 1:
      raise ValueError(f"{self.where} has {path} = {shown(shape)}; expected a square of pixels.")
    return shape[0]


def read_config(values: Mapping[str, Any], where: str) -> Config:
  """Our configuration from a preset's config.json.

  Raises:
    ValueError: it is of another model, lacks something, or asks for what the code does not do.
  """
  kind = values.get("class_name") if isinstance(values, Mapping) else None
  if kind != CLASS:
    raise ValueError(
      f"{where} is of class {shown(kind)}; expected {CLASS}: KerasHub's preset of SAM 3."
    )
  settings = _Settings(values, where)
  get, same = settings.get, settings.same
  settings.require(_FIXED)
  text, attending = "text_encoder", ("geometry_encoder", "detr_encoder", "detr_decoder")
  return settings.make(
    Config,
    trunk=_read_trunk(settings),
    text=settings.make(
      TextConfig,
      width=get(f"{text}.hidden_dim", int),
      heads=get(f"{text}.num_heads", int),
      mlp_width=get(f"{text}.intermediate_dim", int),
      layers=get(f"{text}.num_layers", int),
      context=get(f"{text}.max_sequence_length", int),
      vocabulary=get(f"{text}.vocabulary_size", int),
    ),
    image_size=settings.side("vision_encoder.image_shape"),
    patch=get("vision_encoder.patch_size", int),
    width=same("hidden_dim", int, *attending, "mask_decoder"),
    heads=same("num_heads", int, *attending, "mask_decoder"),
    mlp_width=same("intermediate_dim", int, *attending),
    geometry_layers=get("geometry_encoder.num_layers", int),
    fusion_layers=get("detr_encoder.num_layers", int),
    decoder_layers=get("detr_decoder.num_layers", int),
    queries=get("detr_decoder.num_queries", int),
    concept_points=False,
  )


def _read_trunk(settings: _Settings) -> TrunkConfig:
  get, vision = settings.get, "vision_encoder"
  blocks, ends = get(f"{vision}.num_layers", int), get(f"{vision}.global_attn_indexes", list)
  side = settings.side(f"{vision}.pretrain_image_shape")
  return settings.make(
    TrunkConfig,
    width=get(f"{vision}.hidden_dim", int),
    heads=get(f"{vision}.num_heads", int),
    mlp_width=get(f"{vision}.intermediate_dim", int),
    **settings.groups(blocks, ends),
    window=get(f"{vision}.window_size", int),
    pretrain_grid=side // get(f"{vision}.patch_size", int),
  )


def names_in_huggingface() -> list[str]:
  """Hugging Face's names of the tensors that a preset has and our model does not read."""
  place = "detector_model.vision_encoder.neck.fpn_layers.3"
  return [f"{place}.proj{i}.{leaf}" for i in (1, 2) for leaf in ("weight", "bias")]


def as_huggingface(unread: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """A preset's unread tensors as those of Hugging Face's layout, for the way back."""
  found = {}
  for i in (1, 2):
    place = f"detector_model.vision_encoder.neck.fpn_layers.3.proj{i}"
    kernel, bias = (unread.get(f"{_LEVEL3}/proj{i}/vars/{n}") for n in (0, 1))
    if kernel is not None and bias is not None:
      found |= {f"{place}.weight": kernel.transpose(3, 2, 0, 1), f"{place}.bias": bias}
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
    *_dense(f"{source}/q_proj", f"{target}/query", *_TURN, bias=(HalfSplit(),)),
    *_dense(f"{source}/k_proj", f"{target}/key", *_TURN, bias=(HalfSplit(),)),
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


def _kept(config: Config, _: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
  d = config.width
  return {
    f"{_LEVEL3}/proj1/vars/0": (DETECTOR, (1, 1, config.trunk.width, d)),
    f"{_LEVEL3}/proj1/vars/1": (DETECTOR, (d,)),
    f"{_LEVEL3}/proj2/vars/0": (DETECTOR, (3, 3, d, d)),
    f"{_LEVEL3}/proj2/vars/1": (DETECTOR, (d,)),
  }


def _derived(config: Config, sources: Mapping[str, Source]) -> dict[str, Source]:
  """RoPE tables, and the position table tiled over the image, which Keras makes when it loads.

  One that is no tiling was trained: our model has no place for it, and KerasHub loses it too.
  """
  trunk = config.trunk
  window, image = (
    [Source.of(np.repeat(table, 2, axis=1)) for table in rope_table(side, scale, channels)]
    for channels in [trunk.width // trunk.heads]
    for side, scale in ((trunk.window, 1.0), (config.grid, trunk.window / config.grid))
  )
  found = {}
  for block in range(trunk.blocks):
    place = f"{_TRUNK}/layers/sam3_vi_t_layer{number(block)}/rotary_emb/vars"
    tables = window if (block + 1) % (trunk.windowed + 1) else image
    found |= {f"{place}/{i}": table for i, table in enumerate(tables)}
  position, side = sources.get(f"{_TRUNK}/embeddings/vars/1"), trunk.pretrain_grid
  if position is not None and position.shape == (1, side**2, trunk.width):

    def tile() -> np.ndarray:
      times = -(-config.grid // side)
      square = np.tile(position.read().reshape(side, side, -1), (times, times, 1))
      return square[: config.grid, : config.grid].reshape(shape)

    shape = 1, config.grid**2, trunk.width
    found[f"{_TRUNK}/embeddings/vars/0"] = Source(shape, position.dtype, tile)
  return found


_AGAIN = "download the preset again."
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
  number=number,
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
    rf"{_TRUNK}/layers/.*/rotary_emb/vars/[01]": "computed anew",
    rf"{_TRUNK}/embeddings/vars/0": "tiles of the position table",
  },
  kept=_kept,
  derived=_derived,
)
