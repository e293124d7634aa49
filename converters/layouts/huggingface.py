"""Hugging Face's names: `model.safetensors` and `config.json` as transformers writes them.

The canonical names are those of facebook/sam3 (`detector_model.*`, `tracker_model.*`,
`tracker_neck.*`). `Sam3Model` writes the detector without its prefix. transformers 5.23 doubles
`tracker_model.` for a model that was built rather than loaded. `Sam3TrackerModel` writes neither
text encoder nor detector and cannot be converted. None has the tensors of concept points.
`Sam3LiteTextModel` is `Sam3Model` with another text encoder.
"""

import dataclasses
import functools
import re
from collections.abc import Iterable

from ..rules import Rule, dense, norm, rule
from ..table import Table
from ..transforms import (
  CONV,
  DECONV,
  POINTWISE,
  Axes,
  Grid,
  HalfSplit,
  Squeeze,
  Transform,
)
from . import common, unread
from .huggingface_config import read_config as read_config

_PARTS = ("detector_model", "tracker_model", "tracker_neck")


def matches(names: Iterable[str]) -> bool:
  """Whether these are Hugging Face's names for SAM 3, its tracker alone included.

  The trunk of SAM 2 is called vision_encoder.backbone too, and has blocks where SAM 3 has layers.
  """
  return any("vision_encoder.backbone.layers." in name for name in names)


def is_lite(names: Iterable[str]) -> bool:
  """Whether these are the names of `Sam3LiteTextModel`."""
  return any(re.match(r"(detector_model\.)?text_encoder\.(layers|embeddings)\.", n) for n in names)


def canonical(name: str) -> str:
  """The name in facebook/sam3 of a tensor with any of these names."""
  if name.startswith(tuple(f"tracker_model.{part}." for part in _PARTS)):
    return name.removeprefix("tracker_model.")
  if name.startswith(tuple(f"{part}." for part in _PARTS)):
    return name
  return f"detector_model.{name}"


def _attention(source: str, target: str, *rotate: Transform, out: str = "o_proj"):
  return (
    *dense(f"{source}.q_proj", f"{target}/query", *rotate),
    *dense(f"{source}.k_proj", f"{target}/key", *rotate),
    *dense(f"{source}.v_proj", f"{target}/value"),
    *dense(f"{source}.{out}", f"{target}/out"),
  )


def _mlp(source: str, target: str, layers: int) -> tuple[Rule, ...]:
  return sum((dense(f"{source}.layer{i}", f"{target}/fc{i}") for i in range(1, layers + 1)), ())


def _encoder_layer(source: str, target: str) -> tuple[Rule, ...]:
  return (
    *norm(f"{source}.layer_norm1", f"{target}/norm1"),
    *_attention(f"{source}.self_attn", f"{target}/self_attn"),
    *norm(f"{source}.layer_norm2", f"{target}/norm2"),
    *_attention(f"{source}.cross_attn", f"{target}/cross_attn"),
    *norm(f"{source}.layer_norm3", f"{target}/norm3"),
    *dense(f"{source}.mlp.fc1", f"{target}/mlp/fc1"),
    *dense(f"{source}.mlp.fc2", f"{target}/mlp/fc2"),
  )


def _neck(source: str, target: str) -> tuple[Rule, ...]:
  return (
    *dense(f"{source}.0.scale_layers.0", f"{target}/level0/up1", kernel=DECONV),
    *dense(f"{source}.0.scale_layers.2", f"{target}/level0/up2", kernel=DECONV),
    *dense(f"{source}.0.proj1", f"{target}/level0/project", kernel=CONV),
    *dense(f"{source}.0.proj2", f"{target}/level0/smooth", kernel=CONV),
    *dense(f"{source}.1.scale_layers.0", f"{target}/level1/up1", kernel=DECONV),
    *dense(f"{source}.1.proj1", f"{target}/level1/project", kernel=CONV),
    *dense(f"{source}.1.proj2", f"{target}/level1/smooth", kernel=CONV),
    *dense(f"{source}.2.proj1", f"{target}/level2/project", kernel=CONV),
    *dense(f"{source}.2.proj2", f"{target}/level2/smooth", kernel=CONV),
  )


