"""A configuration read off the shapes of a checkpoint that brings none.

Shapes do not tell the number of heads of trunk and text encoder, the window, or which blocks attend
globally. Meta's stored RoPE tables do, but for the text encoder; otherwise a checkpoint of the
released widths is taken to be the released model, and any other needs its config.json.
"""

import collections
import itertools
import math
import re
from collections.abc import Mapping

from sam3_jax.config import RELEASED, Config, TextConfig, TrunkConfig

from .rules import Table


def infer_config(table: Table, shapes: Mapping[str, tuple[int, ...]]) -> Config:
  """The configuration of a checkpoint.

  Args:
    table: its layout.
    shapes: of its tensors, under its own names.

  Raises:
    ValueError: a tensor that tells a size is missing, or the shapes are not enough.
  """
  found = _Shapes(table, shapes)
  shape, layers = found.shape, found.layers
  width, _, patch, _ = shape("trunk/patch_embed/kernel", rank=4)
  vocabulary, text_width = shape("text/token_embedding/embedding")
  queries, model_width = shape("decoder/query_embedding")
  blocks = layers("trunk/blocks/*/norm1/scale")
  rope = _rope_facts(found.named, width) or _released_facts(width, blocks)
  return Config(
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


class _Shapes:
  """The shapes that are there (`named`), and the names of a layout by target (`names`)."""

  def __init__(self, table: Table, shapes: Mapping[str, tuple[int, ...]]):
    self.named = {table.canonical(name): shape for name, shape in shapes.items()}
    self.names = {item.targets[0]: table.prefix + item.source for item in table.rules}

  def shape(self, target: str, rank: int = 2) -> tuple[int, ...]:
    """Of a tensor with so many axes; of the first layer's, if it is one of a layer."""
    name = self.names[target].replace("*", "0")
    found = self.named.get(name, ())
    if len(found) != rank:
      raise ValueError(
        f"{name} of {rank} axes, from which the model's size is read, is "
        f"{list(found) if name in self.named else 'missing'}; this is no complete SAM 3."
      )
    return found

  def layers(self, target: str) -> int:
    pattern = re.compile(re.escape(self.names[target]).replace(r"\*", r"(\d+)"))
    matches = map(pattern.fullmatch, self.named)
    return 1 + max((int(match[1]) for match in matches if match), default=-1)


def _rope_facts(found: Mapping[str, tuple[int, ...]], width: int) -> dict[str, int]:
  """From Meta's tables of (positions, channel pairs), if there are some of two sizes.

  A single table that was damaged is outvoted, so that it can be named.
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
      f"the shapes of a trunk {width} wide with {blocks} blocks do not tell its heads and windows; "
      "put the model's config.json beside the weights, or pass config=."
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
      f"the shapes of a text encoder {width} wide do not tell its heads; put the model's "
      "config.json beside the weights, or pass config=."
    )
  return RELEASED.text.heads
