"""Names in both layouts, and shapes, of the tensors of SAM 3 that our model does not read.

Includes the tensors that only the head for visual prompts reads, for sources without that head.
Unread tensors are kept beside the parameters, so that exports are complete. With their names and
shapes, faults in them are found as in any other tensor, and a checkpoint of one layout can be
exported to the other.

Sources: facebookresearch/sam3 (`Sam3VideoInference.state_dict()`) and transformers 5.23
(`Sam3VideoModel.state_dict()`), whose tracker is that of SAM 2 (arXiv:2408.00714).
"""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from sam3_jax.config import Config, LiteTextConfig

from ..table import has_mixers

DETECTOR, NECK, TRACKER = "detector", "neck of the tracker", "tracker"
COUNTERS = "batch norms' counters"  # integers of LiteText
MEMORY = 64  # channels of a memory
FREQUENCIES = "visual/prompt/frequencies"  # path in our tree
# Hugging Face's layout stores the frequencies twice.
SHARED_FREQUENCIES = tuple(
  f"tracker_model.{module}.positional_embedding"
  for module in ("prompt_encoder.shared_embedding", "shared_image_embedding")
)
PROJECTION = 512  # width of CLIP's joint space; the projection into it is unused


@dataclasses.dataclass(frozen=True)
class Unread:
  """An unread tensor, or several that one of the layouts stores as one.

  Attributes:
    part: DETECTOR is always present; NECK, TRACKER and COUNTERS may be absent, each as a whole.
    meta: names in Meta's layout; four for rows that Hugging Face stacks.
    huggingface: names in Hugging Face's layout; two for tensors that it stores twice.
    shape: of each tensor in Meta's layout.
    transposed: whether Hugging Face stores it transposed.
  """

  part: str
  meta: tuple[str, ...]
  huggingface: tuple[str, ...]
  shape: tuple[int, ...]
  transposed: bool = False

  def names(self, layout: str) -> tuple[str, ...]:
    return self.meta if layout == "meta" else self.huggingface

  def shape_in(self, layout: str) -> tuple[int, ...]:
    """The shape of each tensor in `layout`, meta or huggingface."""
    if layout == "meta":
      return self.shape
    if self.transposed:
      return self.shape[::-1]
    return (len(self.meta), *self.shape[1:]) if len(self.meta) > 1 else self.shape

  def translate(self, arrays: list[np.ndarray], layout: str) -> list[np.ndarray]:
    """Converts the tensors of the other layout to `layout`."""
    if self.transposed:
      return [np.ascontiguousarray(arrays[0].T)]
    if len(self.meta) > 1:
      stacked = layout == "huggingface"
      return [np.concatenate(arrays)] if stacked else np.split(arrays[0], len(self.meta))
    return [arrays[0]] * len(self.names(layout))


def unread(config: Config, memory_layers: int) -> list[Unread]:
  """All unread tensors of a model, with this number of memory attention layers."""
  return _Lister(config, memory_layers).items


def unread_shapes(
  layout: str, config: Config, names: Mapping[str, Any]
) -> dict[str, tuple[str, tuple]]:
  """Part and shape of each unread tensor that a checkpoint with these names may have."""
  return {
    name: (item.part, item.shape_in(layout))
    for item in unread(config, memory_layers(names))
    for name in item.names(layout)
  }


def multiplex_shapes(config: Config, found: Mapping[str, Any]) -> dict[str, tuple[str, tuple]]:
  """As `unread_shapes`, for SAM 3.1: three necks with three levels, and any tracker."""
  lister = _Lister(config, 0)
  lister.items = [
    item for item in lister.items if item.part == DETECTOR and ".convs.3." not in item.meta[0]
  ]
  lister.meta = lister.huggingface = ""
  for neck in ("interactive_convs", "propagation_convs"):
    lister.part = neck
    for level in range(3):
      lister.level(f"detector.backbone.vision_backbone.{neck}", "", level)
  facts = {item.meta[0]: (item.part, item.shape) for item in lister.items}
  tracker = {
    name: (TRACKER, tuple(tensor.shape))
    for name, tensor in found.items()
    if name.startswith("tracker.model.")
  }
  return facts | tracker


