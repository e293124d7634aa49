"""The language of conversion: which tensor of a source goes where, and how its layout changes.

A `Table` names every tensor of one layout: the ones that are read, each with its place in our tree
and the change of layout on the way, and the ones that are not, each with the reason. `engine.py`
carries it out; every change can be undone, for the way back.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import numpy as np

from sam3_jax.config import Config, LiteTextConfig

# Rows of a table and copies of an MLP in the head for visual prompts: SAM 2's.
LABELS, MASKS = 4, 4
MIXERS = "text/first/", "text/last/"  # before and after the layers of LiteText's encoder


@dataclasses.dataclass(frozen=True)
class Source:
  """A tensor of a source, not read yet.

  Attributes:
    shape: of it.
    dtype: as stored.
    read: returns the array, which may be a view of a memory map.
    container: keys, joined by dots, of the dictionary in the file that holds it; most files are
      one dictionary, and then it is empty.
    made: whether it is not in the file, but taken from the base checkpoint or merged.
    name: in the file, for messages; empty for that of the layout.
  """

  shape: tuple[int, ...]
  dtype: str
  read: Callable[[], np.ndarray]
  container: str = ""
  made: bool = False
  name: str = ""

  @classmethod
  def of(cls, array: np.ndarray) -> "Source":
    return cls(array.shape, str(array.dtype), lambda: array)

  @property
  def parameters(self) -> int:
    return math.prod(self.shape)


class Transform(Protocol):
  """A change of layout that can be undone."""

  def apply(self, array: np.ndarray, config: Config) -> np.ndarray: ...

  def undo(self, array: np.ndarray, config: Config) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Axes:
  """Puts the source's axes into this order."""

  order: tuple[int, ...]

  def apply(self, array: np.ndarray, config: Config) -> np.ndarray:
    return np.transpose(array, self.order)

  def undo(self, array: np.ndarray, config: Config) -> np.ndarray:
    return np.transpose(array, np.argsort(self.order))


class HalfSplit:
  """Rows of the trunk's queries and keys: each head's channels 0, 2, 4 .. before its 1, 3, 5 ..

  The sources rotate adjacent channels, we rotate channel i with channel i + half.
  """

  def apply(self, array: np.ndarray, config: Config) -> np.ndarray:
    pairs = array.reshape(config.trunk.heads, -1, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)

  def undo(self, array: np.ndarray, config: Config) -> np.ndarray:
    halves = array.reshape(config.trunk.heads, 2, -1, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)


class Grid:
  """A position table [1, n * n, width] as [n, n, width]."""

  def apply(self, array: np.ndarray, config: Config) -> np.ndarray:
    side = config.trunk.pretrain_grid
    return array.reshape(side, side, array.shape[-1])

  def undo(self, array: np.ndarray, config: Config) -> np.ndarray:
    return array.reshape(1, -1, array.shape[-1])


@dataclasses.dataclass(frozen=True)
class Without:
  """Leaves out these axes, of one entry each."""

  axes: tuple[int, ...]

  def apply(self, array: np.ndarray, config: Config) -> np.ndarray:
    return np.squeeze(array, self.axes)

  def undo(self, array: np.ndarray, config: Config) -> np.ndarray:
    return np.expand_dims(array, self.axes)


class Point:
  """The kernel of a convolution of one cell [out, in, 1, 1] as that of a dense layer."""

  def apply(self, array: np.ndarray, config: Config) -> np.ndarray:
    return array[:, :, 0, 0].T

  def undo(self, array: np.ndarray, config: Config) -> np.ndarray:
    return array.T[:, :, None, None]


POINT = Point()
DENSE = Axes((1, 0))  # torch's (out, in)
CONV = Axes((2, 3, 1, 0))  # torch's (out, in, rows, columns)
DECONV = Axes((2, 3, 0, 1))  # torch's ConvTranspose2d: (in, out, rows, columns)


@dataclasses.dataclass(frozen=True)
class Rule:
  """One tensor of a source, or one in each layer.

  Attributes:
    source: its name, with `*` for the layer's number.
    targets: its place in our tree, with `*` likewise; three places for fused q, k, v rows.
    transforms: what is done, in this order, to each target's rows.
    skip: leading entries of axis 1 that nothing reads; `unread` keeps them, see `skipped_name`.
  """

  source: str
  targets: tuple[str, ...]
  transforms: tuple[tuple[Transform, ...], ...]
  skip: int = 0

  def split(self, array: np.ndarray, config: Config) -> list[np.ndarray]:
    """The source's tensor as our arrays, one a target."""
    pieces = np.split(array[:, self.skip :] if self.skip else array, len(self.targets))
    for number, chain in enumerate(self.transforms):
      for transform in chain:
        pieces[number] = transform.apply(pieces[number], config)
    return pieces

  def join(self, arrays: Iterable[np.ndarray], config: Config) -> np.ndarray:
    """Inverse of `split`, but for the skipped entries, which it leaves out."""
    pieces = list(arrays)
    for number, chain in enumerate(self.transforms):
      for transform in reversed(chain):
        pieces[number] = transform.undo(pieces[number], config)
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def rule(source: str, target: str, *transforms: Transform, skip: int = 0) -> tuple[Rule]:
  return (Rule(source, (target,), (transforms,), skip),)


def dense(source: str, target: str, *before: Transform, kernel: Transform = DENSE):
  """The weight and bias of a dense layer or a convolution; `before` acts on rows of outputs."""
  return (
    *rule(f"{source}.weight", f"{target}/kernel", *before, kernel),
    *rule(f"{source}.bias", f"{target}/bias", *before),
  )


