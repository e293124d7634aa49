"""Meta's names: the layout of `sam3.pt` (facebookresearch/sam3, `Sam3VideoInference.state_dict()`).

`detector.*` is the image model, `tracker.*` the video model on top of it. The state of an image
model alone has no prefix `detector.`.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping

import numpy as np

from sam3_jax.config import Config

from ..rules import Rule, dense, norm, rule
from ..source import Source
from ..table import Table
from ..transforms import CONV, DECONV, DENSE, Grid, HalfSplit, Squeeze, Transform
from . import common, unread


def matches(names: Iterable[str]) -> bool:
  """Whether these are Meta's names for SAM 3."""
  return any("backbone.vision_backbone.trunk." in name for name in names)


def is_multiplex(names: Iterable[str]) -> bool:
  """Whether these are the names of SAM 3.1: other necks, and another tracker for video."""
  return any("tracker.model." in name or "interactive_convs." in name for name in names)


def canonical(name: str) -> str:
  """The name in sam3.pt of a tensor of any of Meta's models."""
  for interactive in (
    "inst_interactive_predictor.model.",
    "detector.inst_interactive_predictor.model.",
  ):
    if name.startswith(interactive):
      return f"tracker.{name.removeprefix(interactive)}"
  return name if name.startswith(("detector.", "tracker.")) else f"detector.{name}"


def rope_tables(config: Config) -> dict[str, np.ndarray]:
  """Meta's stored RoPE tables of each block: complex64 [positions, channel pairs].

  Computed in float32, as in Meta's code. Positions of global blocks are scaled so that the whole
  grid spans one window.
  """
  trunk = config.trunk
  channels = trunk.width // trunk.heads
  exponents = np.arange(0, channels, 4, dtype=np.float32) / np.float32(channels)
  frequencies = np.float32(1) / np.float32(10000) ** exponents

  def table(side: int, scale: float) -> np.ndarray:
    y, x = np.indices((side, side), dtype=np.float32).reshape(2, -1) * np.float32(scale)
    angles = np.concatenate([np.outer(x, frequencies), np.outer(y, frequencies)], axis=1)
    return (np.cos(angles) + 1j * np.sin(angles)).astype(np.complex64)

  windowed, whole = table(trunk.window, 1), table(config.grid, trunk.window / config.grid)
  group = trunk.windowed + 1
  return {
    f"detector.{_TRUNK}.blocks.{i}.attn.freqs_cis": windowed if (i + 1) % group else whole
    for i in range(trunk.blocks)
  }


def _derived(config: Config, _: Mapping[str, Source]) -> dict[str, Source]:
  return {name: Source.of(table) for name, table in rope_tables(config).items()}


def _fused(source: str, target: str, *rotate: Transform) -> tuple[Rule, ...]:
  """Query, key and value in one matrix; `weight` or `bias` is appended to `source`."""
  paths = [f"{target}/{name}" for name in ("query", "key", "value")]
  rotations = (rotate, rotate, ())
  return (
    Rule(
      f"{source}weight",
      tuple(f"{path}/kernel" for path in paths),
      tuple((*rotation, DENSE) for rotation in rotations),
    ),
    Rule(f"{source}bias", tuple(f"{path}/bias" for path in paths), rotations),
  )


def _attention(source: str, target: str) -> tuple[Rule, ...]:
  return (
    *_fused(f"{source}.in_proj_", target),
    *dense(f"{source}.out_proj", f"{target}/out"),
  )


def _mlp(source: str, target: str, layers: int) -> tuple[Rule, ...]:
  return sum((dense(f"{source}.layers.{i}", f"{target}/fc{i + 1}") for i in range(layers)), ())


def _encoder_layer(source: str, target: str) -> tuple[Rule, ...]:
  return (
    *norm(f"{source}.norm1", f"{target}/norm1"),
    *_attention(f"{source}.self_attn", f"{target}/self_attn"),
    *norm(f"{source}.norm2", f"{target}/norm2"),
    *_attention(f"{source}.cross_attn_image", f"{target}/cross_attn"),
    *norm(f"{source}.norm3", f"{target}/norm3"),
    *dense(f"{source}.linear1", f"{target}/mlp/fc1"),
    *dense(f"{source}.linear2", f"{target}/mlp/fc2"),
  )


