"""Plans a conversion: matches every tensor of a source with its layout's table, then reads them.

Nothing is read before all names and shapes have been matched. Then one top-level part of the
parameter tree is read at a time, layer by layer into the stacked arrays. All faults are reported
together.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from sam3_jax.config import Config
from sam3_jax.utils.param_tree import nest, raise_faults

from .layouts.unread import DETECTOR
from .source import Source
from .table import Entry, Table

DERIVED_ATOL = 1e-4  # Meta rounds angles of up to 24 radians to float32 several times
READABLE = ("float32", "bfloat16", "float16")
REMEDY = "Give the whole model's state_dict, as its training or its release saved it."
SKIPPED = "a class token's row: cut off before use"


@dataclasses.dataclass(frozen=True)
class Plan:
  """A source whose tensors have all been matched, ready to be read.

  Attributes:
    table: the source's layout.
    config: the model's configuration.
    shapes: the shape of each of our arrays, by path.
    sources: all tensors of the source, by canonical name.
    entries: the tensors that the model reads.
    unread: the tensors that are kept beside the parameters, with the reason.
    dropped: the tensors that are not kept, with the reason.
    missing: names that a complete source has and this one lacks.
    from_base: for each parameter that the layout has no name for, a function that reads it from
      the base checkpoint.
  """

  table: Table
  config: Config
  shapes: Mapping[str, tuple[int, ...]]
  sources: Mapping[str, Source]
  entries: Mapping[str, Entry]
  unread: Mapping[str, str]
  dropped: Mapping[str, str]
  missing: tuple[str, ...] = ()
  from_base: Mapping[str, Callable[[], np.ndarray]] = dataclasses.field(default_factory=dict)

  @property
  def parts(self) -> list[str]:
    return list(dict.fromkeys(path.partition("/")[0] for path in self.shapes))

  def parameter_count(self, part: str | None = None) -> int:
    """The number of parameters of our tree, or of one of its parts."""
    return sum(
      math.prod(shape)
      for path, shape in self.shapes.items()
      if part is None or path.startswith(f"{part}/")
    )

  def reasons(self) -> dict[str, str]:
    """The reason why the model does not read each tensor that `read_unread` returns."""
    skipped = {
      entry.rule.skipped_name(name): SKIPPED
      for name, entry in self.entries.items()
      if entry.rule.skip
    }
    return {**self.unread, **skipped}

  def counts(self) -> dict[str, dict[str, int]]:
    """Tensors and parameters of the source that are read, unread and dropped.

    The entries that a rule skips count as unread parameters.
    """
    groups = {
      group: [name for name in names if self.sources[name].in_file]
      for group, names in (
        ("read", self.entries),
        ("unread", self.unread),
        ("dropped", self.dropped),
      )
    }
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
      if entry.rule.skip and self.sources[name].in_file
    )
    counts["read"]["parameters"] -= skipped
    counts["unread"]["parameters"] += skipped
    return counts

  def read(self, part: str, dtype: str, faults: list[str]) -> dict[str, Any]:
    """Reads a top-level part of the tree in `dtype`; appends non-finite tensors to `faults`."""
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
    for path, read in self.from_base.items():
      if path in arrays:
        arrays[path][...] = read()
    return nest(arrays)[part]

  def read_unread(self, faults: list[str]) -> dict[str, np.ndarray]:
    """Reads the unread tensors in the source's dtype; appends non-finite ones to `faults`."""
    kept = {name: self.sources[name].read() for name in self.unread}
    for name, entry in self.entries.items():
      if entry.rule.skip:
        head = self.sources[name].read()[:, : entry.rule.skip]
        if head.any() or self.sources[name].in_file:  # a base without these entries supplies zeros
          kept[entry.rule.skipped_name(name)] = head
    for name, array in kept.items():
      if not np.isfinite(array).all():
        faults.append(f"{name} holds values that are not finite")
    return kept


def plan(
  table: Table, sources: Mapping[str, Source], shapes: Mapping[str, tuple[int, ...]], config: Config
) -> Plan:
  """Plans a conversion; see `match_tensors`.

  Raises:
    ValueError: with all faults in one line.
  """
  planned, faults = match_tensors(table, sources, shapes, config)
  raise_incomplete(table, faults)
  return planned


def raise_incomplete(table: Table, faults: list[str], where: str = "this") -> None:
  """Raises ValueError if there are faults; `where` names the source."""
  raise_faults(
    faults, f"{where} is not a complete SAM 3 checkpoint in the layout {table.name}", REMEDY
  )