def _two_way_layer(source: str, target: str) -> tuple[Rule, ...]:
  return (
    *_attention(f"{source}.self_attn", f"{target}/self_attn"),
    *_attention(f"{source}.cross_attn_token_to_image", f"{target}/image_attn"),
    *_attention(f"{source}.cross_attn_image_to_token", f"{target}/token_attn"),
    *dense(f"{source}.mlp.proj_in", f"{target}/mlp/fc1"),
    *dense(f"{source}.mlp.proj_out", f"{target}/mlp/fc2"),
    *sum((norm(f"{source}.layer_norm{i}", f"{target}/norm{i}") for i in range(1, 5)), ()),
  )


def _visual_mlp(source: str, target: str) -> tuple[Rule, ...]:
  return (
    *dense(f"{source}.proj_in", f"{target}/fc1"),
    *dense(f"{source}.layers.0", f"{target}/fc2"),
    *dense(f"{source}.proj_out", f"{target}/fc3"),
  )


def _memory_layer(source: str, target: str) -> tuple[Rule, ...]:
  return (
    *norm(f"{source}.layer_norm1", f"{target}/norm1"),
    *_attention(f"{source}.self_attn", f"{target}/self_attn", HalfSplit(heads=1)),
    *norm(f"{source}.layer_norm2", f"{target}/norm2"),
    *_attention(f"{source}.cross_attn_image", f"{target}/cross_attn", HalfSplit(heads=1)),
    *norm(f"{source}.layer_norm3", f"{target}/norm3"),
    *dense(f"{source}.linear1", f"{target}/mlp/fc1"),
    *dense(f"{source}.linear2", f"{target}/mlp/fc2"),
  )


def _mask_downsampler(source: str, target: str) -> tuple[Rule, ...]:
  """Convolution, norm and activation for each of four strides, then a projection."""
  rules: tuple[Rule, ...] = dense(f"{source}.final_conv", f"{target}/project", kernel=CONV)
  for i in range(4):
    rules += dense(f"{source}.layers.{i}.conv", f"{target}/conv{i + 1}", kernel=CONV)
    rules += norm(f"{source}.layers.{i}.layer_norm", f"{target}/norm{i + 1}")
  return rules


def _fuser_block(source: str, target: str) -> tuple[Rule, ...]:
  return (
    *dense(f"{source}.depthwise_conv", f"{target}/depthwise", kernel=CONV),
    *norm(f"{source}.layer_norm", f"{target}/norm"),
    *dense(f"{source}.pointwise_conv1", f"{target}/mlp/fc1"),
    *dense(f"{source}.pointwise_conv2", f"{target}/mlp/fc2"),
    *rule(f"{source}.scale", f"{target}/scale"),
  )


def _text(source: str, block: str) -> tuple[Rule, ...]:
  return (
    *rule(f"{source}.embeddings.token_embedding.weight", "text/token_embedding/embedding"),
    *norm(f"{block}.layer_norm1", "text/blocks/*/norm1"),
    *_attention(f"{block}.self_attn", "text/blocks/*/attn", out="out_proj"),
    *norm(f"{block}.layer_norm2", "text/blocks/*/norm2"),
    *dense(f"{block}.mlp.fc1", "text/blocks/*/mlp/fc1"),
    *dense(f"{block}.mlp.fc2", "text/blocks/*/mlp/fc2"),
    *norm(f"{source}.final_layer_norm", "text/norm_final"),
  )


