"""All tensors of a layout: the ones the model reads, by rules, and the others, with reasons."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from sam3_jax.config import Config, LiteTextConfig, VideoConfig

from .rules import Rule
from .source import Source

# Rows of the label table and copies of the mask MLP in the head for visual prompts, as in SAM 2.
LABELS, MASKS = 4, 4
MEMORY = "video/memory_attention/layers/*"
MIXERS = "text/first/", "text/last/"  # before and after the layers of LiteText's encoder

Slot = tuple[str, tuple[int, ...]]  # path of one of our arrays, and the index of a layer in it


@dataclasses.dataclass(frozen=True)
class Entry:
  """One tensor of a source: its rule, and the slot of each of the rule's targets."""

  rule: Rule
  slots: tuple[Slot, ...]

  @property
  def part(self) -> str:
    return self.slots[0][0].partition("/")[0]

  def shape(self, shapes: Mapping[str, tuple[int, ...]], config: Config) -> tuple[int, ...]:
    """The source's shape, given the shapes of our arrays; allocates no memory."""
    empty = (np.broadcast_to(np.int8(0), shapes[path][len(index) :]) for path, index in self.slots)
    shape = self.rule.join(empty, config).shape
    return (shape[0], shape[1] + self.rule.skip, *shape[2:]) if self.rule.skip else shape

  def restore(
    self,
    name: str,
    params: Mapping[str, np.ndarray],
    unread: Mapping[str, np.ndarray],
    config: Config,
  ) -> np.ndarray:
    """Returns the source's tensor `name`, made from our arrays by path.

    Skipped entries come from `unread`; they are zero where it lacks them.
    """
    array = self.rule.join((params[path][index] for path, index in self.slots), config)
    if not self.rule.skip:
      return array
    shape = (array.shape[0], self.rule.skip, *array.shape[2:])
    head = unread.get(self.rule.skipped_name(name), np.zeros(shape, array.dtype))
    return np.concatenate([head.astype(array.dtype), array], axis=1)