def _neck(source: str, target: str) -> tuple[Rule, ...]:
  return (
    *dense(f"{source}.0.dconv_2x2_0", f"{target}/level0/up1", kernel=DECONV),
    *dense(f"{source}.0.dconv_2x2_1", f"{target}/level0/up2", kernel=DECONV),
    *dense(f"{source}.0.conv_1x1", f"{target}/level0/project", kernel=CONV),
    *dense(f"{source}.0.conv_3x3", f"{target}/level0/smooth", kernel=CONV),
    *dense(f"{source}.1.dconv_2x2", f"{target}/level1/up1", kernel=DECONV),
    *dense(f"{source}.1.conv_1x1", f"{target}/level1/project", kernel=CONV),
    *dense(f"{source}.1.conv_3x3", f"{target}/level1/smooth", kernel=CONV),
    *dense(f"{source}.2.conv_1x1", f"{target}/level2/project", kernel=CONV),
    *dense(f"{source}.2.conv_3x3", f"{target}/level2/smooth", kernel=CONV),
  )


def _split_attention(source: str, target: str, *rotate: Transform) -> tuple[Rule, ...]:
  return (
    *dense(f"{source}.q_proj", f"{target}/query", *rotate),
    *dense(f"{source}.k_proj", f"{target}/key", *rotate),
    *dense(f"{source}.v_proj", f"{target}/value"),
    *dense(f"{source}.out_proj", f"{target}/out"),
  )


def _two_way_layer(source: str, target: str) -> tuple[Rule, ...]:
  return (
    *_split_attention(f"{source}.self_attn", f"{target}/self_attn"),
    *_split_attention(f"{source}.cross_attn_token_to_image", f"{target}/image_attn"),
    *_split_attention(f"{source}.cross_attn_image_to_token", f"{target}/token_attn"),
    *dense(f"{source}.mlp.lin1", f"{target}/mlp/fc1"),
    *dense(f"{source}.mlp.lin2", f"{target}/mlp/fc2"),
    *sum((norm(f"{source}.norm{i}", f"{target}/norm{i}") for i in range(1, 5)), ()),
  )


def _memory_layer(source: str, target: str) -> tuple[Rule, ...]:
  return (
    *norm(f"{source}.norm1", f"{target}/norm1"),
    *_split_attention(f"{source}.self_attn", f"{target}/self_attn", HalfSplit(heads=1)),
    *norm(f"{source}.norm2", f"{target}/norm2"),
    *_split_attention(f"{source}.cross_attn_image", f"{target}/cross_attn", HalfSplit(heads=1)),
    *norm(f"{source}.norm3", f"{target}/norm3"),
    *dense(f"{source}.linear1", f"{target}/mlp/fc1"),
    *dense(f"{source}.linear2", f"{target}/mlp/fc2"),
  )


def _mask_downsampler(source: str, target: str) -> tuple[Rule, ...]:
  """Convolution, norm and activation for each of four strides, then a projection."""
  rules: tuple[Rule, ...] = dense(f"{source}.12", f"{target}/project", kernel=CONV)
  for i in range(4):
    rules += dense(f"{source}.{3 * i}", f"{target}/conv{i + 1}", kernel=CONV)
    rules += norm(f"{source}.{3 * i + 1}", f"{target}/norm{i + 1}")
  return rules


def _fuser_block(source: str, target: str) -> tuple[Rule, ...]:
  return (
    *dense(f"{source}.dwconv", f"{target}/depthwise", kernel=CONV),
    *norm(f"{source}.norm", f"{target}/norm"),
    *dense(f"{source}.pwconv1", f"{target}/mlp/fc1"),
    *dense(f"{source}.pwconv2", f"{target}/mlp/fc2"),
    *rule(f"{source}.gamma", f"{target}/scale"),
  )


