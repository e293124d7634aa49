"""The tiny model of the goldens: configuration, seeded weights, and its parameters put together by
hand, so that the converters have an independent oracle.

`benchmarks/weights.py` makes each tensor from its name and shape in Meta's layout; the goldens are
the outputs of Meta's code on those.
"""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from weights import weights

from sam3_jax.config import Config, TextConfig, TrunkConfig, VideoConfig

GOLDENS = pathlib.Path(__file__).parent / "goldens"
CONFIG = Config(
  trunk=TrunkConfig(
    width=64, heads=4, mlp_width=296, groups=2, windowed=1, window=4, pretrain_grid=4
  ),
  text=TextConfig(width=32, heads=2, mlp_width=128, layers=2),
  image_size=168,
  width=128,
  mlp_width=256,
  geometry_layers=2,
  fusion_layers=2,
  decoder_layers=3,
  queries=10,
)
VIDEO_CONFIG = dataclasses.replace(CONFIG, video=VideoConfig(layers=2, mlp_width=256))
VIDEO_SEED = 3  # of the weights with which the goldens in `video` were made


def meta_weights(prefix: str = "detector.", seed: int = 0) -> dict[str, np.ndarray]:
  """Every float tensor of the tiny model by its name in Meta's layout."""
  rows = (line.split("\t") for line in (GOLDENS / "tiny_keys.txt").read_text().splitlines())
  found = {
    name: weights(name, tuple(int(n) for n in shape.strip("()").split(",") if n.strip()), seed)
    for name, shape, dtype in rows
    if dtype == "float32" and name.startswith(prefix)
  }
  return found if seed != VIDEO_SEED else _with_clear_detections(found)