def _mixer(source: str, target: str) -> tuple[Rule, ...]:
  mix, feed = f"{source}.token_mixer", f"{source}.conv_feed_forward"
  along = Squeeze((2,)), Axes((2, 1, 0))
  return (
    *rule(f"{mix}.layer_scale", f"{target}/mix_scale", Squeeze((1, 2))),
    *rule(f"{mix}.mixer.conv.weight", f"{target}/mix/kernel", *along),
    *_fixed_norm(f"{mix}.mixer.batchnorm_conv", f"{target}/mix_norm"),
    *_fixed_norm(f"{mix}.mixer.batchnorm_skip", f"{target}/skip_norm"),
    *_fixed_norm(f"{mix}.reference_batchnorm", f"{target}/reference_norm"),
    *rule(f"{source}.layer_scale", f"{target}/feed_scale", Squeeze((1, 2))),
    *rule(f"{feed}.depthwise_conv.weight", f"{target}/feed/kernel", *along),
    *_fixed_norm(f"{feed}.depthwise_batchnorm", f"{target}/feed_norm"),
    *dense(f"{feed}.mlp.fc1", f"{target}/mlp/fc1", kernel=POINTWISE),
    *dense(f"{feed}.mlp.fc2", f"{target}/mlp/fc2", kernel=POINTWISE),
  )


def _fixed_norm(source: str, target: str) -> tuple[Rule, ...]:
  return (
    *norm(source, target),
    *rule(f"{source}.running_mean", f"{target}/mean"),
    *rule(f"{source}.running_var", f"{target}/variance"),
  )


_TRUNK = "vision_encoder.backbone"
_BLOCK = f"{_TRUNK}.layers.*"
_NECK = "vision_encoder.neck.fpn_layers"
_TEXT = "text_encoder.text_model"
_LITE = "text_encoder"
_LITE_POSITION = f"{_LITE}.embeddings.position_embedding"
_GEOMETRY = "geometry_encoder"
_DECODER = "detr_decoder"
_DECODER_LAYER = f"{_DECODER}.layers.*"
_SCORING = "dot_product_scoring"
_MASKS = "mask_decoder"
_PROMPT = "tracker_model.prompt_encoder"
_MASK_DECODER = "tracker_model.mask_decoder"
_TWO_WAY = f"{_MASK_DECODER}.transformer"
_MEMORY_ATTENTION = "tracker_model.memory_attention"
_MEMORY_ENCODER = "tracker_model.memory_encoder"
_HALF = "half-resolution level: unused"

