"""Converts the config.json of a KerasHub preset of SAM 3 to our configuration."""

from collections.abc import Mapping
from typing import Any

from sam3_jax.config import Config, TextConfig, TrunkConfig
from sam3_jax.utils.json_text import shown

from .config_reader import ConfigReader

CLASS = "SAM3PromptableConceptBackbone"
_AGAIN = "download the preset again."
# The only values that our code supports.
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


class _Reader(ConfigReader):
  """A preset has all values."""

  def get(self, path: str, like: Any) -> Any:
    """As in the base class; `like` may also be a type."""
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
    """The side of a square image [side, side, channels]."""
    shape = self.get(path, list)
    square = len(shape) == 3 and shape[0] == shape[1] and type(shape[0]) is int
    if not square or shape[0] < 1:
      raise ValueError(f"{self.where} has {path} = {shown(shape)}; expected a square image.")
    return shape[0]


def read_config(values: Mapping[str, Any], where: str) -> Config:
  """Returns our configuration for a preset's config.json.

  Raises:
    ValueError: it is of another model, lacks a value, or asks for something unsupported.
  """
  kind = values.get("class_name") if isinstance(values, Mapping) else None
  if kind != CLASS:
    raise ValueError(
      f"{where} has class_name {shown(kind)}; expected {CLASS}, as in KerasHub's preset of SAM 3."
    )
  reader = _Reader(values, where)
  get, same = reader.get, reader.same
  reader.require(_FIXED)
  text, attending = "text_encoder", ("geometry_encoder", "detr_encoder", "detr_decoder")
  return reader.make(
    Config,
    trunk=_read_trunk(reader),
    text=reader.make(
      TextConfig,
      width=get(f"{text}.hidden_dim", int),
      heads=get(f"{text}.num_heads", int),
      mlp_width=get(f"{text}.intermediate_dim", int),
      layers=get(f"{text}.num_layers", int),
      context=get(f"{text}.max_sequence_length", int),
      vocabulary=get(f"{text}.vocabulary_size", int),
    ),
    image_size=reader.side("vision_encoder.image_shape"),
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


def _read_trunk(reader: _Reader) -> TrunkConfig:
  get, vision = reader.get, "vision_encoder"
  blocks, ends = get(f"{vision}.num_layers", int), get(f"{vision}.global_attn_indexes", list)
  side = reader.side(f"{vision}.pretrain_image_shape")
  return reader.make(
    TrunkConfig,
    width=get(f"{vision}.hidden_dim", int),
    heads=get(f"{vision}.num_heads", int),
    mlp_width=get(f"{vision}.intermediate_dim", int),
    **reader.groups(blocks, ends),
    window=get(f"{vision}.window_size", int),
    pretrain_grid=side // get(f"{vision}.patch_size", int),
  )
