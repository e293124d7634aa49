"""Reference tables of the configuration fields, read from the dataclasses and their sources."""

import dataclasses
import inspect
import json
import re
import sys
import textwrap
import types
import typing
from collections.abc import Iterator
from typing import Any, NamedTuple

from cells import cell

from sam3_jax.config import (
  Config,
  LiteTextConfig,
  StemConfig,
  TextConfig,
  TrunkConfig,
  VideoConfig,
)
from sam3_jax.inference.mask_generator import MaskGeneration
from sam3_jax.rules import Rules
from sam3_jax.training.config import TrainConfig
from sam3_jax.utils.field_docs import field_docs

# Units that a name or a description implies; the first pattern that matches decides.
UNITS = (
  (r"accumulation", "count"),
  (r"seed$", "integer"),
  (r"grad_norm$", "L2 norm"),
  (r"^(image_size|size)$", "pixels"),
  (r"^mask_size$", "cells"),
  (r"^(patch)$", "pixels"),
  (r"(^|_)width$", "channels"),
  (r"(^|_)(steps|every|cooldown|timescale|warmup)($|_)", "steps"),
  (r"_(weight|alpha)$|^cost_", "factor"),
  (r"(learning_rate|decay|multipliers|scale|beta\d|epsilon|norm)$", "factor"),
  (r"(_iou|iou_).*thresh|nms_thresh", "IoU"),
  (r"_area$", "pixels"),
)
COUNTED = {int: "count", float: "number"}  # where nothing else is known


class Field(NamedTuple):
  """A row of the reference: everything as text."""

  name: str
  type: str
  default: str
  unit: str
  text: str


def pages() -> str:
  """Markdown of all configuration classes: a heading and a table each."""
  trained = dict(_tables(TrainConfig))
  model = {
    "": Config,
    "trunk": TrunkConfig,
    "trunk.stem": StemConfig,
    "text": TextConfig,
    "text (LiteText)": LiteTextConfig,
    "video": VideoConfig,
    "video.rules": Rules,
  }
  parts = [
    "## Training (`sam3-jax train`)\n\n"
    "A TOML or JSON file. A heading in brackets is a table of the file.\n"
  ]
  parts += [_section(name, cls, "###") for name, cls in trained.items()]
  parts.append("## Model (`config.json`)\n\nThe defaults are the sizes of the released model.\n")
  parts += [_section(name, cls, "###") for name, cls in model.items()]
  parts.append("## Mask generator (`generate_masks`, `segment --everything`)\n")
  parts.append(_section("options", MaskGeneration, "###"))
  return "\n".join(parts)


def fields(cls: type) -> list[Field]:
  """The fields of a dataclass in order, with the words of its metadata, docstring or comments."""
  written = _attributes(cls) | {name: text for name, text in field_docs(cls).items() if text}
  hints = typing.get_type_hints(cls)
  rows = []
  for field in dataclasses.fields(cls):
    told = field.metadata.get("help") or field.metadata.get("doc") or written.get(field.name, "")
    hint = hints[field.name]
    unit = field.metadata.get("unit") or _unit(field.name, told) or COUNTED.get(hint, "")
    rows.append(Field(field.name, _type(hint), _default(field), unit, told))
  return rows


def _section(name: str, cls: type, heading: str) -> str:
  title = f"`[{name}]`" if name else "Top level"
  source = f"`{cls.__module__}.{cls.__qualname__}`"
  rows = [
    f"| `{row.name}` | {cell(row.type)} | {cell(row.default)} | {row.unit} | {cell(row.text)} |"
    for row in fields(cls)
  ]
  table = "\n".join(["| field | type | default | unit | meaning |", "|---|---|---|---|---|", *rows])
  return f"{heading} {title}\n\n{source}\n\n{table}\n"


def _tables(cls: type, prefix: str = "") -> Iterator[tuple[str, type]]:
  """A configuration class and the tables within it, by their names in a file."""
  yield prefix, cls
  hints = typing.get_type_hints(cls)
  for field in dataclasses.fields(cls):
    inner = _dataclass(hints[field.name])
    if inner is not None and inner is not Config:
      yield from _tables(inner, f"{prefix}.{field.name}".lstrip("."))


def _dataclass(hint: Any) -> type | None:
  options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
  return next((one for one in options if dataclasses.is_dataclass(one)), None)


def _attributes(cls: type) -> dict[str, str]:
  """Field descriptions in the section `Attributes:` of a docstring."""
  _, _, section = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")
  section = re.split(r"\n(?=\S)", section)[0]  # up to the next section
  found: dict[str, str] = {}
  for entry in re.split(r"\n(?=\S)", textwrap.dedent(section)):
    names, _, text = entry.partition(":")
    found |= {name.strip(): " ".join(text.split()) for name in names.split(",")}
  return found


def _unit(name: str, text: str) -> str:
  for pattern, unit in UNITS:
    if re.search(pattern, name):
      return unit
  near = re.match(
    r"(?:\w+ )?(pixels|cells|patches|steps|tokens|images|channels|seconds)\b", text, re.IGNORECASE
  )
  if near:
    return near[1].lower()
  if re.match(r"(probability|fraction)\b", text, re.IGNORECASE) or "in [0, 1]" in text:
    return "0 to 1"
  if "as a fraction of" in text:
    return "fraction"
  return ""


def _type(hint: Any) -> str:
  if isinstance(hint, types.UnionType):
    return " or ".join(dict.fromkeys(_type(one) for one in typing.get_args(hint)))
  if dataclasses.is_dataclass(hint):
    return "table"
  if hint is types.NoneType:
    return "none"
  if typing.get_origin(hint) is tuple:
    inner = [_type(one) for one in typing.get_args(hint) if one is not ...]
    return f"list of {', '.join(dict.fromkeys(inner))}"
  return getattr(hint, "__name__", str(hint))


def _default(field: dataclasses.Field) -> str:
  if field.default_factory is not dataclasses.MISSING:
    return _shown(field.default_factory())
  return "required" if field.default is dataclasses.MISSING else _shown(field.default)


def _shown(value: Any) -> str:
  if dataclasses.is_dataclass(value):
    return "see its table"
  if isinstance(value, float):
    return f"`{value:.4g}`"
  if value is None:
    return "none"
  return f"`{json.dumps(value)}`" if value != "" else "empty"  # as in TOML


if __name__ == "__main__":
  sys.stdout.write(pages())
