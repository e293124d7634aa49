"""Error messages for sources that lack tensors or whole parts of the model."""

from collections.abc import Mapping
from pathlib import Path

from sam3_jax.config import Config

from .parts import DETECTOR, WORDS, list_words, parts_of
from .plan import Plan, raise_incomplete
from .source import Source
from .table import Table

_MORE = 4  # if a config asks for this many times the file's tensors, do not list the missing ones


def check_parts(table: Table, sources: Mapping[str, Source], weights: Path) -> None:
  """Raises ValueError that names the absent parts of the model, rather than each tensor."""
  counts = parts_of(table.name).count(table.canonical(name) for name in sources)
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
      "enable_segmentation: False save it). Use --base CHECKPOINT to take it from a converted "
      "checkpoint, such as that of facebook/sam3."
    )
  present = list_words(part for part in WORDS if counts[part])
  has = (
    f"has only {present} of SAM 3, without" if len(absent) > len(DETECTOR) / 2 else "has no part of"
  )
  raise ValueError(
    f"{weights} {has} {list_words(absent)}. If they were left out on purpose, use --base "
    "CHECKPOINT to take them from a converted checkpoint; else give the file of the whole model."
  )


def check_size(table: Table, sources: Mapping[str, Source], config: Config, weights: Path) -> None:
  """Refuses a model far too large for its file, before its tensors are listed one by one."""
  expected = table.tensors(config)
  if expected > _MORE * len(sources):
    counts = parts_of(table.name).count(table.canonical(name) for name in sources)
    present = list_words(part for part in WORDS if counts[part])
    raise ValueError(
      f"{weights} has {len(sources):,} tensors, but its configuration needs {expected:,}"
      f"{f', and only some of {present}' if present else ''}: it is a part of a model, or its "
      "config.json is of another model; give the file of the whole model."
    )


def raise_faults_of(planned: Plan, faults: list[str], weights: Path) -> None:
  """Raises ValueError for all faults, or with a summary if most tensors are missing."""
  expected = (
    len(planned.missing)
    + len(planned.entries)
    - sum(name in planned.entries for name in planned.missing)
  )
  if len(planned.missing) > expected / 2:
    parts = parts_of(planned.table.name)
    present = parts.count(planned.sources)
    missing = parts.count(planned.missing)
    counts = [
      f"{WORDS[part]} {present[part]:,} of {present[part] + missing[part]:,}"
      for part in WORDS
      if present[part] + missing[part]
    ]
    raise ValueError(
      f"{weights} has few of the tensors that SAM 3 has in the layout {planned.table.name}: "
      f"{', '.join(counts)}. Give the file of the whole model, with its config.json beside it."
    )
  raise_incomplete(planned.table, faults, str(weights))
