"""Names of tensors without what training programs wrap around a model.

DDP, FSDP, torch.compile, Lightning and others put a segment of their own into the name of every
tensor of a module: `module.`, `_orig_mod.`, `model.`, nested in any order and at any depth. No list
of them is complete. So a wrapper is recognized by its position: it is the only child of its module,
the layout knows no child of that name there, and the names below it fit once it is left out.
"""

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

from sam3_jax.config import RELEASED, LiteTextConfig

from .layouts import huggingface, keras_hub, meta
from .rules import Table

FORMATS: dict[str, ModuleType] = {"huggingface": huggingface, "meta": meta, "keras": keras_hub}
TABLES: dict[str, Table] = {
  table.name: table
  for table in (huggingface.TABLE, huggingface.LITE, meta.TABLE, meta.MULTIPLEX, keras_hub.TABLE)
}
ANYTHING = "*"  # below it every name fits

Segments = tuple[str, ...]
Node = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A model among the tensors of a file.

  Attributes:
    layout: a key of `FORMATS`.
    prefix: what stands before all of its names, as segments.
    names: its tensors, each with its name in the layout.
    fitting: how many of these the layout knows.
  """

  layout: str
  prefix: Segments
  names: dict[str, str]
  fitting: int


def find_candidates(layout: str, names: Iterable[str]) -> list[Candidate]:
  """The models of a layout among these names, in the order of their names."""
  found: list[Candidate] = []
  separator, root = separator_of(layout), known_names(layout)

  def visit(group: dict[str, Segments], prefix: Segments) -> None:
    inside = {name: rest for name, rest in group.items() if normal(rest[0]) in root}
    stripped, fitting = _unwrap(inside, root) if inside else ({}, 0)
    if fitting:
      joined = {name: separator.join(rest) for name, rest in stripped.items()}
      found.append(Candidate(layout, prefix, joined, fitting))
    else:
      inside = {}
    for child, below in _children({n: r for n, r in group.items() if n not in inside}).items():
      deeper = {name: rest for name, rest in below.items() if rest}
      if deeper:
        visit(deeper, (*prefix, child))

  visit({name: tuple(name.split(separator)) for name in names}, ())
  return found


def separator_of(layout: str) -> str:
  return "/" if layout == "keras" else "."


def normal(segment: str) -> str:
  """A segment without its number, which a model of another size may have too."""
  return re.sub(r"_?\d+", "", segment)


@functools.cache
def known_names(layout: str) -> Node:
  """The segments of all names of a layout, with each way of writing them, as a tree."""
  root: Node = {}
  for name in (*_every_name(layout), *_other_spellings(layout)):
    node = root
    for segment in name.split(separator_of(layout)):
      node = node.setdefault(segment if segment == ANYTHING else normal(segment), {})
  return root


def canonical_names(table: Table) -> dict[str, str]:
  """Every name of a table for the released sizes, and the place of the tensor in our tree; for one
  that nothing reads, the place is empty."""
  lite = table is huggingface.LITE
  config = dataclasses.replace(RELEASED, text=LiteTextConfig()) if lite else RELEASED
  memory: dict[str, Any] = {
    "tracker.transformer.encoder.layers.3.norm1.weight": None,
    "tracker_model.memory_attention.layers.3.layer_norm1.weight": None,
  }
  names = dict.fromkeys(table.kept(config, memory if table.visual else {}), "")
  names |= dict.fromkeys(table.derived(config, {}), "")
  entries = table.entries(config, visual=bool(table.visual))
  return names | {name: entry.slots[0][0] for name, entry in entries.items()}


def _every_name(layout: str) -> list[str]:
  tables = [table for name, table in TABLES.items() if name.partition(",")[0] == layout]
  return [name for table in tables for name in canonical_names(table)]


def _other_spellings(layout: str) -> list[str]:
  """What `canonical` of the layout makes the names of its table of."""
  names = _every_name(layout)
  if layout == "huggingface":
    bare = [n.removeprefix("detector_model.") for n in names if n.startswith("detector_model.")]
    within = [f"tracker_model.{n}" for n in names]  # of Sam3TrackerModel, or doubled
    return [*bare, *within]
  if layout == "meta":
    bare = [n.removeprefix("detector.") for n in names if n.startswith("detector.")]
    inner = [n.removeprefix("tracker.") for n in names if n.startswith("tracker.")]
    within = [f"inst_interactive_predictor.model.{n}" for n in inner]
    return [*bare, *within, *(f"detector.{n}" for n in within), f"tracker.model.{ANYTHING}"]
  return []


def _unwrap(names: dict[str, Segments], node: Node) -> tuple[dict[str, Segments], int]:
  """The names below a node without wrappers, and how many of them fit."""
  if ANYTHING in node:
    return names, len(names)
  ended = [name for name, rest in names.items() if not rest]
  going = {name: rest for name, rest in names.items() if rest}
  children = _children(going)
  if not any(normal(child) in node for child in children):
    fitting = 0 if node else len(ended)
    if len(children) == 1 and node and not ended:
      ((_, below),) = children.items()
      if all(below.values()):
        inner, fitting = _unwrap(below, node)
        if fitting:
          return inner, fitting
    return names, fitting
  unwrapped = dict.fromkeys(ended, ())
  fitting = 0
  for child, below in children.items():
    inner, fits = _unwrap(below, node[normal(child)]) if normal(child) in node else (below, 0)
    unwrapped |= {name: (child, *rest) for name, rest in inner.items()}
    fitting += fits
  return {name: unwrapped[name] for name in names}, fitting


def _children(names: Mapping[str, Segments]) -> dict[str, dict[str, Segments]]:
  """What is left of the names after their first segment, by that segment."""
  children: dict[str, dict[str, Segments]] = {}
  for name, rest in names.items():
    children.setdefault(rest[0], {})[name] = rest[1:]
  return children