def absent_tensors(config: Config, names: Iterable[str]) -> list[str]:
  """Tensors, by Meta's names, and whole parts that are not among a source's unread names."""
  names = set(names)
  absent = [
    item
    for item in unread(config, 1)
    if not any(name in names for name in (*item.meta, *item.huggingface))
  ]
  whole = [part for part in (NECK, TRACKER) if any(item.part == part for item in absent)]
  return [item.meta[0] for item in absent if item.part == DETECTOR] + whole


def translate(
  arrays: Mapping[str, np.ndarray], layout: str, config: Config
) -> dict[str, np.ndarray]:
  """Converts unread tensors of either layout to `layout`; omits those without a name there."""
  found: dict[str, np.ndarray] = {}
  other = "huggingface" if layout == "meta" else "meta"
  for item in unread(config, memory_layers(arrays)):
    here, there = item.names(layout), item.names(other)
    if all(name in arrays for name in here):
      found |= {name: arrays[name] for name in here}
    elif all(name in arrays for name in there):
      found |= zip(here, item.translate([arrays[name] for name in there], layout), strict=True)
  return found


def memory_layers(names: Iterable[str]) -> int:
  """The number of the tracker's memory attention layers, which our configuration lacks."""
  pattern = re.compile(
    r"(?:tracker\.transformer\.encoder|tracker_model\.memory_attention)\.layers\.(\d{1,2})\..*"
  )
  return 1 + max((int(m[1]) for name in names if (m := pattern.fullmatch(name))), default=-1)


