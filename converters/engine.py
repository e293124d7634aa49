"""Carries out a table of rules, forwards and back.

Nothing is read before every name and every shape has been accounted for, and then one top-level
part of the tree at a time, layer by layer into the stacked arrays. All faults are told together.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from sam3_jax.config import Config
from sam3_jax.utils.param_tree import flatten, nest, raise_faults

from .layouts.unread import DETECTOR
from .rules import Entry, Rule, Source, Table

DERIVED_ATOL = 1e-4  # Meta rounds angles of up to 24 radians to float32, a few times over
READABLE = ("float32", "bfloat16", "float16")
REMEDY = "Give the whole model's state_dict, as its training or its release saved it."
SKIPPED = "a class token's row: cut off before use"


@dataclasses.dataclass(frozen=True)
class Plan:
  """A source whose every tensor is accounted for, ready to be read.

  Attributes:
    entries: the tensors that are read, by canonical name.
    unread: the ones that are kept, with the reason.
    dropped: the ones that are not, with the reason.
    sources: all of them.
    missing: the names that a complete source has and this one has not.
    direct: reads a parameter of our tree that the layout has no name for from the base checkpoint.
  """

  table: Table
  config: Config
  shapes: Mapping[str, tuple[int, ...]]
  sources: Mapping[str, Source]
  entries: Mapping[str, Entry]
  unread: Mapping[str, str]
  dropped: Mapping[str, str]
  missing: tuple[str, ...] = ()
  direct: Mapping[str, Callable[[], np.ndarray]] = dataclasses.field(default_factory=dict)

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
    groups = {
      group: [name for name in names if not self.sources[name].made]
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
      if entry.rule.skip and not self.sources[name].made
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
    for path, read in self.direct.items():
      if path in arrays:
        arrays[path][...] = read()
    return nest(arrays)[part]

  def read_unread(self, faults: list[str]) -> dict[str, np.ndarray]:
    """The tensors that are kept as they are, in the source's dtype."""
    kept = {name: self.sources[name].read() for name in self.unread}
    for name, entry in self.entries.items():
      if entry.rule.skip:
        head = self.sources[name].read()[:, : entry.rule.skip]
        if head.any() or not self.sources[name].made:  # a base without it gives zeros
          kept[skipped_name(name, entry.rule)] = head
    for name, array in kept.items():
      if not np.isfinite(array).all():
        faults.append(f"{name} holds values that are not finite")
    return kept


def plan(
  table: Table, sources: Mapping[str, Source], shapes: Mapping[str, tuple[int, ...]], config: Config
) -> Plan:
  """Accounts for every tensor, or raises one ValueError that lists all faults; see `account`."""
  planned, faults = account(table, sources, shapes, config)
  raise_incomplete(table, faults)
  return planned


def raise_incomplete(table: Table, faults: list[str], where: str = "this") -> None:
  raise_faults(
    faults, f"{where} is no complete SAM 3 checkpoint in the layout {table.name}", REMEDY
  )


def account(
  table: Table,
  sources: Mapping[str, Source],
  shapes: Mapping[str, tuple[int, ...]],
  config: Config,
  *,
  optional: Callable[[str], bool] = lambda name: False,
  direct: Mapping[str, Callable[[], np.ndarray]] | None = None,
) -> tuple[Plan, list[str]]:
  """What becomes of every tensor, and all that is wrong with them, a line each.

  Args:
    table: the source's layout.
    sources: its tensors, under its own names.
    shapes: of our arrays by path; what the model wants, see `checkpoint.expected_shapes`.
    config: the model's.
    optional: whether a tensor that nothing reads may be missing.
    direct: see `Plan`.
  """
  entries = table.entries(config, visual=_has_visual(shapes))
  faults, found = [], {}
  for original, source in sources.items():
    name = table.canonical(original)
    if name in found:
      faults.append(f"{source.name or original} is there twice, as {name} too")
    found[name] = source
  wanted = {name: entry.shape(shapes, config) for name, entry in entries.items()}
  facts = table.kept(config, found)
  parts = {DETECTOR, *(part for name, (part, _) in facts.items() if name in found)}
  kept = {name: fact for name, fact in facts.items() if name not in wanted}
  wanted |= {
    name: shape
    for name, (part, shape) in kept.items()
    if part in parts and (name in found or not optional(name))
  }
  dropped = {name: why for name in found if (why := table.reason(table.dropped, name))}
  unread = {name: table.reason(table.unread, name) or "" for name in found if name in kept}
  for name, source in found.items():
    said = source.name or name
    if name not in wanted and name not in dropped:
      faults.append(f"{said} {list(source.shape)} is not a name of this layout and configuration")
    elif name in wanted and source.dtype not in (readable := _readable(wanted[name])):
      faults.append(f"{said} is {source.dtype}; expected one of {', '.join(readable)}")
  missing = tuple(name for name in wanted if name not in found)
  for name, shape in wanted.items():
    if name not in found:
      faults.append(f"{_spelled(name, table, found)} is missing")
    elif found[name].shape != shape:
      said = found[name].name or name
      faults.append(f"{said} is {list(found[name].shape)}; expected {list(shape)}")
  faults += _lone_dtypes(found, wanted) + _derived(table.derived(config, found), found, dropped)
  if faults:
    faults += _not_finite(found)
  planned = Plan(table, config, shapes, found, entries, unread, dropped, missing, direct or {})
  return planned, faults


