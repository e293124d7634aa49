"""Sizes of the model as frozen dataclasses: the released checkpoint and smaller trunks.

Source of the released sizes: Meta's SAM 3 code and the shapes in its checkpoint.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from sam3_jax.rules import DEFAULT_RULES, Rules
from sam3_jax.utils.dataclass_dict import from_dict

# Far beyond any model: a damaged or hostile file must not cause an out-of-memory error.
MAX_SIZE = 2**16
MAX_TABLE = 2**24  # numbers in a table of rotary positions; the released one has 331,776


# Defined above its callers, as the defaults below are created when this module is imported.
def _check_ranges(config: Any, of: str = "") -> None:
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if field.type is int and value < 1:
      raise ValueError(f"{of}{field.name} must be at least 1; got {value}.")
    if field.type is int and value > MAX_SIZE:
      raise ValueError(f"{of}{field.name} must be at most {MAX_SIZE:,}; got {value}.")
    if field.type is float and not 0 <= value < 1:
      raise ValueError(f"{of}{field.name} must be in [0, 1); got {value}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StemConfig:
  """A stage of a convolutional stem."""

  stride: int  # cells per side that are merged into one
  width: int  # channels of the stage's output
  blocks: int  # residual blocks of two 3 x 3 convolutions

  def __post_init__(self):
    _check_ranges(self, "stem ")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrunkConfig:
  """The image trunk, a ViT: `groups` x (`windowed` windowed blocks + 1 global block)."""

  width: int = 1024  # channels
  heads: int = 16  # attention heads of a block
  mlp_width: int = 4736  # 4.625 * width
  groups: int = 4  # groups of blocks
  windowed: int = 7  # windowed blocks in a group, before its global block
  window: int = 24  # patches per side of an attention window
  pretrain_grid: int = 24  # patches per side of the learned position table, tiled over the image
  drop_path: float = 0.1  # rate in the last block, increasing linearly from 0; in training only
  stem: tuple[StemConfig, ...] = ()  # stages, finest first; empty for a patch embedding

  def __post_init__(self):
    _check_ranges(self, "trunk ")
    if self.width % (4 * self.heads):
      raise ValueError(
        f"trunk width {self.width} must be a multiple of 4 * heads = {4 * self.heads} "
        "(two rotated axes of channel pairs in each head); change width or heads."
      )
    if self.stem and self.stem[-1].width != self.width:
      raise ValueError(
        f"the stem's last width {self.stem[-1].width} must be the trunk's, {self.width}."
      )

  @property
  def blocks(self) -> int:
    return self.groups * (self.windowed + 1)


def _check_text_heads(config: Any) -> None:
  if config.width % config.heads:
    raise ValueError(
      f"text width {config.width} must be a multiple of the heads, {config.heads}; change either."
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig:
  """The text encoder, a causal transformer (CLIP's architecture and vocabulary)."""

  width: int = 1024  # channels
  heads: int = 16  # attention heads of a layer
  mlp_width: int = 4096  # 4 * width
  layers: int = 24  # transformer layers
  context: int = 32  # tokens of a phrase, including start and end
  vocabulary: int = 49408  # tokens of the vocabulary

  def __post_init__(self):
    _check_ranges(self, "text ")
    _check_text_heads(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LiteTextConfig:
  """SAM 3 LiteText's text encoder (MobileCLIP's; arXiv:2602.12173), which is not causal."""

  width: int = 512  # channels
  heads: int = 8  # attention heads of a layer
  mlp_width: int = 2048  # 4 * width
  layers: int = 12  # transformer layers, not counting the mixers
  mixers: bool = False  # adds a RepMixer block before and after the layers
  kernel: int = 11  # tokens per kernel of the mixers' convolutions
  context: int = 16  # tokens of a phrase, including start and end
  vocabulary: int = 49408  # tokens of the vocabulary
  # Whether attention masks the padding, as in transformers. The released models were distilled from
  # SAM 3 without this mask.
  mask_padding: bool = False

  def __post_init__(self):
    _check_ranges(self, "text ")
    _check_text_heads(self)
    if self.kernel % 2 == 0:
      raise ValueError(f"text kernel must be odd; got {self.kernel}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoConfig:
  """The tracker: what it keeps of earlier frames and how it reads them (SAM 2's; Ravi et al. 2024,
  arXiv:2408.00714)."""

  memory_channels: int = 64  # channels of a memory's cells, and of an object pointer's tokens
  memories: int = 7  # frames whose memories are read: a conditioning frame and the previous ones
  pointers: int = 16  # frames whose object pointers are read
  conditioning: int = 4  # conditioning frames that are read at most
  layers: int = 4  # layers of the memory attention
  mlp_width: int = 2048  # hidden channels of their MLPs
  mask_widths: tuple[int, int, int, int] = (4, 16, 64, 256)  # of the mask, on its way to the grid
  blocks: int = 2  # ConvNeXt blocks that fuse mask and image to a memory
  rules: Rules = DEFAULT_RULES  # thresholds

  def __post_init__(self):
    _check_ranges(self, "video ")
    if not all(0 < width <= MAX_SIZE for width in self.mask_widths):
      raise ValueError(f"video mask_widths must be 1 to {MAX_SIZE:,} each; got {self.mask_widths}.")
    if self.memory_channels % 4:
      raise ValueError(
        f"video memory_channels must be a multiple of 4 (a sine code for each of two axes); got "
        f"{self.memory_channels}."
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """The whole model; the defaults are the released checkpoint's detector."""

  trunk: TrunkConfig = TrunkConfig()  # the image encoder
  text: TextConfig | LiteTextConfig = TextConfig()  # the text encoder
  image_size: int = 1008  # pixels per side; every image is resized to this square
  patch: int = 14  # pixels per side of a patch
  width: int = 256  # channels of all parts after trunk and text encoder
  heads: int = 8  # attention heads of all parts after trunk and text encoder
  mlp_width: int = 2048  # hidden channels of the MLPs in these parts
  geometry_layers: int = 3  # layers of the geometry encoder
  fusion_layers: int = 6  # layers of the fusion encoder
  decoder_layers: int = 6  # layers of the query decoder
  queries: int = 200  # object queries, the largest number of detections per prompt
  concept_points: bool = True  # whether concept prompts may have points, as in Meta's checkpoint
  dropout: float = 0.1  # rate in geometry, fusion, decoder and scoring; in training only
  video: VideoConfig | None = None  # the tracker; None for a checkpoint without one

  def __post_init__(self):
    _check_ranges(self)
    if self.width % self.heads or self.width % 8:
      raise ValueError(
        f"width {self.width} must be a multiple of the heads, {self.heads}, and of 8 (the groups "
        "of the masks' GroupNorm; sine encodings need 4); change width or heads."
      )
    if self.image_size % self.patch:
      raise ValueError(
        f"image_size {self.image_size} must be a multiple of the patch, {self.patch} pixels."
      )
    strides = math.prod(stage.stride for stage in self.trunk.stem)
    if self.trunk.stem and strides != self.patch:
      raise ValueError(
        f"the stem's strides must multiply to the patch, {self.patch}; not {strides}."
      )
    channels = self.trunk.width // self.trunk.heads
    if self.grid**2 * channels > MAX_TABLE:
      raise ValueError(
        f"a grid of {self.grid} patches per side with {channels} channels per head needs a table "
        f"of more than {MAX_TABLE:,} rotary positions; change image_size or heads."
      )
    if self.grid % self.trunk.window:
      raise ValueError(
        f"the grid of {self.grid} patches (image_size / patch) must be a multiple of the window, "
        f"{self.trunk.window} patches; change image_size or window."
      )
    if self.video and self.width % self.video.memory_channels:
      raise ValueError(
        f"width {self.width} must be a multiple of video memory_channels, "
        f"{self.video.memory_channels} (an object pointer is cut into tokens of that size); change "
        "either."
      )

  @property
  def grid(self) -> int:
    """Patches per side."""
    return self.image_size // self.patch

  @property
  def mask_size(self) -> int:
    """Cells per side of the decoder's masks."""
    return 4 * self.grid

  def to_dict(self) -> dict[str, Any]:
    """Nested plain values, ready for JSON; without `video` if there is no tracker, so that a
    checkpoint of an earlier version keeps its identity."""
    values = dataclasses.asdict(self)
    if self.video is None:
      del values["video"]
    return values

  @classmethod
  def from_dict(cls, values: dict[str, Any]) -> "Config":
    """Inverse of `to_dict`. Raises ValueError on a field that is unknown or missing. A missing
    rule of the tracker has its default."""
    remedy = "Convert the checkpoint again with this version of sam3-jax."
    if isinstance(values, Mapping):
      values = {"video": None} | dict(values)
      if isinstance(video := values["video"], Mapping) and isinstance(video.get("rules"), Mapping):
        rules = dataclasses.asdict(Rules()) | dict(video["rules"])
        values["video"] = dict(video) | {"rules": rules}
    return from_dict(cls, values, "config", complete=remedy)


RELEASED = Config()

# The smaller trunks have the width, depth and heads of DeiT-Ti, DeiT-S (Touvron et al. 2021,
# arXiv:2012.12877, table 1) and ViT-B (Dosovitskiy et al. 2021, arXiv:2010.11929, table 1), and the
# released trunk's MLP ratio of 4.625 and four global blocks. No such weights were released. All
# other parts are as released.
SIZES = {
  "vit-tiny": Config(trunk=TrunkConfig(width=192, heads=3, mlp_width=888, windowed=2)),
  "vit-small": Config(trunk=TrunkConfig(width=384, heads=6, mlp_width=1776, windowed=2)),
  "vit-base": Config(trunk=TrunkConfig(width=768, heads=12, mlp_width=3552, windowed=2)),
  "vit-large": RELEASED,
}

# Text encoders of SAM 3 LiteText, named after MobileCLIP's sizes. They work with any trunk:
# `dataclasses.replace(RELEASED, text=LITE_TEXTS["s0"])`.
LITE_TEXTS = {
  "s0": LiteTextConfig(layers=4, mixers=True),
  "s1": LiteTextConfig(),
  "l": LiteTextConfig(width=768, heads=12, mlp_width=3072),
}