class _Lister:
  """Lists all unread tensors; shapes are strings like `"D W 1 1"`, with the letters of `sizes`."""

  def __init__(self, config: Config, memory_layers: int):
    d = config.width
    self.sizes = {
      "D": d,
      "2D": 2 * d,
      "4D": 4 * d,
      "D/2": d // 2,
      "D/4": d // 4,
      "D/8": d // 8,
      "F": config.mlp_width,
      "M": MEMORY,
      "W": config.trunk.width,
      "W/2": config.trunk.width // 2,
      "W/4": config.trunk.width // 4,
    }
    self.items: list[Unread] = []
    self.part, self.meta, self.huggingface = DETECTOR, "detector.", "detector_model."
    self._detector(config)
    self.part = NECK
    for level in range(4):
      self.level("detector.backbone.vision_backbone.sam2_convs", "tracker_neck", level)
    self.part, self.meta, self.huggingface = TRACKER, "tracker.", "tracker_model."
    self._memory(memory_layers)
    self._prompt_encoder()
    self._mask_decoder()

  def one(self, meta: str, huggingface: str, shape: str, **options: bool) -> None:
    sizes = tuple(self.sizes[n] if n in self.sizes else int(n) for n in shape.split())
    names = (self.meta + meta,), (self.huggingface + huggingface,)
    self.items.append(Unread(self.part, *names, sizes, **options))

  def pair(self, meta: str, huggingface: str, shape: str, outputs: int = 0) -> None:
    """Adds weight and bias of a layer; `outputs` is the axis of its outputs."""
    self.one(f"{meta}.weight", f"{huggingface}.weight", shape)
    self.one(f"{meta}.bias", f"{huggingface}.bias", shape.split()[outputs])

  def attention(self, meta: str, huggingface: str, inner: str = "D", keys: str = "D") -> None:
    for name, shape in (("q", f"{inner} D"), ("k", f"{inner} {keys}"), ("v", f"{inner} {keys}")):
      self.pair(f"{meta}.{name}_proj", f"{huggingface}.{name}_proj", shape)
    self.pair(f"{meta}.out_proj", f"{huggingface}.o_proj", f"D {inner}")

  def mlp(self, meta: str, huggingface: str, *shapes: str) -> None:
    for i, (name, shape) in enumerate(
      zip(("proj_in", "layers.0", "proj_out"), shapes, strict=True)
    ):
      self.pair(f"{meta}.layers.{i}", f"{huggingface}.{name}", shape)

  def level(self, meta: str, huggingface: str, level: int) -> None:
    meta, huggingface = f"{meta}.{level}", f"{huggingface}.fpn_layers.{level}"
    doublings = (("dconv_2x2_0", "dconv_2x2_1"), ("dconv_2x2",), (), ())[level]
    for i, (name, shape) in enumerate(zip(doublings, ("W W/2 2 2", "W/2 W/4 2 2"), strict=False)):
      self.pair(f"{meta}.{name}", f"{huggingface}.scale_layers.{2 * i}", shape, outputs=1)
    width = ("W/4", "W/2", "W", "W")[level]
    self.pair(f"{meta}.conv_1x1", f"{huggingface}.proj1", f"D {width} 1 1")
    self.pair(f"{meta}.conv_3x3", f"{huggingface}.proj2", "D D 3 3")

  def _detector(self, config: Config) -> None:
    self.sizes |= {"T": config.text.width, "P": PROJECTION}
    meta, huggingface = "backbone.language_backbone.encoder.", "text_encoder."
    if isinstance(config.text, LiteTextConfig):
      self._lite_text(config, meta, huggingface)
    else:
      projection = "text_projection"
      self.one(meta + projection, f"{huggingface}{projection}.weight", "T P", transposed=True)
    meta, huggingface = "segmentation_head.pixel_decoder", "mask_decoder.pixel_decoder"
    self.pair(f"{meta}.conv_layers.2", f"{huggingface}.conv_layers.2", "D D 3 3")
    self.pair(f"{meta}.norms.2", f"{huggingface}.norms.2", "D")
    self.meta = self.huggingface = ""  # names of a neck are complete
    neck = "detector.backbone.vision_backbone.convs", "detector_model.vision_encoder.neck"
    self.level(*neck, 3)

  def _lite_text(self, config: Config, meta: str, huggingface: str) -> None:
    self.one(f"{meta}projection_layer", f"{huggingface}projection.weight", "T T", transposed=True)
    for layer in (0, config.text.layers + 1) if has_mixers(config) else ():
      for norm in (
        "token_mixer.reference_batchnorm",
        "token_mixer.mixer.batchnorm_skip",
        "token_mixer.mixer.batchnorm_conv",
        "conv_feed_forward.depthwise_batchnorm",
      ):
        name = f"detector_model.{huggingface}layers.{layer}.{norm}.num_batches_tracked"
        self.items.append(Unread(COUNTERS, (name,), (name,), ()))

  def _memory(self, layers: int) -> None:
    self.one("maskmem_tpos_enc", "memory_temporal_positional_encoding", "7 1 1 M")
    self.one("no_mem_embed", "no_memory_embedding", "1 1 D")
    self.one("no_mem_pos_enc", "no_memory_positional_encoding", "1 1 D")
    self.one("no_obj_ptr", "no_object_pointer", "1 D")
    self.one("no_obj_embed_spatial", "occlusion_spatial_embedding_parameter", "1 M")
    self.pair("mask_downsample", "mask_downsample", "1 1 4 4")
    self.mlp("obj_ptr_proj", "object_pointer_proj", "D D", "D D", "D D")
    self.pair("obj_ptr_tpos_proj", "temporal_positional_encoding_projection_layer", "M D")
    for i in range(layers):
      meta, huggingface = f"transformer.encoder.layers.{i}", f"memory_attention.layers.{i}"
      self.attention(f"{meta}.self_attn", f"{huggingface}.self_attn")
      self.attention(f"{meta}.cross_attn_image", f"{huggingface}.cross_attn_image", keys="M")
      self.pair(f"{meta}.linear1", f"{huggingface}.linear1", "F D")
      self.pair(f"{meta}.linear2", f"{huggingface}.linear2", "D F")
      for n in (1, 2, 3):
        self.pair(f"{meta}.norm{n}", f"{huggingface}.layer_norm{n}", "D")
    self.pair("transformer.encoder.norm", "memory_attention.layer_norm", "D")
    meta, huggingface = "maskmem_backbone.mask_downsampler", "memory_encoder.mask_downsampler"
    channels = ("1", "4", "16", "64", "256")
    for i, (inputs, outputs) in enumerate(itertools.pairwise(channels)):
      layer = f"{huggingface}.layers.{i}"
      self.pair(f"{meta}.encoder.{3 * i}", f"{layer}.conv", f"{outputs} {inputs} 3 3")
      self.pair(f"{meta}.encoder.{3 * i + 1}", f"{layer}.layer_norm", outputs)
    self.pair(f"{meta}.encoder.12", f"{huggingface}.final_conv", "D 256 1 1")
    self.pair("maskmem_backbone.pix_feat_proj", "memory_encoder.feature_projection", "D D 1 1")
    for i in range(2):
      meta = f"maskmem_backbone.fuser.layers.{i}"
      huggingface = f"memory_encoder.memory_fuser.layers.{i}"
      self.one(f"{meta}.gamma", f"{huggingface}.scale", "D")
      self.pair(f"{meta}.dwconv", f"{huggingface}.depthwise_conv", "D 1 7 7")
      self.pair(f"{meta}.norm", f"{huggingface}.layer_norm", "D")
      self.pair(f"{meta}.pwconv1", f"{huggingface}.pointwise_conv1", "4D D")
      self.pair(f"{meta}.pwconv2", f"{huggingface}.pointwise_conv2", "D 4D")
    self.pair("maskmem_backbone.out_proj", "memory_encoder.projection", "M D 1 1")

  def _prompt_encoder(self) -> None:
    meta, huggingface, d = "sam_prompt_encoder", "prompt_encoder", self.sizes["D"]
    self.items += [
      Unread(
        TRACKER,
        (f"tracker.{meta}.pe_layer.positional_encoding_gaussian_matrix",),
        SHARED_FREQUENCIES,
        (2, d // 2),
      ),
      Unread(
        TRACKER,
        tuple(f"tracker.{meta}.point_embeddings.{i}.weight" for i in range(4)),
        (f"tracker_model.{huggingface}.point_embed.weight",),
        (1, d),
      ),
    ]
    for name in ("not_a_point_embed", "no_mask_embed"):
      self.one(f"{meta}.{name}.weight", f"{huggingface}.{name}.weight", "1 D")
    for i, shape in enumerate(("4 1 2 2", "16 4 2 2", "D 16 1 1")):
      down = f"{meta}.mask_downscaling"
      self.pair(f"{down}.{3 * i}", f"{huggingface}.mask_embed.conv{i + 1}", shape)
      if i < 2:
        norm = f"{huggingface}.mask_embed.layer_norm{i + 1}"
        self.pair(f"{down}.{3 * i + 1}", norm, shape.split()[0])

  def _mask_decoder(self) -> None:
    for i in range(2):
      meta = f"sam_mask_decoder.transformer.layers.{i}"
      huggingface = f"mask_decoder.transformer.layers.{i}"
      self.attention(f"{meta}.self_attn", f"{huggingface}.self_attn")
      for name in ("cross_attn_token_to_image", "cross_attn_image_to_token"):
        self.attention(f"{meta}.{name}", f"{huggingface}.{name}", inner="D/2")
      self.pair(f"{meta}.mlp.lin1", f"{huggingface}.mlp.proj_in", "2048 D")
      self.pair(f"{meta}.mlp.lin2", f"{huggingface}.mlp.proj_out", "D 2048")
      for n in (1, 2, 3, 4):
        self.pair(f"{meta}.norm{n}", f"{huggingface}.layer_norm{n}", "D")
    meta, huggingface = "sam_mask_decoder", "mask_decoder"
    final, norm = "transformer.final_attn_token_to_image", "norm_final_attn"
    self.attention(f"{meta}.{final}", f"{huggingface}.{final}", inner="D/2")
    self.pair(f"{meta}.transformer.{norm}", f"{huggingface}.transformer.layer_{norm}", "D")
    for name, rows in (("iou_token", 1), ("mask_tokens", 4), ("obj_score_token", 1)):
      self.one(f"{meta}.{name}.weight", f"{huggingface}.{name}.weight", f"{rows} D")
    up = f"{meta}.output_upscaling"
    self.pair(f"{up}.0", f"{huggingface}.upscale_conv1", "D D/4 2 2", outputs=1)
    self.pair(f"{up}.1", f"{huggingface}.upscale_layer_norm", "D/4")
    self.pair(f"{up}.3", f"{huggingface}.upscale_conv2", "D/4 D/8 2 2", outputs=1)
    self.pair(f"{meta}.conv_s0", f"{huggingface}.conv_s0", "D/8 D 1 1")
    self.pair(f"{meta}.conv_s1", f"{huggingface}.conv_s1", "D/4 D 1 1")
    for i in range(4):
      name = f"output_hypernetworks_mlps.{i}"
      self.mlp(f"{meta}.{name}", f"{huggingface}.{name}", "D D", "D D", "D/8 D")
    heads = {
      "iou_prediction_head": ("256 D", "256 256", "4 256"),
      "pred_obj_score_head": ("D D", "D D", "1 D"),
    }
    for name, shapes in heads.items():
      self.mlp(f"{meta}.{name}", f"{huggingface}.{name}", *shapes)
