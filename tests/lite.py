"""The tiny model with a LiteText encoder, as transformers writes it.

Names and shapes are those of `Sam3LiteTextModel.state_dict()`.
"""

import dataclasses
import pathlib

import numpy as np
from golden_model import CONFIG
from layouts import layout, tiny_config, write_folder
from weights import weights

from sam3_jax.config import Config, LiteTextConfig

SIZES = {"width": 32, "heads": 2, "mlp_width": 128, "context": 16}
NORMS = (
  "token_mixer.reference_batchnorm",
  "token_mixer.mixer.batchnorm_skip",
  "token_mixer.mixer.batchnorm_conv",
  "conv_feed_forward.depthwise_batchnorm",
)


def config(mixers: bool) -> Config:
  """The tiny model's configuration, with three text layers in transformers' count."""
  text = LiteTextConfig(layers=1 if mixers else 3, mixers=mixers, **SIZES)
  return dataclasses.replace(CONFIG, text=text, concept_points=False)


def huggingface_config(mixers: bool) -> dict:
  """The contents of config.json."""
  kind, parts = "sam3_lite_text", tiny_config()["detector_config"]
  text = {
    "model_type": f"{kind}_text_model",
    "hidden_size": 32,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "max_position_embeddings": 16,
    "vocab_size": 49408,
    "projection_dim": 32,
    "use_repmixer_blocks": mixers,
  }
  settings = {name: {**part} for name, part in parts.items() if name.endswith("_config")}
  for name in ("geometry_encoder", "detr_encoder", "detr_decoder", "mask_decoder"):
    settings[f"{name}_config"]["model_type"] = f"{kind}_{name}"
  return settings | {"model_type": kind, "text_config": text}


def text_weights(mixers: bool) -> dict[str, np.ndarray]:
  """The text encoder's tensors, without the prefix `text_encoder.`."""
  arrays = {
    "embeddings.token_embedding.weight": (49408, 32),
    "embeddings.position_embedding.position_embedding": (1, 1, 16, 32),
    "final_layer_norm.weight": (32,),
    "final_layer_norm.bias": (32,),
    "projection.weight": (32, 32),
  }
  for layer in range(3):
    tensors = _mixer() if mixers and layer != 1 else _block()
    arrays |= {f"layers.{layer}.{name}": shape for name, shape in tensors.items()}
  return {name: _random(name, shape) for name, shape in arrays.items()}


def all_weights(mixers: bool) -> dict[str, np.ndarray]:
  """All tensors under the names of `Sam3LiteTextModel.save_pretrained`."""
  rest = {n: x for n, x in layout("detector").items() if not n.startswith("text_encoder.")}
  return rest | {f"text_encoder.{name}": x for name, x in text_weights(mixers).items()}


def write(folder: pathlib.Path, mixers: bool) -> pathlib.Path:
  """Writes a directory as transformers does, without vocabulary; returns it."""
  return write_folder(folder, all_weights(mixers), config=huggingface_config(mixers))


def phrases() -> np.ndarray:
  """Token ids of three phrases; the last has no padding."""
  rows = np.zeros((3, 16), np.int32)
  for row, length in zip(rows, (3, 7, 16), strict=True):
    row[:length] = [49406, *range(500 + length, 500 + 1000 * length, 1000)][:length]
    row[length - 1] = 49407
  return rows


def _block() -> dict[str, tuple[int, ...]]:
  dense = {f"self_attn.{part}_proj": (32, 32) for part in ("q", "k", "v", "out")}
  dense |= {"mlp.fc1": (128, 32), "mlp.fc2": (32, 128)}
  norms = {f"layer_norm{i}.{leaf}": (32,) for i in (1, 2) for leaf in ("weight", "bias")}
  biases = {f"{name}.bias": shape[:1] for name, shape in dense.items()}
  return norms | biases | {f"{name}.weight": shape for name, shape in dense.items()}


def _mixer() -> dict[str, tuple[int, ...]]:
  shapes: dict[str, tuple[int, ...]] = {
    "layer_scale": (32, 1, 1),
    "token_mixer.layer_scale": (32, 1, 1),
    "token_mixer.mixer.conv.weight": (32, 1, 1, 11),
    "conv_feed_forward.depthwise_conv.weight": (32, 1, 1, 11),
    "conv_feed_forward.mlp.fc1.weight": (128, 32, 1, 1),
    "conv_feed_forward.mlp.fc1.bias": (128,),
    "conv_feed_forward.mlp.fc2.weight": (32, 128, 1, 1),
    "conv_feed_forward.mlp.fc2.bias": (32,),
  }
  for norm in NORMS:
    leaves = ("weight", "bias", "running_mean", "running_var")
    shapes |= {f"{norm}.{leaf}": (32,) for leaf in leaves} | {f"{norm}.num_batches_tracked": ()}
  return shapes


def _random(name: str, shape: tuple[int, ...]) -> np.ndarray:
  if not shape:
    return np.asarray(len(name) + 2**40)
  values = weights(f"text_encoder.{name}", shape)
  return np.exp(values) if name.endswith("running_var") else values
