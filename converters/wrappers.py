"""Removes the wrapper segments that training programs add to tensor names.

DDP, FSDP, torch.compile, Lightning and others add a segment to the name of every tensor of a
module: `module.`, `_orig_mod.`, `model.`, nested in any order and at any depth. No list of them is
complete. So a wrapper is recognized by its position: it is the only child of its module, the layout
knows no child of that name there, and the names below it match once it is removed.
"""

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

from sam3_jax.config import RELEASED, LiteTextConfig, VideoConfig

from .layouts import huggingface, keras_hub, meta
from .table import Table

FORMATS: dict[str, ModuleType] = {"huggingface": huggingface, "meta": meta, "keras": keras_hub}
TABLES: dict[str, Table] = {
  table.name: table
  for table in (huggingface.TABLE, huggingface.LITE, meta.TABLE, meta.MULTIPLEX, keras_hub.TABLE)
}
ANYTHING = "*"  # every name below it matches

Segments = tuple[str, ...]
Node = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A model among the tensors of a file.

  Attributes:
    layout: a key of `FORMATS`.
    prefix: the common prefix of its names, as segments.
    names: its tensors, each with its name in the layout.
    matching: how many of these names the layout knows.
  """

  layout: str
  prefix: Segments
  names: dict[str, str]
  matching: int


def find_candidates(layout: str, names: Iterable[str]) -> list[Candidate]:
  """Finds the models of a layout among these names, in the order of the names."""
  found: list[Candidate] = []
  separator, root = separator_of(layout), known_names(layout)

  def visit(group: dict[str, Segments], prefix: Segments) -> None:
    inside = {name: rest for name, rest in group.items() if normal(rest[0]) in root}
    stripped, matching = _unwrap(inside, root) if inside else ({}, 0)
    if matching:
      joined = {name: separator.join(rest) for name, rest in stripped.items()}
      found.append(Candidate(layout, prefix, joined, matching))
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
  """A segment without its number, so that names of models of all sizes are equal."""
  return re.sub(r"_?\d+", "", segment)


@functools.cache
def known_names(layout: str) -> Node:
  """All names of a layout in all their spellings, as a tree of segments."""
  root: Node = {}
  for name in (*_every_name(layout), *_other_spellings(layout)):
    node = root
    for segment in name.split(separator_of(layout)):
      node = node.setdefault(segment if segment == ANYTHING else normal(segment), {})
  return root


def canonical_names(table: Table) -> dict[str, str]:
  """Every name of a table for the released sizes, with its path in our tree.

  The path is empty for tensors that the model does not read.
  """
  config = dataclasses.replace(RELEASED, video=VideoConfig())
  if table is huggingface.LITE:
    config = dataclasses.replace(config, text=LiteTextConfig())
  memory: dict[str, Any] = {
    "tracker.transformer.encoder.layers.3.norm1.weight": None,
    "tracker_model.memory_attention.layers.3.layer_norm1.weight": None,
  }
  names = dict.fromkeys(table.unread_shapes(config, memory if table.visual_rules else {}), "")
  names |= dict.fromkeys(table.derived(config, {}), "")
  entries = table.entries(config, visual=bool(table.visual_rules))
  return names | {name: entry.slots[0][0] for name, entry in entries.items()}


def _every_name(layout: str) -> list[str]:
  tables = [table for name, table in TABLES.items() if name.partition(",")[0] == layout]
  return [name for table in tables for name in canonical_names(table)]


def _other_spellings(layout: str) -> list[str]:
  """Names that the layout's `canonical` maps to names of its table."""
  names = _every_name(layout)
  if layout == "huggingface":
    bare = [n.removeprefix("detector_model.") for n in names if n.startswith("detector_model.")]
    within = [f"tracker_model.{n}" for n in names]  # Sam3TrackerModel, or the prefix doubled
    return [*bare, *within]
  if layout == "meta":
    bare = [n.removeprefix("detector.") for n in names if n.startswith("detector.")]
    inner = [n.removeprefix("tracker.") for n in names if n.startswith("tracker.")]
    within = [f"inst_interactive_predictor.model.{n}" for n in inner]
    return [*bare, *within, *(f"detector.{n}" for n in within), f"tracker.model.{ANYTHING}"]
  return []


def _unwrap(names: dict[str, Segments], node: Node) -> tuple[dict[str, Segments], int]:
  """The names below a node without wrappers, and how many of them match."""
  if ANYTHING in node:
    return names, len(names)
  ended = [name for name, rest in names.items() if not rest]
  children = _children({name: rest for name, rest in names.items() if rest})
  if len(children) == 1 and not ended:
    ((child, below),) = children.items()
    if ANYTHING in node.get(normal(child), {}) and all(below.values()):
      # SAM 3.1's `tracker.model`, unless all names below it are those of SAM 3's tracker
      inner, matching = _unwrap(below, {k: v for k, v in node.items() if k != normal(child)})
      if matching == len(names):
        return inner, matching
  if not any(normal(child) in node for child in children):
    matching = 0 if node else len(ended)
    if len(children) == 1 and node and not ended:
      ((_, below),) = children.items()
      if all(below.values()):
        inner, matching = _unwrap(below, node)
        if matching:
          return inner, matching
    return names, matching
  unwrapped = dict.fromkeys(ended, ())
  matching = 0
  for child, below in children.items():
    inner, matches = _unwrap(below, node[normal(child)]) if normal(child) in node else (below, 0)
    unwrapped |= {name: (child, *rest) for name, rest in inner.items()}
    matching += matches
  return {name: unwrapped[name] for name in names}, matching


def _children(names: Mapping[str, Segments]) -> dict[str, dict[str, Segments]]:
  """Groups the names by their first segment, which is removed."""
  children: dict[str, dict[str, Segments]] = {}
  for name, rest in names.items():
    children.setdefault(rest[0], {})[name] = rest[1:]
  return children
