"""The tiny model as a KerasHub preset, written without the converters.

Names follow from Hugging Face's by the rules of `keras_hub.src.utils.transformers.convert_sam3`;
a preset that KerasHub 0.32 made of the same weights has bit-equal datasets.
"""

import json
import pathlib
import re

import h5py
import numpy as np
from golden_model import CONFIG
from layouts import layout

RENAMED = (
  (r"^text_encoder\.text_model\.embeddings\.(\w+)\.weight", r"text_encoder/embedding/\1/0"),
  (r"^text_encoder\.text_model\.encoder\.layers", "text_encoder/encoder_layers/clip_encoder_layer"),
  (r"^text_encoder\.text_model\.final_layer_norm", "text_encoder/layer_norm"),
  (r"(clip_encoder_layer\.\d+)\.layer_norm(\d)", r"\1/layer_norm_\2"),
  (r"(clip_encoder_layer\.\d+)\.mlp\.fc(\d)", r"\1/dense_\2"),
  (r"^text_projection", "dense"),
  (r"embeddings\.position_embeddings", "embeddings/1"),
  (r"^vision_encoder\.backbone\.layers", "vision_encoder/backbone/layers/sam3_vi_t_layer"),
  (r"^vision_encoder\.neck\.fpn_layers", "vision_encoder/vision_neck/fpn_layers/sam3fpn_layer"),
  (r"scale_layers\.0", "scale_layers/conv2d_transpose"),
  (r"scale_layers\.2", "scale_layers/conv2d_transpose_1"),
  (r"^(geometry_encoder|detr_encoder|detr_decoder)\.layers", r"\1/layers/sam3_\1_layer"),
  (r"pixel_decoder\.conv_layers", "pixel_decoder/conv_layers/conv2d"),
  (r"pixel_decoder\.norms", "pixel_decoder/norms/group_normalization"),
  (r"mask_embedder\.layers", "mask_embedder/layers/dense"),
  (r"^(?!dense)", "sam3_"),
)
ABSENT = ("text_encoder.text_projection", "pixel_decoder.conv_layers.2", "pixel_decoder.norms.2")
TEXT_ATTENTION = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "output"}


def name_of(name: str) -> str:
  """The dataset for Hugging Face's name of a tensor."""
  leaf = name.rpartition(".")[2]
  for pattern, replacement in RENAMED:
    name = re.sub(pattern, replacement, name)
  if "clip_encoder_layer" in name:
    for theirs, ours in TEXT_ATTENTION.items():
      name = name.replace(f"self_attn.{theirs}", f"attention/{ours}_dense")
  # The first of several layers of a class has no number.
  name = re.sub(r"(layer|conv2d|normalization|dense)\.0(?=[./])", r"\1", name)
  name = re.sub(r"(layer|conv2d|normalization|dense)\.(\d+)(?=[./])", r"\1_\2", name)
  if leaf in ("weight", "bias"):
    name = re.sub(r"[./](weight|bias)$", lambda m: f"/{'01'[m[1] == 'bias']}", name)
  path, _, number = name.replace(".", "/").rpartition("/")
  return f"layers/{path}/vars/{number}"


def value_of(name: str, array: np.ndarray) -> np.ndarray:
  """The tensor in Keras's memory layout."""
  heads = CONFIG.text.heads
  if "text_model" in name and "self_attn" in name:
    if name.endswith("out_proj.weight"):
      return array.T.reshape(heads, -1, len(array))
    if not name.endswith("out_proj.bias"):
      shape = (heads, -1)
      return array.T.reshape(len(array.T), *shape) if array.ndim == 2 else array.reshape(shape)
  if array.ndim == 4:
    return array.transpose(2, 3, 1, 0)
  tables = ("embed.weight", "embedding.weight", "reference_points.weight", "presence_token.weight")
  return array if array.ndim != 2 or name.endswith(tables) else array.T