@dataclasses.dataclass(frozen=True)
class Table:
  """A layout. The keys of `unread` and `dropped` are regular expressions for whole names.

  Attributes:
    name: the layout's name, as `convert --format` has it.
    prefix: precedes the name of every rule's tensor.
    rules: the tensors that the model reads.
    unread: tensors that are kept beside the parameters, with the reason.
    dropped: tensors that are not kept at all, with the reason.
    canonical: maps a source's tensor name to its name in this table; must be injective.
    unread_shapes: maps a configuration and the names of a source's tensors to part and shape of
      each unread tensor. A part other than DETECTOR may be absent as a whole.
    derived: maps a configuration and a source's tensors to the tensors of `dropped`, which are
      recomputed; large tensors are computed when read.
    format_layer: writes the number of a layer.
    visual_rules: the tensors of visual prompts, by whole names. If a source lacks the head for
      them, its tensors of these names are unread.
    visual_parts: what the names of that head and of its neck start with.
    video_rules: the tensors of the tracker, beyond those of visual prompts; as `visual_rules`.
    video_parts: what the names of its parts start with.
  """

  name: str
  prefix: str
  rules: tuple[Rule, ...]
  unread: Mapping[str, str]
  dropped: Mapping[str, str]
  canonical: Callable[[str], str]
  unread_shapes: Callable[[Config, Mapping[str, Any]], Mapping[str, tuple[str, tuple[int, ...]]]]
  derived: Callable[[Config, Mapping[str, Source]], Mapping[str, Source]] = lambda *_: {}
  format_layer: Callable[[int], str] = str
  visual_rules: tuple[Rule, ...] = ()
  visual_parts: tuple[str, ...] = ()
  video_rules: tuple[Rule, ...] = ()
  video_parts: tuple[str, ...] = ()

  def entries(self, config: Config, *, visual: bool = False) -> dict[str, Entry]:
    """Every tensor that a source of this layout must have, by canonical name.

    With `visual`, the tensors of visual prompts are included, and, if the configuration has a
    tracker, those of the tracker.
    """
    entries = {}
    names = [(self.prefix + item.source, item) for item in self.rules]
    names += [(item.source, item) for item in self.visual_rules if visual]
    names += [(item.source, item) for item in self.video_rules if visual and config.video]
    for source, item in names:
      target = item.targets[0]
      if target.startswith("geometry/point_") and not config.concept_points:
        continue
      if target.startswith(MIXERS) and not has_mixers(config):
        continue
      stack = target.partition("/*")[0] if "*" in target else None
      for i in range(_layers(stack, config)) if stack else (0,):
        slots = tuple(_slot(target, i, config) for target in item.targets)
        name = source.replace("*", self.format_layer(_source_layer(target, i, config)))
        entries[name] = Entry(item, slots)
    return entries

  def tensors(self, config: Config) -> int:
    """About how many tensors the model reads; cheap for any configuration, however absurd."""
    return sum(
      _layers(item.targets[0].partition("/*")[0], config) if "*" in item.targets[0] else 1
      for item in self.rules
    )

  def has_visual(self, names: Iterable[str]) -> bool:
    """Whether a source with these tensors has the head for visual prompts and its neck, or at
    least a part of each."""
    return bool(self.visual_rules) and self._has_each(self.visual_parts, names)

  def with_video(self, config: Config, names: Iterable[str]) -> Config:
    """The configuration of a source with these tensors: with the tracker, if the source has at
    least a part of each of its parts, else without. No configuration of a source has its sizes, but
    they are those of the released model."""
    names = [self.canonical(name) for name in names]
    parts = self.visual_parts + self.video_parts
    if not self.video_rules or not self._has_each(parts, names):
      return dataclasses.replace(config, video=None)
    if config.video:
      return config
    video = VideoConfig(layers=self._memory_layers(names), mlp_width=config.mlp_width)
    return dataclasses.replace(config, video=video)

  def _has_each(self, parts: tuple[str, ...], names: Iterable[str]) -> bool:
    found = [self.canonical(name) for name in names]
    return all(any(name.startswith(part) for name in found) for part in parts)

  def _memory_layers(self, names: Iterable[str]) -> int:
    """The number of layers of the memory attention."""
    source = next(item.source for item in self.video_rules if item.targets[0].startswith(MEMORY))
    pattern = re.compile(re.escape(source.partition("*")[0]) + r"(\d{1,2})\..*")
    return 1 + max(int(m[1]) for name in names if (m := pattern.fullmatch(name)))

  def reason(self, patterns: Mapping[str, str], name: str) -> str | None:
    """The reason in `unread` or `dropped` for this name, or None."""
    return next((why for pattern, why in patterns.items() if re.fullmatch(pattern, name)), None)


def has_mixers(config: Config) -> bool:
  """Whether the text encoder is a LiteText with a mixer before and after its layers."""
  return isinstance(config.text, LiteTextConfig) and config.text.mixers


def _source_layer(target: str, layer: int, config: Config) -> int:
  """The source's number of a layer; LiteText counts its mixers as layers."""
  if target.startswith(MIXERS[1]):
    return config.text.layers + 1
  return layer + (target.startswith("text/blocks/") and has_mixers(config))


def _layers(stack: str, config: Config) -> int:
  video = config.video or VideoConfig()
  return {
    "trunk/blocks": config.trunk.blocks,
    "text/blocks": config.text.layers,
    "geometry/layers": config.geometry_layers,
    "fusion/layers": config.fusion_layers,
    "decoder/layers": config.decoder_layers,
    "visual/prompt/label_embedding": LABELS,
    "visual/decoder/mask_mlp": MASKS,
    "video/memory_attention/layers": video.layers,
    "video/memory_encoder/blocks": video.blocks,
  }[stack]


def _slot(target: str, layer: int, config: Config) -> Slot:
  if "*" not in target:
    return target, ()
  stack, _, rest = target.partition("/*")
  if stack != "trunk/blocks":
    return f"{stack}{rest}", (layer,)
  # The trunk is stacked in groups: a few windowed blocks, then one with global attention.
  group, member = divmod(layer, config.trunk.windowed + 1)
  if member == config.trunk.windowed:
    return f"trunk/groups/global{rest}", (group,)
  return f"trunk/groups/windowed{rest}", (group, member)