def _with_clear_detections(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The weights with which the goldens in `video` were made: masks are smaller and queries differ
  more, so that there are objects to track."""
  changed = {}
  for name, x in found.items():
    if name.startswith("detector.transformer.decoder.") and (
      ".out_proj." in name or ".linear2." in name
    ):
      x = (x * 0.1).astype(np.float32)
    elif name.endswith("instance_seg_head.bias"):
      x = (x + 0.3).astype(np.float32)
    elif name.endswith("mask_embed.layers.2.bias"):
      x = (x - 0.3).astype(np.float32)
    changed[name] = x
  return changed


@functools.cache
def parameters(seed: int = 0) -> dict:
  """The tiny model's parameters in our layout."""
  w = {name.removeprefix("detector."): x for name, x in meta_weights(seed=seed).items()}

  def dense(name):
    return {"kernel": w[f"{name}.weight"].T, "bias": w[f"{name}.bias"]}

  def conv(name, axes=(2, 3, 1, 0)):
    bias = {"bias": w[f"{name}.bias"]} if f"{name}.bias" in w else {}
    return {"kernel": w[f"{name}.weight"].transpose(axes)} | bias

  def norm(name):
    return {"scale": w[f"{name}.weight"], "bias": w[f"{name}.bias"]}

  def mlp(*names):
    return {f"fc{i}": dense(name) for i, name in enumerate(names, start=1)}

  def attention(name, fused, out, halve=0):
    parts = {}
    for i, part in enumerate(("query", "key", "value")):
      kernel = np.split(w[f"{name}.{fused}weight"], 3)[i].T
      bias = np.split(w[f"{name}.{fused}bias"], 3)[i]
      if halve and part != "value":  # adjacent channel pairs of each head become halves
        order = np.arange(len(bias)).reshape(halve, -1, 2).swapaxes(1, 2).ravel()
        kernel, bias = kernel[:, order], bias[order]
      parts[part] = {"kernel": kernel, "bias": bias}
    return parts | {"out": dense(f"{name}.{out}")}

  def torch_attention(name):
    return attention(name, "in_proj_", "out_proj")

  def stack(layers):
    return jax.tree.map(lambda *x: np.stack(x), *layers)

  def trunk_block(i):
    name = f"backbone.vision_backbone.trunk.blocks.{i}"
    return {
      "norm1": norm(f"{name}.norm1"),
      "attn": attention(f"{name}.attn", "qkv.", "proj", halve=CONFIG.trunk.heads),
      "norm2": norm(f"{name}.norm2"),
      "mlp": mlp(f"{name}.mlp.fc1", f"{name}.mlp.fc2"),
    }

  def text_block(i):
    name = f"backbone.language_backbone.encoder.transformer.resblocks.{i}"
    return {
      "norm1": norm(f"{name}.ln_1"),
      "attn": torch_attention(f"{name}.attn"),
      "norm2": norm(f"{name}.ln_2"),
      "mlp": mlp(f"{name}.mlp.c_fc", f"{name}.mlp.c_proj"),
    }

  def context_layer(name):
    return {
      "norm1": norm(f"{name}.norm1"),
      "self_attn": torch_attention(f"{name}.self_attn"),
      "norm2": norm(f"{name}.norm2"),
      "cross_attn": torch_attention(f"{name}.cross_attn_image"),
      "norm3": norm(f"{name}.norm3"),
      "mlp": mlp(f"{name}.linear1", f"{name}.linear2"),
    }

  def decoder_layer(i):
    name = f"transformer.decoder.layers.{i}"
    return {
      "self_attn": torch_attention(f"{name}.self_attn"),
      "norm_self": norm(f"{name}.norm2"),
      "text_attn": torch_attention(f"{name}.ca_text"),
      "norm_text": norm(f"{name}.catext_norm"),
      "image_attn": torch_attention(f"{name}.cross_attn"),
      "norm_image": norm(f"{name}.norm1"),
      "mlp": mlp(f"{name}.linear1", f"{name}.linear2"),
      "norm_mlp": norm(f"{name}.norm3"),
    }

  def level(i, doublings):
    name, up = f"backbone.vision_backbone.convs.{i}", (2, 3, 0, 1)
    doubles = {f"up{j + 1}": conv(f"{name}.{part}", up) for j, part in enumerate(doublings)}
    return doubles | {"project": conv(f"{name}.conv_1x1"), "smooth": conv(f"{name}.conv_3x3")}

  trunk, text = "backbone.vision_backbone.trunk", "backbone.language_backbone"
  geometry, decoder = "geometry_encoder", "transformer.decoder"
  masks, scoring = "segmentation_head", "dot_prod_scoring"
  numbered = lambda name, n: [f"{name}.layers.{i}" for i in range(n)]  # noqa: E731
  tree = {
    "trunk": {
      "patch_embed": conv(f"{trunk}.patch_embed.proj"),
      "position": w[f"{trunk}.pos_embed"][0, 1:].reshape(4, 4, -1),
      "norm_pre": norm(f"{trunk}.ln_pre"),
      "groups": {
        "windowed": stack([stack([trunk_block(0)]), stack([trunk_block(2)])]),
        "global": stack([trunk_block(1), trunk_block(3)]),
      },
    },
    "neck": {
      "level0": level(0, ("dconv_2x2_0", "dconv_2x2_1")),
      "level1": level(1, ("dconv_2x2",)),
      "level2": level(2, ()),
    },
    "text": {
      "token_embedding": {"embedding": w[f"{text}.encoder.token_embedding.weight"]},
      "position": w[f"{text}.encoder.positional_embedding"],
      "blocks": stack([text_block(i) for i in range(2)]),
      "norm_final": norm(f"{text}.encoder.ln_final"),
      "project": dense(f"{text}.resizer"),
    },
    "geometry": {
      "box_project": dense(f"{geometry}.boxes_direct_project"),
      "box_pool_project": conv(f"{geometry}.boxes_pool_project"),
      "box_position_project": dense(f"{geometry}.boxes_pos_enc_project"),
      "point_project": dense(f"{geometry}.points_direct_project"),
      "point_pool_project": dense(f"{geometry}.points_pool_project"),
      "point_position_project": dense(f"{geometry}.points_pos_enc_project"),
      "label_embedding": w[f"{geometry}.label_embed.weight"],
      "cls_token": w[f"{geometry}.cls_embed.weight"],
      "image_norm": norm(f"{geometry}.img_pre_norm"),
      "project": dense(f"{geometry}.final_proj"),
      "norm": norm(f"{geometry}.norm"),
      "layers": stack([context_layer(f"{geometry}.encode.{i}") for i in range(2)]),
      "norm_final": norm(f"{geometry}.encode_norm"),
    },
    "fusion": {
      "layers": stack([context_layer(f"transformer.encoder.layers.{i}") for i in range(2)])
    },
    "decoder": {
      "query_embedding": w[f"{decoder}.query_embed.weight"],
      "reference_points": w[f"{decoder}.reference_points.weight"],
      "presence_token": w[f"{decoder}.presence_token.weight"],
      "layers": stack([decoder_layer(i) for i in range(3)]),
      "norm": norm(f"{decoder}.norm"),
      "presence_norm": norm(f"{decoder}.presence_token_out_norm"),
      "box_head": mlp(*numbered(f"{decoder}.bbox_embed", 3)),
      "presence_head": mlp(*numbered(f"{decoder}.presence_token_head", 3)),
      "query_position": mlp(*numbered(f"{decoder}.ref_point_head", 2)),
      "box_bias": {a: mlp(*numbered(f"{decoder}.boxRPB_embed_{a}", 2)) for a in ("x", "y")},
    },
    "scoring": {
      "prompt_mlp": mlp(*numbered(f"{scoring}.prompt_mlp", 2)),
      "prompt_norm": norm(f"{scoring}.prompt_mlp.out_norm"),
      "prompt_project": dense(f"{scoring}.prompt_proj"),
      "query_project": dense(f"{scoring}.hs_proj"),
    },
    "masks": {
      "prompt_norm": norm(f"{masks}.cross_attn_norm"),
      "prompt_attn": torch_attention(f"{masks}.cross_attend_prompt"),
      **{f"conv{i}": conv(f"{masks}.pixel_decoder.conv_layers.{i}") for i in range(2)},
      **{f"norm{i}": norm(f"{masks}.pixel_decoder.norms.{i}") for i in range(2)},
      "instance_project": conv(f"{masks}.instance_seg_head"),
      "semantic_project": conv(f"{masks}.semantic_seg_head"),
      "mask_embed": mlp(*numbered(f"{masks}.mask_predictor.mask_embed", 3)),
    },
  }
  return jax.tree.map(jnp.asarray, tree)


@functools.cache
def visual_parameters(seed: int = 0) -> dict:
  """The tiny model's head for visual prompts in our layout: the part `visual`."""
  w = meta_weights("tracker.", seed)
  w |= meta_weights("detector.backbone.vision_backbone.sam2_convs.", seed)
  prompt, decoder = "tracker.sam_prompt_encoder", "tracker.sam_mask_decoder"
  conv, deconv = (2, 3, 1, 0), (2, 3, 0, 1)

  def layer(name, axes=(1, 0)):
    return {"kernel": w[f"{name}.weight"].transpose(axes), "bias": w[f"{name}.bias"]}

  def norm(name):
    return {"scale": w[f"{name}.weight"], "bias": w[f"{name}.bias"]}

  def mlp(name):
    return {f"fc{i + 1}": layer(f"{name}.layers.{i}") for i in range(3)}

  def attention(name):
    names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "out_proj"}
    return {ours: layer(f"{name}.{theirs}") for ours, theirs in names.items()}

  def two_way_layer(i):
    name = f"{decoder}.transformer.layers.{i}"
    return {
      "self_attn": attention(f"{name}.self_attn"),
      "image_attn": attention(f"{name}.cross_attn_token_to_image"),
      "token_attn": attention(f"{name}.cross_attn_image_to_token"),
      "mlp": {f"fc{j}": layer(f"{name}.mlp.lin{j}") for j in (1, 2)},
      **{f"norm{j}": norm(f"{name}.norm{j}") for j in (1, 2, 3, 4)},
    }

  def level(i, doublings):
    name = f"detector.backbone.vision_backbone.sam2_convs.{i}"
    doubles = {f"up{j + 1}": layer(f"{name}.{part}", deconv) for j, part in enumerate(doublings)}
    maps = {"project": layer(f"{name}.conv_1x1", conv), "smooth": layer(f"{name}.conv_3x3", conv)}
    return doubles | maps

  masks = [mlp(f"{decoder}.output_hypernetworks_mlps.{i}") for i in range(4)]
  tree = {
    "neck": {
      "level0": level(0, ("dconv_2x2_0", "dconv_2x2_1")),
      "level1": level(1, ("dconv_2x2",)),
      "level2": level(2, ()),
    },
    "fine_project": layer(f"{decoder}.conv_s0", conv),
    "middle_project": layer(f"{decoder}.conv_s1", conv),
    "no_memory": w["tracker.no_mem_embed"],
    "prompt": {
      "frequencies": w[f"{prompt}.pe_layer.positional_encoding_gaussian_matrix"],
      "label_embedding": np.concatenate(
        [w[f"{prompt}.point_embeddings.{i}.weight"] for i in range(4)]
      ),
      "not_a_point": w[f"{prompt}.not_a_point_embed.weight"],
      "no_mask": w[f"{prompt}.no_mask_embed.weight"],
      "mask": {
        "conv1": layer(f"{prompt}.mask_downscaling.0", conv),
        "norm1": norm(f"{prompt}.mask_downscaling.1"),
        "conv2": layer(f"{prompt}.mask_downscaling.3", conv),
        "norm2": norm(f"{prompt}.mask_downscaling.4"),
        "project": layer(f"{prompt}.mask_downscaling.6", conv),
      },
    },
    "decoder": {
      "object_token": w[f"{decoder}.obj_score_token.weight"],
      "iou_token": w[f"{decoder}.iou_token.weight"],
      "mask_tokens": w[f"{decoder}.mask_tokens.weight"],
      "two_way": {
        "layer0": two_way_layer(0),
        "layer1": two_way_layer(1),
        "final_attn": attention(f"{decoder}.transformer.final_attn_token_to_image"),
        "norm_final": norm(f"{decoder}.transformer.norm_final_attn"),
      },
      "up1": layer(f"{decoder}.output_upscaling.0", deconv),
      "up_norm": norm(f"{decoder}.output_upscaling.1"),
      "up2": layer(f"{decoder}.output_upscaling.3", deconv),
      "mask_mlp": jax.tree.map(lambda *x: np.stack(x), *masks),
      "iou_head": mlp(f"{decoder}.iou_prediction_head"),
      "object_head": mlp(f"{decoder}.pred_obj_score_head"),
    },
  }
  return jax.tree.map(jnp.asarray, tree)


