"""The engine of conversion: which tensor of a source goes where, forwards and back.

A `Table` names every tensor of one layout: the ones that are read, each with its place in our tree
and the change of layout on the way, and the ones that are not, each with the reason. Nothing is
read before every name and every shape has been accounted for, and then one top-level part of the
tree at a time, layer by layer into the stacked arrays. All faults are reported together.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

from sam3_jax.config import Config
from sam3_jax.trees import flatten, nest, raise_faults

READABLE = ("float32", "bfloat16", "float16")
REMEDY = "Download or save the checkpoint again."


@dataclasses.dataclass(frozen=True)
class Source:
  """A tensor of a source, not read yet; `read` may return a view of a memory map."""

  shape: tuple[int, ...]
  dtype: str
  read: Callable[[], np.ndarray]

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
  """

  name: str
  prefix: str
  rules: tuple[Rule, ...]
  unread: Mapping[str, str]
  dropped: Mapping[str, str]
  canonical: Callable[[str], str]

  def entries(self, config: Config) -> "dict[str, Entry]":
    """Every tensor that a source of this layout must have, by canonical name."""
    entries = {}
    for item in self.rules:
      target = item.targets[0]
      if target.startswith("geometry/point_") and not config.concept_points:
        continue
      stack = target.partition("/*/")[0] if "*" in target else None
      for i in range(_layers(stack, config)) if stack else (0,):
        slots = tuple(_slot(target, i, config) for target in item.targets)
        entries[self.prefix + item.source.replace("*", str(i))] = Entry(item, slots)
    return entries

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


@dataclasses.dataclass(frozen=True)
class Plan:
  """A source whose every tensor is accounted for, ready to be read.

  Attributes:
    entries: the tensors that are read, by canonical name.
    unread: the ones that are kept, with the reason.
    dropped: the ones that are not, with the reason.
    sources: all of them.
  """

  table: Table
  config: Config
  shapes: Mapping[str, tuple[int, ...]]
  sources: Mapping[str, Source]
  entries: Mapping[str, Entry]
  unread: Mapping[str, str]
  dropped: Mapping[str, str]

  @property
  def parts(self) -> list[str]:
    return list(dict.fromkeys(path.partition("/")[0] for path in self.shapes))

  def parameters(self, part: str | None = None) -> int:
    """How many our tree has, or a part of it."""
    return sum(
      math.prod(shape)
      for path, shape in self.shapes.items()
      if part is None or path.startswith(f"{part}/")
    )

  def reasons(self) -> dict[str, str]:
    """Why nothing reads what `read_unread` keeps."""
    skipped = {
      skipped_name(name, entry.rule): SKIPPED
      for name, entry in self.entries.items()
      if entry.rule.skip
    }
    return {**self.unread, **skipped}

  def counts(self) -> dict[str, dict[str, int]]:
    """What became of the source's tensors; a skipped row counts as an unread parameter."""
    groups = {"read": self.entries, "unread": self.unread, "dropped": self.dropped}
    counts = {
      group: {
        "tensors": len(names),
        "parameters": sum(self.sources[name].parameters for name in names),
      }
      for group, names in groups.items()
    }
    skipped = sum(
      math.prod(self.sources[name].shape) // self.sources[name].shape[1] * entry.rule.skip
      for name, entry in self.entries.items()
      if entry.rule.skip
    )
    counts["read"]["parameters"] -= skipped
    counts["unread"]["parameters"] += skipped
    return counts

  def read(self, part: str, dtype: str, faults: list[str]) -> dict[str, Any]:
    """A top-level part of the tree, in the wanted dtype; appends to `faults` what is not finite."""
    arrays = {
      path: np.empty(shape, jnp.dtype(dtype))
      for path, shape in self.shapes.items()
      if path.startswith(f"{part}/")
    }
    for name, entry in self.entries.items():
      if entry.part != part:
        continue
      pieces = entry.rule.split(self.sources[name].read(), self.config)
      for (path, index), piece in zip(entry.slots, pieces, strict=True):
        layer = arrays[path][index]
        layer[...] = piece
        if not np.isfinite(layer).all():
          faults.append(f"{name} holds values that are not finite in {dtype}")
          break
    return nest(arrays)[part]

  def read_unread(self, faults: list[str]) -> dict[str, np.ndarray]:
    """The tensors that are kept as they are, in the source's dtype."""
    kept = {name: self.sources[name].read() for name in self.unread}
    for name, entry in self.entries.items():
      if entry.rule.skip:
        kept[skipped_name(name, entry.rule)] = self.sources[name].read()[:, : entry.rule.skip]
    for name, array in kept.items():
      if not np.isfinite(array).all():
        faults.append(f"{name} holds values that are not finite")
    return kept