def match_tensors(
  table: Table,
  sources: Mapping[str, Source],
  shapes: Mapping[str, tuple[int, ...]],
  config: Config,
  *,
  optional: Callable[[str], bool] = lambda name: False,
  from_base: Mapping[str, Callable[[], np.ndarray]] | None = None,
) -> tuple[Plan, list[str]]:
  """Returns a plan and the list of its faults, one line each.

  Args:
    table: the source's layout.
    sources: its tensors, under its own names.
    shapes: the shapes of our arrays by path; see `checkpoint.expected_shapes`.
    config: the model's configuration.
    optional: whether an unread tensor may be missing.
    from_base: see `Plan`.
  """
  faults: list[str] = []
  found = _canonical_sources(table, sources, faults)
  entries = table.entries(config, visual=has_visual(shapes))
  expected = {name: entry.shape(shapes, config) for name, entry in entries.items()}
  every_unread = table.unread_shapes(config, found)
  parts = {DETECTOR, *(part for name, (part, _) in every_unread.items() if name in found)}
  unread_shapes = {name: value for name, value in every_unread.items() if name not in expected}
  expected |= {
    name: shape
    for name, (part, shape) in unread_shapes.items()
    if part in parts and (name in found or not optional(name))
  }
  dropped = {name: why for name in found if (why := table.reason(table.dropped, name))}
  unread = {name: table.reason(table.unread, name) or "" for name in found if name in unread_shapes}
  missing = tuple(name for name in expected if name not in found)
  faults += _unexpected(found, expected, dropped)
  faults += _missing_or_misshaped(table, found, expected)
  faults += _lone_dtypes(found, expected)
  faults += _derived(table.derived(config, found), found, dropped)
  if faults:
    faults += _not_finite(found)
  planned = Plan(table, config, shapes, found, entries, unread, dropped, missing, from_base or {})
  return planned, faults


def has_visual(paths: Iterable[str]) -> bool:
  """Whether these paths of our tree include the head for visual prompts."""
  return any(path.startswith("visual/") for path in paths)


def _canonical_sources(
  table: Table, sources: Mapping[str, Source], faults: list[str]
) -> dict[str, Source]:
  """The tensors by canonical name; appends duplicates to `faults`."""
  found: dict[str, Source] = {}
  for original, source in sources.items():
    name = table.canonical(original)
    if name in found:
      faults.append(f"{source.name or original} is there twice, as {name} too")
    found[name] = source
  return found


def _unexpected(
  found: Mapping[str, Source],
  expected: Mapping[str, tuple[int, ...]],
  dropped: Mapping[str, str],
) -> list[str]:
  """Tensors of unknown names, and tensors whose dtype cannot be read."""
  faults = []
  for name, source in found.items():
    shown = source.name or name
    if name not in expected:
      if name not in dropped:
        faults.append(
          f"{shown} {list(source.shape)} is not a name of this layout and configuration"
        )
      continue
    readable = READABLE if expected[name] else ("int64",)  # only counters are scalars
    if source.dtype not in readable:
      faults.append(f"{shown} is {source.dtype}; expected one of {', '.join(readable)}")
  return faults


def _missing_or_misshaped(
  table: Table, found: Mapping[str, Source], expected: Mapping[str, tuple[int, ...]]
) -> list[str]:
  faults = []
  for name, shape in expected.items():
    if name not in found:
      faults.append(f"{_name_in_file(name, table, found)} is missing")
    elif found[name].shape != shape:
      shown = found[name].name or name
      faults.append(f"{shown} is {list(found[name].shape)}; expected {list(shape)}")
  return faults


def _name_in_file(name: str, table: Table, found: Mapping[str, Source]) -> str:
  """The name that a missing tensor would have in the file, judged by the prefix of the others."""
  bare = name.removeprefix(table.prefix)
  for other, source in found.items():
    rest = other.removeprefix(table.prefix)
    if rest != other and source.name.endswith(rest):
      start = source.name.removesuffix(rest)
      return f"{start}{bare}" if bare != name else name
  return name


def _lone_dtypes(sources: Mapping[str, Source], names: Iterable[str]) -> list[str]:
  """A tensor whose dtype differs from that of all others, which nobody saves on purpose."""
  dtypes: dict[str, list[str]] = {}
  for name in names:
    if name in sources and sources[name].in_file and sources[name].dtype in READABLE:
      dtypes.setdefault(sources[name].dtype, []).append(name)
  most = max(dtypes, key=lambda dtype: len(dtypes[dtype]), default="")
  return [
    f"{found[0]} is {dtype}, all others are not; most are {most}"
    for dtype, found in dtypes.items()
    if dtype != most and len(found) == 1
  ]


def _derived(
  computed: Mapping[str, Source], sources: Mapping[str, Source], dropped: Mapping[str, str]
) -> list[str]:
  """Checks derived tensors: a source must have all of them, with our values, or none."""
  faults = []
  for name in dropped:
    if name not in computed:
      faults.append(f"{name} is not a name of this layout and configuration")
      continue
    source, expected = sources[name], computed[name]
    if (source.shape, source.dtype) != (expected.shape, expected.dtype):
      faults.append(
        f"{name} is {source.dtype} {list(source.shape)}; expected {expected.dtype} "
        f"{list(expected.shape)}"
      )
    elif not np.allclose(source.read(), expected.read(), rtol=0, atol=DERIVED_ATOL):
      faults.append(f"{name} differs from what its configuration gives")
  missing = [name for name in computed if name not in dropped] if dropped else []
  return faults + [f"{name} is missing" for name in missing]


def _not_finite(sources: Mapping[str, Source]) -> list[str]:
  return [
    f"{source.name or name} holds values that are not finite"
    for name, source in sources.items()
    if source.dtype in READABLE and source.in_file and not np.isfinite(source.read()).all()
  ]