def norm(source: str, target: str) -> tuple[Rule, ...]:
  return (
    *rule(f"{source}.weight", f"{target}/scale"),
    *rule(f"{source}.bias", f"{target}/bias"),
  )


@dataclasses.dataclass(frozen=True)
class Table:
  """A layout. Patterns of `unread` and `dropped` are regular expressions for whole names.

  Attributes:
    name: what `convert --format` calls it.
    prefix: stands before the name of every rule's tensor.
    rules: the tensors that are read.
    unread: the ones that are kept beside the parameters, with the reason.
    dropped: the ones that are not kept at all, with the reason.
    canonical: the name in this table of a tensor of a source; two may not become one.
    kept: of a model of this size with tensors of these names, the part and the shape of each that
      is not read. A part other than DETECTOR may be absent as a whole.
    derived: of a model of this size, the tensors of `dropped`, which are computed anew, from
      others of the source if need be; none before it is asked for, if it may be large.
    number: how the number of a layer is written.
    visual: the tensors of visual prompts, by whole names; a source may lack their head, and then
      what it has of them is unread.
    visual_parts: what the names of that head and of its neck start with.
  """

  name: str
  prefix: str
  rules: tuple[Rule, ...]
  unread: Mapping[str, str]
  dropped: Mapping[str, str]
  canonical: Callable[[str], str]
  kept: Callable[[Config, Mapping[str, Any]], Mapping[str, tuple[str, tuple[int, ...]]]]
  derived: Callable[[Config, Mapping[str, Source]], Mapping[str, Source]] = lambda *_: {}
  number: Callable[[int], str] = str
  visual: tuple[Rule, ...] = ()
  visual_parts: tuple[str, ...] = ()

  def entries(self, config: Config, *, visual: bool = False) -> "dict[str, Entry]":
    """Every tensor that a source of this layout must have, by canonical name; with `visual`, those
    of visual prompts too."""
    entries = {}
    names = [(self.prefix + item.source, item) for item in self.rules]
    names += [(item.source, item) for item in self.visual if visual]
    for source, item in names:
      target = item.targets[0]
      if target.startswith("geometry/point_") and not config.concept_points:
        continue
      if target.startswith(MIXERS) and not has_mixers(config):
        continue
      stack = target.partition("/*")[0] if "*" in target else None
      for i in range(_layers(stack, config)) if stack else (0,):
        slots = tuple(_slot(target, i, config) for target in item.targets)
        entries[source.replace("*", self.number(_number(target, i, config)))] = Entry(item, slots)
    return entries

  def tensors(self, config: Config) -> int:
    """About how many of them are read, without listing them: a configuration may say anything."""
    return sum(
      _layers(item.targets[0].partition("/*")[0], config) if "*" in item.targets[0] else 1
      for item in self.rules
    )

  def has_visual(self, names: Iterable[str]) -> bool:
    """Whether a source with tensors of these names has the head for visual prompts, or a part of
    it and of its neck."""
    found = [self.canonical(name) for name in names]
    there = (any(name.startswith(part) for name in found) for part in self.visual_parts)
    return bool(self.visual) and all(there)

  def reason(self, kind: Mapping[str, str], name: str) -> str | None:
    return next((why for pattern, why in kind.items() if re.fullmatch(pattern, name)), None)


@dataclasses.dataclass(frozen=True)
class Entry:
  """A tensor's rule, and for each of its targets the array and the index of the layer in it."""

  rule: Rule
  slots: tuple[tuple[str, tuple[int, ...]], ...]

  @property
  def part(self) -> str:
    return self.slots[0][0].partition("/")[0]

  def shape(self, shapes: Mapping[str, tuple[int, ...]], config: Config) -> tuple[int, ...]:
    """The source's shape, given those of our arrays; no memory is used."""
    empty = (np.broadcast_to(np.int8(0), shapes[path][len(index) :]) for path, index in self.slots)
    shape = self.rule.join(empty, config).shape
    return (shape[0], shape[1] + self.rule.skip, *shape[2:]) if self.rule.skip else shape


def has_mixers(config: Config) -> bool:
  """Whether the text encoder is one of LiteText's with a mixer on either side of its layers."""
  return isinstance(config.text, LiteTextConfig) and config.text.mixers


def _number(target: str, layer: int, config: Config) -> int:
  """The number that a source gives a layer: LiteText's mixers are among those of its layers."""
  if target.startswith(MIXERS[1]):
    return config.text.layers + 1
  return layer + (target.startswith("text/blocks/") and has_mixers(config))


def _layers(stack: str, config: Config) -> int:
  return {
    "trunk/blocks": config.trunk.blocks,
    "text/blocks": config.text.layers,
    "geometry/layers": config.geometry_layers,
    "fusion/layers": config.fusion_layers,
    "decoder/layers": config.decoder_layers,
    "visual/prompt/label_embedding": LABELS,
    "visual/decoder/mask_mlp": MASKS,
  }[stack]


def _slot(target: str, layer: int, config: Config) -> tuple[str, tuple[int, ...]]:
  if "*" not in target:
    return target, ()
  stack, _, rest = target.partition("/*")
  if stack != "trunk/blocks":
    return f"{stack}{rest}", (layer,)
  # The trunk is stacked by groups: some windowed blocks, then one that attends globally.
  group, member = divmod(layer, config.trunk.windowed + 1)
  if member == config.trunk.windowed:
    return f"trunk/groups/global{rest}", (group,)
  return f"trunk/groups/windowed{rest}", (group, member)
