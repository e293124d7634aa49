"""Converts Hugging Face's config.json of SAM 3 to our configuration, and back."""

from collections.abc import Mapping
from typing import Any

from sam3_jax.config import Config, LiteTextConfig, TextConfig, TrunkConfig, VideoConfig
from sam3_jax.utils.json_text import shown

from .config_reader import ConfigReader
from .unread import PROJECTION

# The only values that our code supports. layer_norm_eps is not checked: it differs from the 1e-5 of
# Meta's code, with which the weights were trained and which we use.
_FIXED = {
  "vision_config.backbone_config.hidden_act": "gelu",
  "vision_config.backbone_config.num_channels": 3,
  "vision_config.backbone_config.layer_scale_init_value": None,
  "vision_config.backbone_config.rope_parameters.rope_theta": 10000.0,
  "vision_config.scale_factors": [4.0, 2.0, 1.0, 0.5],
  "text_config.hidden_act": "gelu",
  "geometry_encoder_config.hidden_act": "relu",
  "geometry_encoder_config.roi_size": 7,
  "detr_encoder_config.hidden_act": "relu",
  "detr_decoder_config.hidden_act": "relu",
  "mask_decoder_config.num_upsampling_stages": 3,
}
_BACKBONE = "vision_config.backbone_config"
_LITE = "sam3_lite_text"
_MODEL_TYPES = ("sam3", "sam3_video", _LITE)


class _Reader(ConfigReader):
  """Missing values are those of the released model."""

  def get(self, path: str, like: Any) -> Any:
    node: Any = self.values
    keys = path.split(".")
    for depth, key in enumerate(keys):
      if not isinstance(node, Mapping):
        parent = ".".join(keys[:depth]) or "detector_config"
        raise ValueError(f"{self.where} has {parent} = {shown(node)}; expected an object.")
      if key not in node:
        return like
      node = node[key]
    numeric = type(like) is float and type(node) is int
    if like is not None and type(node) is not type(like) and not numeric:
      raise ValueError(
        f"{self.where} has {path} = {shown(node)}; expected something like {like!r}."
      )
    if type(like) is int and like > 0 and node < 1:
      raise ValueError(f"{self.where} has {path} = {shown(node)}; expected at least 1.")
    return node


def read_config(values: Mapping[str, Any], where: str) -> Config:
  """Returns our configuration; values missing from config.json are those of the released model.

  Raises:
    ValueError: it is of another model, contradicts itself, or asks for something unsupported.
  """
  kind = values.get("model_type") if isinstance(values, Mapping) else None
  if kind not in _MODEL_TYPES:
    raise ValueError(
      f"{where} has model_type {shown(kind)}; expected one of {', '.join(_MODEL_TYPES)}: the "
      "config.json of facebook/sam3, of a Sam3Model or of a Sam3LiteTextModel."
    )
  reader = _Reader(values.get("detector_config", values), where)
  get, same = reader.get, reader.same
  reader.require(_FIXED)
  attending = "geometry_encoder_config", "detr_encoder_config", "detr_decoder_config"
  return reader.make(
    Config,
    trunk=_read_trunk(reader),
    text=_read_lite_text(reader) if kind == _LITE else _read_text(reader),
    image_size=get(f"{_BACKBONE}.image_size", 1008),
    patch=get(f"{_BACKBONE}.patch_size", 14),
    width=same("hidden_size", 256, *attending, "mask_decoder_config"),
    heads=same("num_attention_heads", 8, *attending),
    mlp_width=same("intermediate_size", 2048, *attending),
    geometry_layers=get("geometry_encoder_config.num_layers", 3),
    fusion_layers=get("detr_encoder_config.num_layers", 6),
    decoder_layers=get("detr_decoder_config.num_layers", 6),
    queries=get("detr_decoder_config.num_queries", 200),
    concept_points=False,
    dropout=float(same("dropout", 0.1, *attending)),
  )


def _read_trunk(reader: _Reader) -> TrunkConfig:
  get = reader.get
  blocks = get(f"{_BACKBONE}.num_hidden_layers", 32)
  ends = get(f"{_BACKBONE}.global_attn_indexes", [7, 15, 23, 31])
  return reader.make(
    TrunkConfig,
    width=get(f"{_BACKBONE}.hidden_size", 1024),
    heads=get(f"{_BACKBONE}.num_attention_heads", 16),
    mlp_width=get(f"{_BACKBONE}.intermediate_size", 4736),
    **reader.groups(blocks, ends),
    window=get(f"{_BACKBONE}.window_size", 24),
    pretrain_grid=get(f"{_BACKBONE}.pretrain_image_size", 336)
    // get(f"{_BACKBONE}.patch_size", 14),
  )


def _read_text(reader: _Reader) -> TextConfig:
  get = reader.get
  return reader.make(
    TextConfig,
    width=get("text_config.hidden_size", 1024),
    heads=get("text_config.num_attention_heads", 16),
    mlp_width=get("text_config.intermediate_size", 4096),
    layers=get("text_config.num_hidden_layers", 24),
    context=get("text_config.max_position_embeddings", 32),
    vocabulary=get("text_config.vocab_size", 49408),
  )


