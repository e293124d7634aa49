"""Plans the conversion of a model that was found in a file.

Chooses the layout's table and the configuration, merges LoRA, and takes absent parts from a base
checkpoint; `incomplete.py` explains what is missing.
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
from .adapter_config import LoraSettings
from .base import Base, check_same_size
from .bounds import read_text
from .incomplete import check_parts, check_size, raise_faults_of
from .infer import infer_config
from .layouts import huggingface, keras_hub, meta
from .parts import parts_of
from .plan import Plan, match_tensors
from .selection import Selection
from .source import Source
from .table import Table
from .wrappers import FORMATS

_FEW = 20  # a file with at most this many faults is taken for a damaged released one


def plan_selection(
  chosen: Selection,
  sources: Mapping[str, Source],
  weights: Path,
  config: Config | None,
  base: Base | None,
  settings: LoraSettings | None,
) -> Plan:
  """Plans the conversion of a selection, with LoRA merged.

  Args:
    chosen: the model found in the file.
    sources: all tensors of the file, by their names there.
    weights: the file, whose directory may have a config.json.
    config: the model's configuration; None reads or infers it.
    base: the base checkpoint.
    settings: of LoRA.
  """
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
  """Plans the conversion of a model; raises ValueError with all faults in one line.

  Args:
    layout: one of the values of `FORMATS`.
    sources: the model's tensors, by their names in the layout.
    weights: the file, whose directory may have a config.json.
    config: the model's configuration; None reads config.json, or infers it from the shapes.
    base: the base checkpoint, for the parts that the source lacks.
    table: the layout's table for these tensors; None finds it.
  """
  table, path = table or _table(layout, sources, base), weights.parent / "config.json"
  shapes = functools.partial(expected_shapes, visual=table.has_visual(sources))
  if config is None and path.exists() and hasattr(layout, "read_config"):
    config = layout.read_config(_read_json(path), str(path))
  if base:
    return plan_with_base(base, table, sources, weights, config)
  if config is not None:
    config = table.with_video(config, sources)
    check_size(table, sources, config, weights)
    check_parts(table, sources, weights)
    planned, faults = match_tensors(table, sources, shapes(config), config)
    raise_faults_of(planned, faults, weights)
    return planned
  check_parts(table, sources, weights)
  if layout is keras_hub or table is huggingface.LITE:
    raise FileNotFoundError(f"{path} is missing; it belongs beside the weights.")
  return _plan_inferred(layout, sources, weights, table)


def plan_with_base(
  base: Base, table: Table, sources: Mapping[str, Source], weights: Path, config: Config | None
) -> Plan:
  """Plans like `plan_source`, taking the parts that the source lacks as a whole from `base`."""
  if config is not None:
    check_same_size(config, base, str(weights.parent / "config.json"))
  own = _canonical(table, sources)
  parts = parts_of(table.name)
  present = {part for part, count in parts.count(own).items() if count}

  def is_absent(name: str) -> bool:
    return bool(part := parts.of(name)) and part not in present

  added = {n: x for n, x in base.sources(table).items() if n not in own and is_absent(n)}
  whole = own | added
  config = dataclasses.replace(base.config, concept_points=_has_points(table, whole, base))
  if table.video_rules:  # else the tracker is the base's, if it has one
    config = table.with_video(config, whole)
  visual = table.has_visual(whole) or (base.visual and not table.visual_rules)
  shapes = expected_shapes(config, visual=visual)
  entries = table.entries(config, visual=visual and bool(table.visual_rules))
  filled = {path for entry in entries.values() for path, _ in entry.slots}
  from_base = {path: functools.partial(base.read, path) for path in shapes if path not in filled}
  planned, faults = match_tensors(
    table, whole, shapes, config, optional=is_absent, from_base=from_base
  )
  raise_faults_of(planned, faults, weights)
  return planned


def _plan_inferred(
  layout: ModuleType, sources: Mapping[str, Source], weights: Path, table: Table
) -> Plan:
  """Plans with a configuration inferred from the shapes, or with the released one.

  A size that was inferred from a damaged tensor would contradict all other tensors. So the released
  configuration is tried too, and the shorter list of faults is reported.
  """
  shapes = functools.partial(expected_shapes, visual=table.has_visual(sources))
  error, faults, planned = None, [], None
  try:
    config = infer_config(table, {name: source.shape for name, source in sources.items()})
    check_size(table, sources, config, weights)
    planned, faults = match_tensors(table, sources, shapes(config), config)
    if not faults:
      return planned
  except ValueError as unclear:
    error = unclear
  released = dataclasses.replace(RELEASED, concept_points=layout is meta)
  released = table.with_video(released, sources)
  second, others = match_tensors(table, sources, shapes(released), released)
  if not others:
    return second
  if error and len(others) > _FEW:
    raise ValueError(f"{weights}: {error}") from error
  if planned is None or len(others) < len(faults):
    planned, faults = second, others
  raise_faults_of(planned, faults, weights)
  return planned


def _has_points(table: Table, names: Iterable[str], base: Base) -> bool:
  """Whether the model has concept points: the names show it, if the layout has names for them."""
  if any(rule.targets[0].startswith("geometry/point_") for rule in table.rules):
    return any("geometry_encoder.points_" in name for name in names)
  return base.config.concept_points


def _canonical(table: Table, sources: Mapping[str, Source]) -> dict[str, Source]:
  """The tensors by canonical name; refuses two of the same name."""
  found: dict[str, Source] = {}
  for name, source in sources.items():
    if (target := table.canonical(name)) in found:
      raise ValueError(
        f"{source.name or name} is there twice, as {found[target].name or target} too."
      )
    found[target] = source
  return found


def _table(layout: ModuleType, names: Iterable[str], base: Base | None) -> Table:
  """The layout's table for a model with these names, or for the base if they do not show it."""
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