_TRUNK = "backbone.vision_backbone.trunk"
_BLOCK = f"{_TRUNK}.blocks.*"
_NECK = "backbone.vision_backbone.convs"
_TEXT = "backbone.language_backbone.encoder"
_TEXT_BLOCK = f"{_TEXT}.transformer.resblocks.*"
_GEOMETRY = "geometry_encoder"
_DECODER = "transformer.decoder"
_DECODER_LAYER = f"{_DECODER}.layers.*"
_MASKS = "segmentation_head"
_VISUAL_NECK = "detector.backbone.vision_backbone.sam2_convs"
_PROMPT = "tracker.sam_prompt_encoder"
_MASK_DECODER = "tracker.sam_mask_decoder"
_TWO_WAY = f"{_MASK_DECODER}.transformer"
_MEMORY_ATTENTION = "tracker.transformer.encoder"
_MEMORY_ENCODER = "tracker.maskmem_backbone"

TABLE = Table(
  name="meta",
  prefix="detector.",
  canonical=canonical,
  rules=(
    *rule(f"{_TRUNK}.pos_embed", "trunk/position", Grid(), skip=1),  # row 0 is a class token's
    *rule(f"{_TRUNK}.patch_embed.proj.weight", "trunk/patch_embed/kernel", CONV),
    *norm(f"{_TRUNK}.ln_pre", "trunk/norm_pre"),
    *norm(f"{_BLOCK}.norm1", "trunk/blocks/*/norm1"),
    *_fused(f"{_BLOCK}.attn.qkv.", "trunk/blocks/*/attn", HalfSplit()),
    *dense(f"{_BLOCK}.attn.proj", "trunk/blocks/*/attn/out"),
    *norm(f"{_BLOCK}.norm2", "trunk/blocks/*/norm2"),
    *dense(f"{_BLOCK}.mlp.fc1", "trunk/blocks/*/mlp/fc1"),
    *dense(f"{_BLOCK}.mlp.fc2", "trunk/blocks/*/mlp/fc2"),
    *_neck(_NECK, "neck"),
    *rule(f"{_TEXT}.token_embedding.weight", "text/token_embedding/embedding"),
    *rule(f"{_TEXT}.positional_embedding", "text/position"),
    *norm(f"{_TEXT_BLOCK}.ln_1", "text/blocks/*/norm1"),
    *_attention(f"{_TEXT_BLOCK}.attn", "text/blocks/*/attn"),
    *norm(f"{_TEXT_BLOCK}.ln_2", "text/blocks/*/norm2"),
    *dense(f"{_TEXT_BLOCK}.mlp.c_fc", "text/blocks/*/mlp/fc1"),
    *dense(f"{_TEXT_BLOCK}.mlp.c_proj", "text/blocks/*/mlp/fc2"),
    *norm(f"{_TEXT}.ln_final", "text/norm_final"),
    *dense("backbone.language_backbone.resizer", "text/project"),
    *common.geometry(_GEOMETRY),
    *dense(f"{_GEOMETRY}.points_direct_project", "geometry/point_project"),
    *dense(f"{_GEOMETRY}.points_pool_project", "geometry/point_pool_project"),
    *dense(f"{_GEOMETRY}.points_pos_enc_project", "geometry/point_position_project"),
    *norm(f"{_GEOMETRY}.norm", "geometry/norm"),
    *norm(f"{_GEOMETRY}.img_pre_norm", "geometry/image_norm"),
    *norm(f"{_GEOMETRY}.encode_norm", "geometry/norm_final"),
    *_encoder_layer(f"{_GEOMETRY}.encode.*", "geometry/layers/*"),
    *_encoder_layer("transformer.encoder.layers.*", "fusion/layers/*"),
    *_attention(f"{_DECODER_LAYER}.self_attn", "decoder/layers/*/self_attn"),
    *norm(f"{_DECODER_LAYER}.norm2", "decoder/layers/*/norm_self"),  # Meta numbers them oddly
    *_attention(f"{_DECODER_LAYER}.ca_text", "decoder/layers/*/text_attn"),
    *norm(f"{_DECODER_LAYER}.catext_norm", "decoder/layers/*/norm_text"),
    *_attention(f"{_DECODER_LAYER}.cross_attn", "decoder/layers/*/image_attn"),
    *norm(f"{_DECODER_LAYER}.norm1", "decoder/layers/*/norm_image"),
    *dense(f"{_DECODER_LAYER}.linear1", "decoder/layers/*/mlp/fc1"),
    *dense(f"{_DECODER_LAYER}.linear2", "decoder/layers/*/mlp/fc2"),
    *norm(f"{_DECODER_LAYER}.norm3", "decoder/layers/*/norm_mlp"),
    *norm(f"{_DECODER}.norm", "decoder/norm"),
    *norm(f"{_DECODER}.presence_token_out_norm", "decoder/presence_norm"),
    *common.queries(_DECODER),
    *_mlp(f"{_DECODER}.bbox_embed", "decoder/box_head", 3),
    *_mlp(f"{_DECODER}.ref_point_head", "decoder/query_position", 2),
    *_mlp(f"{_DECODER}.presence_token_head", "decoder/presence_head", 3),
    *_mlp(f"{_DECODER}.boxRPB_embed_x", "decoder/box_bias/x", 2),
    *_mlp(f"{_DECODER}.boxRPB_embed_y", "decoder/box_bias/y", 2),
    *_mlp("dot_prod_scoring.prompt_mlp", "scoring/prompt_mlp", 2),
    *norm("dot_prod_scoring.prompt_mlp.out_norm", "scoring/prompt_norm"),
    *dense("dot_prod_scoring.prompt_proj", "scoring/prompt_project"),
    *dense("dot_prod_scoring.hs_proj", "scoring/query_project"),
    *norm(f"{_MASKS}.cross_attn_norm", "masks/prompt_norm"),
    *_attention(f"{_MASKS}.cross_attend_prompt", "masks/prompt_attn"),
    *common.pixel_decoder(f"{_MASKS}.pixel_decoder"),
    *dense(f"{_MASKS}.instance_seg_head", "masks/instance_project", kernel=CONV),
    *dense(f"{_MASKS}.semantic_seg_head", "masks/semantic_project", kernel=CONV),
    *_mlp(f"{_MASKS}.mask_predictor.mask_embed", "masks/mask_embed", 3),
  ),
  unread={
    r"detector\.backbone\.vision_backbone\.(sam2_)?convs\.3\..*": "half-resolution level: unused",
    r"detector\.backbone\.vision_backbone\.sam2_convs\..*": "neck of visual prompts, no head",
    r"detector\.backbone\.language_backbone\.encoder\.text_projection": "computed, unused",
    r"detector\.segmentation_head\.pixel_decoder\.(conv_layers|norms)\.2\..*": "third pair, unused",
    r"tracker\.no_mem_pos_enc": "code that is never reached: unused",
    r"tracker\..*": "video",
  },
  dropped={
    r"detector\.backbone\.vision_backbone\.trunk\.blocks\.\d+\.attn\.freqs_cis": "recomputed",
  },
  visual_rules=(
    *_neck(_VISUAL_NECK, "visual/neck"),
    *rule("tracker.no_mem_embed", "visual/no_memory"),
    *common.mask_tokens(_MASK_DECODER),
    *rule(f"{_PROMPT}.pe_layer.positional_encoding_gaussian_matrix", "visual/prompt/frequencies"),
    *rule(f"{_PROMPT}.point_embeddings.*.weight", "visual/prompt/label_embedding/*", Squeeze((0,))),
    *common.prompt_tokens(_PROMPT),
    *dense(f"{_PROMPT}.mask_downscaling.0", "visual/prompt/mask/conv1", kernel=CONV),
    *norm(f"{_PROMPT}.mask_downscaling.1", "visual/prompt/mask/norm1"),
    *dense(f"{_PROMPT}.mask_downscaling.3", "visual/prompt/mask/conv2", kernel=CONV),
    *norm(f"{_PROMPT}.mask_downscaling.4", "visual/prompt/mask/norm2"),
    *dense(f"{_PROMPT}.mask_downscaling.6", "visual/prompt/mask/project", kernel=CONV),
    *_two_way_layer(f"{_TWO_WAY}.layers.0", "visual/decoder/two_way/layer0"),
    *_two_way_layer(f"{_TWO_WAY}.layers.1", "visual/decoder/two_way/layer1"),
    *_split_attention(f"{_TWO_WAY}.final_attn_token_to_image", "visual/decoder/two_way/final_attn"),
    *norm(f"{_TWO_WAY}.norm_final_attn", "visual/decoder/two_way/norm_final"),
    *dense(f"{_MASK_DECODER}.output_upscaling.0", "visual/decoder/up1", kernel=DECONV),
    *norm(f"{_MASK_DECODER}.output_upscaling.1", "visual/decoder/up_norm"),
    *dense(f"{_MASK_DECODER}.output_upscaling.3", "visual/decoder/up2", kernel=DECONV),
    *_mlp(f"{_MASK_DECODER}.output_hypernetworks_mlps.*", "visual/decoder/mask_mlp/*", 3),
    *_mlp(f"{_MASK_DECODER}.iou_prediction_head", "visual/decoder/iou_head", 3),
    *_mlp(f"{_MASK_DECODER}.pred_obj_score_head", "visual/decoder/object_head", 3),
  ),
  visual_parts=("tracker.sam_mask_decoder.", f"{_VISUAL_NECK}."),
  video_rules=(
    *rule("tracker.maskmem_tpos_enc", "video/memory_codes", Squeeze((1, 2))),
    *rule("tracker.no_obj_ptr", "video/no_object_pointer", Squeeze((0,))),
    *rule("tracker.no_obj_embed_spatial", "video/no_object_memory", Squeeze((0,))),
    *_mlp("tracker.obj_ptr_proj", "video/pointer_mlp", 3),
    *dense("tracker.obj_ptr_tpos_proj", "video/pointer_time"),
    *dense("tracker.mask_downsample", "video/mask_downsample", kernel=CONV),
    *_memory_layer(f"{_MEMORY_ATTENTION}.layers.*", "video/memory_attention/layers/*"),
    *norm(f"{_MEMORY_ATTENTION}.norm", "video/memory_attention/norm_final"),
    *_mask_downsampler(f"{_MEMORY_ENCODER}.mask_downsampler.encoder", "video/memory_encoder/mask"),
    *dense(f"{_MEMORY_ENCODER}.pix_feat_proj", "video/memory_encoder/image_project", kernel=CONV),
    *_fuser_block(f"{_MEMORY_ENCODER}.fuser.layers.*", "video/memory_encoder/blocks/*"),
    *dense(f"{_MEMORY_ENCODER}.out_proj", "video/memory_encoder/project", kernel=CONV),
  ),
  video_parts=(f"{_MEMORY_ATTENTION}.layers.", f"{_MEMORY_ENCODER}."),
  unread_shapes=functools.partial(unread.unread_shapes, "meta"),
  derived=_derived,
)

# sam3.1_multiplex.pt: the detector has the tensors of SAM 3's (`Sam3Image`), except for the neck's
# half-resolution level and two more necks; the tracker is another model. Sources:
# facebookresearch/sam3 (issues 506 and 526), ultralytics (pull request 26144), and comparisons of
# both files by names and shapes. The file itself was not available for a test.
MULTIPLEX = dataclasses.replace(
  TABLE,
  name="meta, SAM 3.1",
  unread={
    r"detector\.backbone\.vision_backbone\.interactive_convs\..*": "neck of visual prompts",
    r"detector\.backbone\.vision_backbone\.propagation_convs\..*": "neck of video",
    r"detector\.backbone\.language_backbone\.encoder\.text_projection": "computed, unused",
    r"detector\.segmentation_head\.pixel_decoder\.(conv_layers|norms)\.2\..*": "third pair, unused",
    r"tracker\.model\..*": "visual prompts and video of SAM 3.1, which tracks objects together",
  },
  unread_shapes=unread.multiplex_shapes,
  visual_rules=(),
  video_rules=(),
)