def _read_lite_text(reader: _Reader) -> LiteTextConfig:
  get = reader.get
  mixers = get("text_config.use_repmixer_blocks", True)
  return reader.make(
    LiteTextConfig,
    width=get("text_config.hidden_size", 512),
    heads=get("text_config.num_attention_heads", 8),
    mlp_width=get("text_config.intermediate_size", 2048),
    layers=get("text_config.num_hidden_layers", 12) - 2 * mixers,
    mixers=mixers,
    kernel=get("text_config.repmixer_kernel_size", 11),
    context=get("text_config.max_position_embeddings", 77),
    vocabulary=get("text_config.vocab_size", 49408),
  )


def write_config(config: Config, memory_layers: int) -> dict[str, Any]:
  """Returns the contents of config.json; missing values are transformers' defaults.

  Args:
    config: our configuration.
    memory_layers: of the tracker; 0 for a file without tracker, that of a Sam3Model.
  """
  detector = _detector(config)
  if isinstance(config.text, LiteTextConfig):
    return {"architectures": ["Sam3LiteTextModel"], **detector}
  if not memory_layers:
    return {"architectures": ["Sam3Model"], **detector}
  return {
    "architectures": ["Sam3VideoModel"],
    "model_type": "sam3_video",
    "low_res_mask_size": config.mask_size,
    "detector_config": detector,
    "tracker_config": _tracker(config, memory_layers),
  }


def _detector(config: Config) -> dict[str, Any]:
  kind = _LITE if isinstance(config.text, LiteTextConfig) else "sam3"
  attending = {
    "hidden_size": config.width,
    "num_attention_heads": config.heads,
    "intermediate_size": config.mlp_width,
    "hidden_act": "relu",
    "dropout": config.dropout,
  }
  return {
    "model_type": kind,
    "vision_config": _vision(config),
    "text_config": _text_values(config.text),
    "geometry_encoder_config": {
      "model_type": f"{kind}_geometry_encoder",
      **attending,
      "num_layers": config.geometry_layers,
      "roi_size": 7,
    },
    "detr_encoder_config": {
      "model_type": f"{kind}_detr_encoder",
      **attending,
      "num_layers": config.fusion_layers,
    },
    "detr_decoder_config": {
      "model_type": f"{kind}_detr_decoder",
      **attending,
      "num_layers": config.decoder_layers,
      "num_queries": config.queries,
    },
    "mask_decoder_config": {
      "model_type": f"{kind}_mask_decoder",
      "hidden_size": config.width,
      "num_attention_heads": config.heads,
      "num_upsampling_stages": 3,
    },
  }


def _text_values(text: TextConfig | LiteTextConfig) -> dict[str, Any]:
  common = {
    "hidden_size": text.width,
    "num_attention_heads": text.heads,
    "intermediate_size": text.mlp_width,
    "max_position_embeddings": text.context,
    "vocab_size": text.vocabulary,
    "hidden_act": "gelu",
  }
  if isinstance(text, LiteTextConfig):
    return {
      "model_type": f"{_LITE}_text_model",
      **common,
      "num_hidden_layers": text.layers + 2 * text.mixers,
      "use_repmixer_blocks": text.mixers,
      "repmixer_kernel_size": text.kernel,
      "projection_dim": text.width,
    }
  return {
    "model_type": "clip_text_model",
    **common,
    "num_hidden_layers": text.layers,
    "projection_dim": PROJECTION,
    "bos_token_id": text.vocabulary - 2,
    "eos_token_id": text.vocabulary - 1,
  }


def _vision(config: Config) -> dict[str, Any]:
  trunk = config.trunk
  group = trunk.windowed + 1
  return {
    "model_type": "sam3_vision_model",
    "backbone_config": {
      "model_type": "sam3_vit_model",
      "hidden_size": trunk.width,
      "num_attention_heads": trunk.heads,
      "intermediate_size": trunk.mlp_width,
      "num_hidden_layers": trunk.blocks,
      "global_attn_indexes": list(range(group - 1, trunk.blocks, group)),
      "window_size": trunk.window,
      "image_size": config.image_size,
      "patch_size": config.patch,
      "pretrain_image_size": trunk.pretrain_grid * config.patch,
      "num_channels": 3,
      "hidden_act": "gelu",
      "rope_parameters": {"rope_theta": 10000.0, "rope_type": "axial"},
    },
    "backbone_feature_sizes": [[scale * config.grid] * 2 for scale in (4, 2, 1)],
    "fpn_hidden_size": config.width,
    "scale_factors": [4.0, 2.0, 1.0, 0.5],
  }


def _tracker(config: Config, memory_layers: int) -> dict[str, Any]:
  video = config.video or VideoConfig(mlp_width=config.mlp_width)
  return {
    "model_type": "sam3_tracker_video",
    "image_size": config.image_size,
    "vision_config": _vision(config),
    "prompt_encoder_config": {
      "model_type": "sam3_tracker_video_prompt_encoder",
      "hidden_size": config.width,
      "image_size": config.image_size,
      "patch_size": config.patch,
    },
    "mask_decoder_config": {
      "model_type": "sam3_tracker_video_mask_decoder",
      "hidden_size": config.width,
    },
    "memory_attention_hidden_size": config.width,
    "memory_attention_feed_forward_hidden_size": video.mlp_width,
    "memory_attention_num_layers": memory_layers,
    "memory_attention_rope_feat_sizes": [config.grid] * 2,
    "memory_encoder_hidden_size": config.width,
    "memory_encoder_output_channels": video.memory_channels,
    "mask_downsampler_embed_dim": config.width,
    "memory_fuser_embed_dim": config.width,
    "memory_fuser_intermediate_dim": 4 * config.width,
  }
