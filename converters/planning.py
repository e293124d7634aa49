"""What becomes of every tensor of a model that was found in a file.

Its table and its configuration, what comes from a base checkpoint, and what is wrong with it, in
words that name what was given.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from sam3_jax.checkpoint.bundle import expected_shapes
from sam3_jax.config import RELEASED, Config
from sam3_jax.utils.json_text import parse

from . import adapters
from .base import Base, check_same_size
from .checks import read_text
from .engine import Plan, account, raise_incomplete
from .infer import infer_config
from .layouts import huggingface, keras_hub, meta
from .parts import DETECTOR, WORDS, list_words, parts_of
from .rules import Source, Table
from .selection import Selection
from .wrappers import FORMATS

_MORE = 4  # times as many tensors as a file has: not worth listing what is missing
_FEW = 20  # faults of a file that is the released one but for them


def plan_selection(
  chosen: Selection,
  sources: Mapping[str, Source],
  weights: Path,
  config: Config | None,
  base: Base | None,
  settings: adapters.Settings | None,
) -> Plan:
  """Accounts for every tensor of a selection, LoRA merged."""
  layout, tensors = FORMATS[chosen.layout], chosen.tensors
  names = [*tensors, *chosen.modules.values()]
  table = _table(layout, names, base)
  if chosen.factors or chosen.adapter:
    tensors = _canonical(table, tensors)
    whole = (base.sources(table) if base and chosen.adapter else {}) | tensors
    modules = {module: table.canonical(name) for module, name in chosen.modules.items()}
    merged = adapters.merge(chosen.factors, sources, modules, whole, settings, str(weights))
    tensors = (whole if chosen.adapter else tensors) | merged
  return plan_source(layout, tensors, weights, config, base, table)


def plan_source(
  layout: ModuleType,
  sources: Mapping[str, Source],
  weights: Path,
  config: Config | None,
  base: Base | None = None,
  table: Table | None = None,
) -> Plan:
  """Accounts for every tensor.

  A size that was read off a damaged tensor would make all others wrong: without a configuration the
  released one is tried too, and the shorter list of faults is told.
  """
  table, path = table or _table(layout, sources, base), weights.parent / "config.json"
  shapes = functools.partial(expected_shapes, visual=table.has_visual(sources))
  if config is None and path.exists() and hasattr(layout, "read_config"):
    config = layout.read_config(_read_json(path), str(path))
  if base:
    return plan_on(base, table, sources, weights, config)
  if config is not None:
    _check_size(table, sources, config, weights)
    _check_parts(table, sources, weights)
    planned, faults = account(table, sources, shapes(config), config)
    _raise_incomplete(planned, faults, weights)
    return planned
  _check_parts(table, sources, weights)
  if layout is keras_hub or table is huggingface.LITE:
    raise FileNotFoundError(f"{path} is missing; it belongs beside the weights.")
  error, faults, planned = None, [], None
  try:
    config = infer_config(table, {name: source.shape for name, source in sources.items()})
    _check_size(table, sources, config, weights)
    planned, faults = account(table, sources, shapes(config), config)
    if not faults:
      return planned
  except ValueError as unclear:
    error = unclear
  released = dataclasses.replace(RELEASED, concept_points=layout is meta)
  second, others = account(table, sources, shapes(released), released)
  if not others:
    return second
  if error and len(others) > _FEW:
    raise ValueError(f"{weights}: {error}") from error
  if planned is None or len(others) < len(faults):
    planned, faults = second, others
  _raise_incomplete(planned, faults, weights)
  return planned


def plan_on(
  base: Base, table: Table, sources: Mapping[str, Source], weights: Path, config: Config | None
) -> Plan:
  """Likewise, with the base's tensors for the parts of which the source has none."""
  if config is not None:
    check_same_size(config, base, str(weights.parent / "config.json"))
  own = _canonical(table, sources)
  parts = parts_of(table.name)
  there = {part for part, count in parts.in_file(own).items() if count}

  def is_absent(name: str) -> bool:
    return bool(part := parts.of(name)) and part not in there

  theirs = base.sources(table)
  added = {n: source for n, source in theirs.items() if n not in own and is_absent(n)}
  whole = own | added
  points = [name for name in whole if "geometry_encoder.points_" in name]
  has_points = bool(points) if any(_is_point(rule.targets[0]) for rule in table.rules) else None
  config = dataclasses.replace(
    base.config,
    concept_points=base.config.concept_points if has_points is None else has_points,
  )
  visual = table.has_visual(whole) or (base.visual and not table.visual)
  shapes = expected_shapes(config, visual=visual)
  entries = table.entries(config, visual=visual and bool(table.visual))
  filled = {path for entry in entries.values() for path, _ in entry.slots}
  direct = {path: functools.partial(base.read, path) for path in shapes if path not in filled}
  planned, faults = account(table, whole, shapes, config, optional=is_absent, direct=direct)
  _raise_incomplete(planned, faults, weights, base)
  return planned