TABLE = Table(
  name="huggingface",
  prefix="detector_model.",
  canonical=canonical,
  rules=(
    *rule(f"{_TRUNK}.embeddings.position_embeddings", "trunk/position", Grid()),
    *rule(
      f"{_TRUNK}.embeddings.patch_embeddings.projection.weight", "trunk/patch_embed/kernel", CONV
    ),
    *norm(f"{_TRUNK}.layer_norm", "trunk/norm_pre"),
    *norm(f"{_BLOCK}.layer_norm1", "trunk/blocks/*/norm1"),
    *_attention(f"{_BLOCK}.attention", "trunk/blocks/*/attn", HalfSplit()),
    *norm(f"{_BLOCK}.layer_norm2", "trunk/blocks/*/norm2"),
    *dense(f"{_BLOCK}.mlp.fc1", "trunk/blocks/*/mlp/fc1"),
    *dense(f"{_BLOCK}.mlp.fc2", "trunk/blocks/*/mlp/fc2"),
    *_neck(_NECK, "neck"),
    *rule(f"{_TEXT}.embeddings.position_embedding.weight", "text/position"),
    *_text(_TEXT, f"{_TEXT}.encoder.layers.*"),
    *dense("text_projection", "text/project"),
    *common.geometry(_GEOMETRY),
    *norm(f"{_GEOMETRY}.prompt_layer_norm", "geometry/norm"),
    *norm(f"{_GEOMETRY}.vision_layer_norm", "geometry/image_norm"),
    *norm(f"{_GEOMETRY}.output_layer_norm", "geometry/norm_final"),
    *_encoder_layer(f"{_GEOMETRY}.layers.*", "geometry/layers/*"),
    *_encoder_layer("detr_encoder.layers.*", "fusion/layers/*"),
    *_attention(f"{_DECODER_LAYER}.self_attn", "decoder/layers/*/self_attn"),
    *norm(f"{_DECODER_LAYER}.self_attn_layer_norm", "decoder/layers/*/norm_self"),
    *_attention(f"{_DECODER_LAYER}.text_cross_attn", "decoder/layers/*/text_attn"),
    *norm(f"{_DECODER_LAYER}.text_cross_attn_layer_norm", "decoder/layers/*/norm_text"),
    *_attention(f"{_DECODER_LAYER}.vision_cross_attn", "decoder/layers/*/image_attn"),
    *norm(f"{_DECODER_LAYER}.vision_cross_attn_layer_norm", "decoder/layers/*/norm_image"),
    *dense(f"{_DECODER_LAYER}.mlp.fc1", "decoder/layers/*/mlp/fc1"),
    *dense(f"{_DECODER_LAYER}.mlp.fc2", "decoder/layers/*/mlp/fc2"),
    *norm(f"{_DECODER_LAYER}.mlp_layer_norm", "decoder/layers/*/norm_mlp"),
    *norm(f"{_DECODER}.output_layer_norm", "decoder/norm"),
    *norm(f"{_DECODER}.presence_layer_norm", "decoder/presence_norm"),
    *common.queries(_DECODER),
    *_mlp(f"{_DECODER}.box_head", "decoder/box_head", 3),
    *_mlp(f"{_DECODER}.ref_point_head", "decoder/query_position", 2),
    *_mlp(f"{_DECODER}.presence_head", "decoder/presence_head", 3),
    *_mlp(f"{_DECODER}.box_rpb_embed_x", "decoder/box_bias/x", 2),
    *_mlp(f"{_DECODER}.box_rpb_embed_y", "decoder/box_bias/y", 2),
    *_mlp(f"{_SCORING}.text_mlp", "scoring/prompt_mlp", 2),
    *norm(f"{_SCORING}.text_mlp_out_norm", "scoring/prompt_norm"),
    *dense(f"{_SCORING}.text_proj", "scoring/prompt_project"),
    *dense(f"{_SCORING}.query_proj", "scoring/query_project"),
    *norm(f"{_MASKS}.prompt_cross_attn_norm", "masks/prompt_norm"),
    *_attention(f"{_MASKS}.prompt_cross_attn", "masks/prompt_attn"),
    *common.pixel_decoder(f"{_MASKS}.pixel_decoder"),
    *dense(f"{_MASKS}.instance_projection", "masks/instance_project", kernel=CONV),
    *dense(f"{_MASKS}.semantic_projection", "masks/semantic_project", kernel=CONV),
    *dense(f"{_MASKS}.mask_embedder.layers.0", "masks/mask_embed/fc1"),
    *dense(f"{_MASKS}.mask_embedder.layers.1", "masks/mask_embed/fc2"),
    *dense(f"{_MASKS}.mask_embedder.layers.2", "masks/mask_embed/fc3"),
  ),
  unread={
    r"(detector_model\.vision_encoder\.|tracker_)neck\.fpn_layers\.3\..*": _HALF,
    r"detector_model\.text_encoder\.text_projection\.weight": "computed, unused",
    r"detector_model\.mask_decoder\.pixel_decoder\.\w+\.2\..*": "third pair, unused",
    r"tracker_neck\..*": "neck of visual prompts, no head",
    r"tracker_model\.shared_image_embedding\..*": "a copy of the prompt encoder's",
    r"tracker_model\.no_memory_positional_encoding": "code that is never reached: unused",
    r"tracker_model\..*": "video",
  },
  dropped={},
  visual_rules=(
    *_neck("tracker_neck.fpn_layers", "visual/neck"),
    *rule("tracker_model.no_memory_embedding", "visual/no_memory"),
    *common.mask_tokens(_MASK_DECODER),
    *rule(f"{_PROMPT}.shared_embedding.positional_embedding", "visual/prompt/frequencies"),
    *rule(f"{_PROMPT}.point_embed.weight", "visual/prompt/label_embedding"),
    *common.prompt_tokens(_PROMPT),
    *dense(f"{_PROMPT}.mask_embed.conv1", "visual/prompt/mask/conv1", kernel=CONV),
    *norm(f"{_PROMPT}.mask_embed.layer_norm1", "visual/prompt/mask/norm1"),
    *dense(f"{_PROMPT}.mask_embed.conv2", "visual/prompt/mask/conv2", kernel=CONV),
    *norm(f"{_PROMPT}.mask_embed.layer_norm2", "visual/prompt/mask/norm2"),
    *dense(f"{_PROMPT}.mask_embed.conv3", "visual/prompt/mask/project", kernel=CONV),
    *_two_way_layer(f"{_TWO_WAY}.layers.0", "visual/decoder/two_way/layer0"),
    *_two_way_layer(f"{_TWO_WAY}.layers.1", "visual/decoder/two_way/layer1"),
    *_attention(f"{_TWO_WAY}.final_attn_token_to_image", "visual/decoder/two_way/final_attn"),
    *norm(f"{_TWO_WAY}.layer_norm_final_attn", "visual/decoder/two_way/norm_final"),
    *dense(f"{_MASK_DECODER}.upscale_conv1", "visual/decoder/up1", kernel=DECONV),
    *norm(f"{_MASK_DECODER}.upscale_layer_norm", "visual/decoder/up_norm"),
    *dense(f"{_MASK_DECODER}.upscale_conv2", "visual/decoder/up2", kernel=DECONV),
    *_visual_mlp(f"{_MASK_DECODER}.output_hypernetworks_mlps.*", "visual/decoder/mask_mlp/*"),
    *_visual_mlp(f"{_MASK_DECODER}.iou_prediction_head", "visual/decoder/iou_head"),
    *_visual_mlp(f"{_MASK_DECODER}.pred_obj_score_head", "visual/decoder/object_head"),
  ),
  visual_parts=("tracker_model.mask_decoder.", "tracker_neck."),
  video_rules=(
    *rule(
      "tracker_model.memory_temporal_positional_encoding", "video/memory_codes", Squeeze((1, 2))
    ),
    *rule("tracker_model.no_object_pointer", "video/no_object_pointer", Squeeze((0,))),
    *rule(
      "tracker_model.occlusion_spatial_embedding_parameter",
      "video/no_object_memory",
      Squeeze((0,)),
    ),
    *_visual_mlp("tracker_model.object_pointer_proj", "video/pointer_mlp"),
    *dense("tracker_model.temporal_positional_encoding_projection_layer", "video/pointer_time"),
    *dense("tracker_model.mask_downsample", "video/mask_downsample", kernel=CONV),
    *_memory_layer(f"{_MEMORY_ATTENTION}.layers.*", "video/memory_attention/layers/*"),
    *norm(f"{_MEMORY_ATTENTION}.layer_norm", "video/memory_attention/norm_final"),
    *_mask_downsampler(f"{_MEMORY_ENCODER}.mask_downsampler", "video/memory_encoder/mask"),
    *dense(
      f"{_MEMORY_ENCODER}.feature_projection", "video/memory_encoder/image_project", kernel=CONV
    ),
    *_fuser_block(f"{_MEMORY_ENCODER}.memory_fuser.layers.*", "video/memory_encoder/blocks/*"),
    *dense(f"{_MEMORY_ENCODER}.projection", "video/memory_encoder/project", kernel=CONV),
  ),
  video_parts=(f"{_MEMORY_ATTENTION}.layers.", f"{_MEMORY_ENCODER}."),
  unread_shapes=functools.partial(unread.unread_shapes, "huggingface"),
)

LITE = dataclasses.replace(
  TABLE,
  name="huggingface, LiteText",
  rules=(
    *(item for item in TABLE.rules if not item.source.startswith(_TEXT)),
    *rule(f"{_LITE_POSITION}.position_embedding", "text/position", Squeeze((0, 1))),
    *_text(_LITE, f"{_LITE}.layers.*"),
    *_mixer(f"{_LITE}.layers.0", "text/first"),
    *_mixer(f"{_LITE}.layers.*", "text/last"),
  ),
  unread={
    r"detector_model\.vision_encoder\.neck\.fpn_layers\.3\..*": _HALF,
    r"detector_model\.text_encoder\.projection\.weight": "computed, unused",
    r"detector_model\.mask_decoder\.pixel_decoder\.\w+\.2\..*": "third pair, unused",
    r".*\.num_batches_tracked": "number of training batches",
  },
  visual_rules=(),
  visual_parts=(),
  video_rules=(),
  video_parts=(),
)
