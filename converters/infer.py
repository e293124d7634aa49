"""Infers the configuration of a checkpoint without config.json from its shapes.

Shapes do not determine the heads of trunk and text encoder, the window size, or which blocks attend
globally. Meta's stored RoPE tables do, except for the text encoder. Otherwise a checkpoint with the
released widths is taken for the released model, and any other needs its config.json.
"""

import collections
import itertools
import math
import re
from collections.abc import Mapping

from sam3_jax.config import RELEASED, Config, TextConfig, TrunkConfig

from .table import Table


def infer_config(table: Table, shapes: Mapping[str, tuple[int, ...]]) -> Config:
  """Infers the configuration of a checkpoint.

  Args:
    table: its layout.
    shapes: the shapes of its tensors, under its own names.

  Raises:
    ValueError: a tensor that determines a size is missing, or the shapes do not suffice.
  """
  found = _Shapes(table, shapes)
  shape, layers = found.shape, found.layers
  width, _, patch, _ = shape("trunk/patch_embed/kernel", rank=4)
  vocabulary, text_width = shape("text/token_embedding/embedding")
  queries, model_width = shape("decoder/query_embedding")
  blocks = layers("trunk/blocks/*/norm1/scale")
  rope = _rope_facts(found.named, width) or _released_facts(width, blocks)
  config = Config(
    trunk=TrunkConfig(
      width=width,
      heads=rope["heads"],
      mlp_width=shape("trunk/blocks/*/mlp/fc1/kernel")[0],
      groups=blocks // (rope["windowed"] + 1),
      windowed=rope["windowed"],
      window=rope["window"],
      pretrain_grid=math.isqrt(shape("trunk/position", rank=3)[1]),
    ),
    text=TextConfig(
      width=text_width,
      heads=_text_heads(text_width),
      mlp_width=shape("text/blocks/*/mlp/fc1/kernel")[0],
      layers=layers("text/blocks/*/norm1/scale"),
      context=shape("text/position")[0],
      vocabulary=vocabulary,
    ),
    image_size=rope["grid"] * patch,
    patch=patch,
    width=model_width,
    heads=shape("decoder/box_bias/x/fc2/kernel")[0],
    mlp_width=shape("fusion/layers/*/mlp/fc1/kernel")[0],
    geometry_layers=layers("geometry/layers/*/norm1/scale"),
    fusion_layers=layers("fusion/layers/*/norm1/scale"),
    decoder_layers=layers("decoder/layers/*/norm_self/scale"),
    queries=queries,
    concept_points=any(
      name in found.named
      for target, name in found.names.items()
      if target.startswith("geometry/point_")
    ),
  )
  return table.with_video(config, shapes)


class _Shapes:
  """The shapes of a checkpoint by canonical name, and its layout's names by target."""

  def __init__(self, table: Table, shapes: Mapping[str, tuple[int, ...]]):
    self.named = {table.canonical(name): shape for name, shape in shapes.items()}
    self.names = {item.targets[0]: table.prefix + item.source for item in table.rules}

  def shape(self, target: str, rank: int = 2) -> tuple[int, ...]:
    """The shape of the tensor of a target, of layer 0 for a layer's; it must have `rank` axes."""
    name = self.names[target].replace("*", "0")
    found = self.named.get(name, ())
    if len(found) != rank:
      raise ValueError(
        f"{name}, which must have {rank} axes and determines the model's size, is "
        f"{list(found) if name in self.named else 'missing'}; this is not a complete SAM 3 "
        "checkpoint."
      )
    return found

  def layers(self, target: str) -> int:
    pattern = re.compile(re.escape(self.names[target]).replace(r"\*", r"(\d+)"))
    matches = map(pattern.fullmatch, self.named)
    return 1 + max((int(match[1]) for match in matches if match), default=-1)


def _rope_facts(found: Mapping[str, tuple[int, ...]], width: int) -> dict[str, int]:
  """Infers sizes from Meta's RoPE tables (positions, channel pairs), if they have two shapes.

  A single damaged table is outvoted, so that it can be reported by name.
  """
  pattern = re.compile(r".*\.trunk\.blocks\.(\d+)\.attn\.freqs_cis")
  tables = {int(m[1]): shape for name, shape in found.items() if (m := pattern.fullmatch(name))}
  common = collections.Counter(shape for shape in tables.values() if len(shape) == 2).most_common(2)
  if len(common) < 2 or 0 in (size for shape, _ in common for size in shape):
    return {}
  (small, pairs), (large, _) = sorted(shape for shape, _ in common)
  ends = [block for block, shape in sorted(tables.items()) if shape[0] == large]
  gaps = [after - before for before, after in itertools.pairwise(ends)]
  return {
    "grid": math.isqrt(large),
    "window": math.isqrt(small),
    "windowed": min([*gaps, ends[0] + 1]) - 1 if gaps else ends[0],
    "heads": max(width // (2 * pairs), 1),
  }


def _released_facts(width: int, blocks: int) -> dict[str, int]:
  trunk = RELEASED.trunk
  if (width, blocks) != (trunk.width, trunk.blocks):
    raise ValueError(
      f"the shapes of a trunk {width} wide with {blocks} blocks do not determine its heads and "
      "windows; put the model's config.json beside the weights, or pass config=."
    )
  return {
    "grid": RELEASED.grid,
    "window": trunk.window,
    "windowed": trunk.windowed,
    "heads": trunk.heads,
  }


def _text_heads(width: int) -> int:
  if width != RELEASED.text.width:
    raise ValueError(
      f"the shapes of a text encoder {width} wide do not determine its heads; put the model's "
      "config.json beside the weights, or pass config=."
    )
  return RELEASED.text.heads