def _canonical(table: Table, sources: Mapping[str, Source]) -> dict[str, Source]:
  """The tensors by their names in the table; refuses two of one name."""
  found: dict[str, Source] = {}
  for name, source in sources.items():
    if (target := table.canonical(name)) in found:
      raise ValueError(
        f"{source.name or name} is there twice, as {found[target].name or target} too."
      )
    found[target] = source
  return found


def _is_point(target: str) -> bool:
  return target.startswith("geometry/point_")


def _check_parts(table: Table, sources: Mapping[str, Source], weights: Path) -> None:
  """Says which parts of the model a file lacks as a whole, rather than each of their tensors."""
  counts = parts_of(table.name).in_file(table.canonical(name) for name in sources)
  absent = [part for part in DETECTOR if not counts[part]]
  if not absent:
    return
  tracker = counts["visual"] or any("prompt_encoder." in name for name in sources)
  if tracker and {*absent} >= {*DETECTOR} - {"trunk", "neck"}:
    model = " (Sam3TrackerModel: no text encoder, no detector)" if table.name != "meta" else ""
    raise ValueError(
      f"{weights} holds only SAM 3's tracker{model}; convert the model.safetensors of "
      "facebook/sam3 (Sam3VideoModel) or of Sam3Model, or sam3.pt."
    )
  if absent == ["masks"]:
    raise ValueError(
      f"{weights} holds SAM 3 without the segmentation head (as Meta's recipes with "
      "enable_segmentation: False save it). Say --base CHECKPOINT to take it from a converted "
      "checkpoint, such as that of facebook/sam3."
    )
  there = list_words(part for part in WORDS if counts[part])
  has = (
    f"has only {there} of SAM 3, without" if len(absent) > len(DETECTOR) / 2 else "has no part of"
  )
  raise ValueError(
    f"{weights} {has} {list_words(absent)}. If they were left out on purpose, say --base "
    "CHECKPOINT to take them from a converted checkpoint; else give the file of the whole model."
  )


def _raise_incomplete(
  planned: Plan, faults: list[str], weights: Path, base: Base | None = None
) -> None:
  """Raises ValueError for all faults; one that sums them up where most tensors are not there."""
  wanted = (
    len(planned.missing)
    + len(planned.entries)
    - sum(name in planned.entries for name in planned.missing)
  )
  if len(planned.missing) > wanted / 2:
    parts = parts_of(planned.table.name)
    counts = parts.in_file(planned.sources)
    lost = parts.in_file(planned.missing)
    said = [
      f"{WORDS[part]} {counts[part]:,} of {counts[part] + lost[part]:,}"
      for part in WORDS
      if counts[part] + lost[part]
    ]
    raise ValueError(
      f"{weights} has few of the tensors that SAM 3 has in the layout {planned.table.name}: "
      f"{', '.join(said)}. Give the file of the whole model, and its config.json beside it."
    )
  raise_incomplete(planned.table, faults, str(weights))


def _check_size(table: Table, sources: Mapping[str, Source], config: Config, weights: Path) -> None:
  """Refuses a model far too large for its file before its tensors are listed, one by one."""
  wanted = table.tensors(config)
  if wanted > _MORE * len(sources):
    counts = parts_of(table.name).in_file(table.canonical(name) for name in sources)
    there = list_words(part for part in WORDS if counts[part])
    raise ValueError(
      f"{weights} has {len(sources):,} tensors, where its configuration wants {wanted:,}"
      f"{f', and only some of {there}' if there else ''}: it is a part of a model, or its "
      "config.json is of another one; give the file of the whole model."
    )


def _table(layout: ModuleType, names: Iterable[str], base: Base | None) -> Table:
  """The layout's table for the models that these names, or that of the base, are of."""
  names = list(names)
  if layout is meta and meta.is_multiplex(names):
    return meta.MULTIPLEX
  if layout is huggingface:
    encoder = any("text_encoder." in name for name in names)
    if huggingface.is_lite(names) or (base and base.lite and not encoder):
      return huggingface.LITE
  return layout.TABLE


def _read_json(path: Path) -> Any:
  try:
    return parse(read_text(path), "it")
  except ValueError as error:
    raise ValueError(f"{path} is not readable JSON ({error}); download it again.") from error