def datasets() -> dict[str, np.ndarray]:
  """All variables of the preset, including those that Keras computes."""
  found = {
    name_of(name): np.ascontiguousarray(value_of(name, array))
    for name, array in layout("detector").items()
    if not any(part in name for part in ABSENT)
  }
  embeddings = "layers/sam3_vision_encoder/backbone/embeddings/vars"
  table = found[f"{embeddings}/1"].reshape(4, 4, -1)
  found[f"{embeddings}/0"] = np.tile(table, (3, 3, 1)).reshape(1, 144, -1)
  frequencies = 1 / 10000 ** (np.arange(0, 16, 4) / 16)
  for block, (side, scale) in enumerate([(4, 1), (12, 1 / 3)] * 2):
    index = np.arange(side * side)
    angles = [np.outer(axis * scale, frequencies) for axis in (index % side, index // side)]
    angles = np.repeat(np.concatenate(angles, axis=-1).astype(np.float32), 2, axis=-1)
    suffix = f"_{block}" if block else ""
    path = f"layers/sam3_vision_encoder/backbone/layers/sam3_vi_t_layer{suffix}/rotary_emb/vars"
    found |= {f"{path}/0": np.cos(angles), f"{path}/1": np.sin(angles)}
  return found


def write_file(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> pathlib.Path:
  with h5py.File(path, "w") as file:
    for name, array in arrays.items():
      file[name] = array
      if array.dtype.name == "bfloat16":
        file[name].attrs["dtype"] = "bfloat16"
  return path


def write_preset(folder: pathlib.Path, arrays=None, shards=1, config=None) -> pathlib.Path:
  """Writes a preset without vocabulary; returns its directory."""
  arrays = datasets() if arrays is None else arrays
  folder.mkdir()
  (folder / "config.json").write_text(json.dumps(config or preset_config()))
  if shards == 1:
    write_file(folder / "model.weights.h5", arrays)
    return folder
  names = sorted(arrays)
  shard_of = {}
  for shard in range(shards):
    chosen = names[shard::shards]
    write_file(folder / f"model_{shard:05}.weights.h5", {name: arrays[name] for name in chosen})
    for name in chosen:
      shard_of.setdefault("/" + name.rpartition("/")[0], []).append(f"model_{shard:05}.weights.h5")
  (folder / "model.weights.json").write_text(json.dumps({"metadata": {}, "weight_map": shard_of}))
  return folder


def preset_config() -> dict:
  """The values of KerasHub's config.json that the converter reads."""
  trunk, text = CONFIG.trunk, CONFIG.text
  side = CONFIG.image_size
  attending = {
    "hidden_dim": CONFIG.width,
    "intermediate_dim": CONFIG.mlp_width,
    "num_heads": CONFIG.heads,
    "hidden_activation": "relu",
    "layer_norm_epsilon": 1e-06,
  }
  parts = {
    "vision_encoder": {
      "image_shape": [side, side, 3],
      "patch_size": CONFIG.patch,
      "num_layers": 4,
      "hidden_dim": trunk.width,
      "intermediate_dim": trunk.mlp_width,
      "num_heads": trunk.heads,
      "fpn_hidden_dim": CONFIG.width,
      "fpn_scale_factors": [4.0, 2.0, 1.0, 0.5],
      "pretrain_image_shape": [56, 56, 3],
      "hidden_activation": "gelu",
      "rope_theta": 10000.0,
      "window_size": trunk.window,
      "global_attn_indexes": [1, 3],
    },
    "text_encoder": {
      "vocabulary_size": text.vocabulary,
      "hidden_dim": text.width,
      "num_layers": text.layers,
      "num_heads": text.heads,
      "intermediate_dim": text.mlp_width,
      "intermediate_activation": "gelu",
      "max_sequence_length": text.context,
    },
    "geometry_encoder": {"num_layers": CONFIG.geometry_layers, "roi_size": 7, **attending},
    "detr_encoder": {"num_layers": CONFIG.fusion_layers, **attending},
    "detr_decoder": {
      "num_layers": CONFIG.decoder_layers,
      "num_queries": CONFIG.queries,
      **attending,
    },
    "mask_decoder": {
      "num_upsampling_stages": 3,
      "hidden_dim": CONFIG.width,
      "num_heads": CONFIG.heads,
    },
  }
  return {
    "class_name": "SAM3PromptableConceptBackbone",
    "config": {part: {"config": values} for part, values in parts.items()},
  }