@functools.cache
def video_parameters(seed: int = 0) -> dict:
  """The tiny model's tracker in our layout: the part `video`."""
  prefix = "tracker."
  w = {name.removeprefix(prefix): x for name, x in meta_weights(prefix, seed).items()}
  encoder, attention = "maskmem_backbone", "transformer.encoder"

  def layer(name, axes=(1, 0)):
    return {"kernel": w[f"{name}.weight"].transpose(axes), "bias": w[f"{name}.bias"]}

  def conv(name):
    return layer(name, (2, 3, 1, 0))

  def norm(name):
    return {"scale": w[f"{name}.weight"], "bias": w[f"{name}.bias"]}

  def rotated(name):
    """Adjacent channel pairs become halves."""
    kernel, bias = w[f"{name}.weight"].T, w[f"{name}.bias"]
    order = np.arange(len(bias)).reshape(-1, 2).T.ravel()
    return {"kernel": kernel[:, order], "bias": bias[order]}

  def attend(name):
    return {
      "query": rotated(f"{name}.q_proj"),
      "key": rotated(f"{name}.k_proj"),
      "value": layer(f"{name}.v_proj"),
      "out": layer(f"{name}.out_proj"),
    }

  def attention_layer(i):
    name = f"{attention}.layers.{i}"
    return {
      "norm1": norm(f"{name}.norm1"),
      "self_attn": attend(f"{name}.self_attn"),
      "norm2": norm(f"{name}.norm2"),
      "cross_attn": attend(f"{name}.cross_attn_image"),
      "norm3": norm(f"{name}.norm3"),
      "mlp": {f"fc{j}": layer(f"{name}.linear{j}") for j in (1, 2)},
    }

  def block(i):
    name = f"{encoder}.fuser.layers.{i}"
    return {
      "depthwise": conv(f"{name}.dwconv"),
      "norm": norm(f"{name}.norm"),
      "mlp": {f"fc{j}": layer(f"{name}.pwconv{j}") for j in (1, 2)},
      "scale": w[f"{name}.gamma"],
    }

  def stack(layers):
    return jax.tree.map(lambda *x: np.stack(x), *layers)

  mask = f"{encoder}.mask_downsampler.encoder"
  tree = {
    "memory_codes": w["maskmem_tpos_enc"][:, 0, 0],
    "no_object_pointer": w["no_obj_ptr"][0],
    "no_object_memory": w["no_obj_embed_spatial"][0],
    "pointer_mlp": {f"fc{i + 1}": layer(f"obj_ptr_proj.layers.{i}") for i in range(3)},
    "pointer_time": layer("obj_ptr_tpos_proj"),
    "mask_downsample": conv("mask_downsample"),
    "memory_encoder": {
      "mask": {
        **{f"conv{i + 1}": conv(f"{mask}.{3 * i}") for i in range(4)},
        **{f"norm{i + 1}": norm(f"{mask}.{3 * i + 1}") for i in range(4)},
        "project": conv(f"{mask}.12"),
      },
      "image_project": conv(f"{encoder}.pix_feat_proj"),
      "blocks": stack([block(i) for i in range(2)]),
      "project": conv(f"{encoder}.out_proj"),
    },
    "memory_attention": {
      "layers": stack([attention_layer(i) for i in range(2)]),
      "norm_final": norm(f"{attention}.norm"),
    },
  }
  return jax.tree.map(jnp.asarray, tree)