SKIPPED = "a class token's row: cut off before use"


def skipped_name(name: str, item: Rule) -> str:
  """What `unread` calls the entries of a tensor that its rule skips."""
  return f"{name}[:, :{item.skip}]"


def plan(
  table: Table, sources: Mapping[str, Source], shapes: Mapping[str, tuple[int, ...]], config: Config
) -> Plan:
  """Accounts for every tensor, or raises one ValueError that lists all faults.

  Args:
    table: the source's layout.
    sources: its tensors, under its own names.
    shapes: of our arrays by path; what the model wants, see `checkpoint.expected_shapes`.
    config: the model's.
  """
  entries = table.entries(config)
  faults, found = [], {}
  for original, source in sources.items():
    name = table.canonical(original)
    if name in found:
      faults.append(f"{original} is there twice, as {name} too")
    found[name] = source
  unread, dropped = {}, {}
  for name, source in found.items():
    unread_reason, dropped_reason = (
      table.reason(kind, name) for kind in (table.unread, table.dropped)
    )
    if dropped_reason:
      dropped[name] = dropped_reason
    elif name not in entries and not unread_reason:
      faults.append(f"{name} {list(source.shape)} is not a name of this layout and configuration")
    elif source.dtype not in READABLE:
      faults.append(f"{name} is {source.dtype}; expected one of {', '.join(READABLE)}")
    elif unread_reason:
      unread[name] = unread_reason
      if source.parameters == 0:
        faults.append(f"{name} {list(source.shape)} is empty")
  for name, entry in entries.items():
    if name not in found:
      faults.append(f"{name} is missing")
    elif found[name].shape != (shape := entry.shape(shapes, config)):
      faults.append(f"{name} is {list(found[name].shape)}; expected {list(shape)}")
  if faults:
    faults += _not_finite(found)
  raise_faults(faults, f"this is no complete SAM 3 checkpoint in the layout {table.name}", REMEDY)
  return Plan(table, config, shapes, found, entries, unread, dropped)


def convert_arrays(
  table: Table,
  arrays: Mapping[str, np.ndarray],
  shapes: Mapping[str, tuple[int, ...]],
  config: Config,
  dtype: str = "float32",
) -> dict[str, Any]:
  """The whole tree in memory, for small models; raises as `plan` does."""
  sources = {name: Source(a.shape, str(a.dtype), lambda a=a: a) for name, a in arrays.items()}
  planned, faults = plan(table, sources, shapes, config), []
  params = {part: planned.read(part, dtype, faults) for part in planned.parts}
  raise_faults(faults, "these arrays cannot be used", REMEDY)
  return params


def export_arrays(
  table: Table, params: Mapping[str, Any], unread: Mapping[str, np.ndarray], config: Config
) -> Iterator[tuple[str, np.ndarray]]:
  """The way back: every tensor of the layout, one at a time.

  Args:
    table: the layout that is wanted.
    params: our tree, of NumPy arrays.
    unread: what `Plan.read_unread` kept of a source in the same layout; what it skipped is zero
      where this lacks it.
    config: the model's.
  """
  flat = flatten(params)
  for name, entry in table.entries(config).items():
    array = entry.rule.join((flat[path][index] for path, index in entry.slots), config)
    if entry.rule.skip:
      shape = (array.shape[0], entry.rule.skip, *array.shape[2:])
      head = unread.get(skipped_name(name, entry.rule), np.zeros(shape, array.dtype))
      array = np.concatenate([head, array], axis=1)
    yield name, array
  yield from ((name, array) for name, array in unread.items() if "[" not in name)


def _layers(stack: str, config: Config) -> int:
  return {
    "trunk/blocks": config.trunk.blocks,
    "text/blocks": config.text.layers,
    "geometry/layers": config.geometry_layers,
    "fusion/layers": config.fusion_layers,
    "decoder/layers": config.decoder_layers,
  }[stack]


def _slot(target: str, layer: int, config: Config) -> tuple[str, tuple[int, ...]]:
  if "*" not in target:
    return target, ()
  stack, _, rest = target.partition("/*/")
  if stack != "trunk/blocks":
    return f"{stack}/{rest}", (layer,)
  # The trunk is stacked by groups: some windowed blocks, then one that attends globally.
  group, member = divmod(layer, config.trunk.windowed + 1)
  if member == config.trunk.windowed:
    return f"trunk/groups/global/{rest}", (group,)
  return f"trunk/groups/windowed/{rest}", (group, member)


def _not_finite(sources: Mapping[str, Source]) -> list[str]:
  return [
    f"{name} holds values that are not finite"
    for name, source in sources.items()
    if source.dtype in READABLE and not np.isfinite(source.read()).all()
  ]