def convert_arrays(
  table: Table,
  arrays: Mapping[str, np.ndarray],
  shapes: Mapping[str, tuple[int, ...]],
  config: Config,
  dtype: str = "float32",
) -> dict[str, Any]:
  """The whole tree in memory, for small models; raises as `plan` does."""
  sources = {name: Source.of(array) for name, array in arrays.items()}
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
  for name, entry in table.entries(config, visual=_has_visual(flat)).items():
    yield name, restore(name, entry, flat, unread, config)
  yield from ((name, array) for name, array in unread.items() if "[" not in name)


def restore(
  name: str,
  entry: Entry,
  flat: Mapping[str, np.ndarray],
  unread: Mapping[str, np.ndarray],
  config: Config,
) -> np.ndarray:
  """A tensor of the layout from our arrays by path; see `export_arrays`."""
  array = entry.rule.join((flat[path][index] for path, index in entry.slots), config)
  if not entry.rule.skip:
    return array
  shape = (array.shape[0], entry.rule.skip, *array.shape[2:])
  head = unread.get(skipped_name(name, entry.rule), np.zeros(shape, array.dtype))
  return np.concatenate([head.astype(array.dtype), array], axis=1)


def skipped_name(name: str, item: Rule) -> str:
  """What `unread` calls the entries of a tensor that its rule skips."""
  return f"{name}[:, :{item.skip}]"


def _spelled(name: str, table: Table, found: Mapping[str, Source]) -> str:
  """A name as the file would have it: without the table's prefix, or with another before it."""
  bare = name.removeprefix(table.prefix)
  for other, source in found.items():
    rest = other.removeprefix(table.prefix)
    if rest != other and source.name.endswith(rest):
      start = source.name.removesuffix(rest)
      return f"{start}{bare}" if bare != name else name
  return name


def _has_visual(paths: Iterable[str]) -> bool:
  return any(path.startswith("visual/") for path in paths)


def _readable(shape: tuple[int, ...]) -> tuple[str, ...]:
  return READABLE if shape else ("int64",)  # nothing but a counter has no axes


def _lone_dtypes(sources: Mapping[str, Source], names: Iterable[str]) -> list[str]:
  """A tensor that differs in dtype from all the others: nobody saves one that way on purpose."""
  dtypes: dict[str, list[str]] = {}
  for name in names:
    if name in sources and not sources[name].made and sources[name].dtype in READABLE:
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
  """Tensors that are computed anew, which a source must have as we compute them, or not at all."""
  faults = []
  for name in dropped:
    if name not in computed:
      faults.append(f"{name} is not a name of this layout and configuration")
      continue
    source, wanted = sources[name], computed[name]
    if (source.shape, source.dtype) != (wanted.shape, wanted.dtype):
      faults.append(
        f"{name} is {source.dtype} {list(source.shape)}; expected {wanted.dtype} "
        f"{list(wanted.shape)}"
      )
    elif not np.allclose(source.read(), wanted.read(), rtol=0, atol=DERIVED_ATOL):
      faults.append(f"{name} differs from what its configuration gives")
  missing = [name for name in computed if name not in dropped] if dropped else []
  return faults + [f"{name} is missing" for name in missing]


def _not_finite(sources: Mapping[str, Source]) -> list[str]:
  return [
    f"{source.name or name} holds values that are not finite"
    for name, source in sources.items()
    if source.dtype in READABLE and not source.made and not np.isfinite(source.read()).all()
  ]
