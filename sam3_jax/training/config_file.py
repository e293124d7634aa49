"""Configuration files of training runs: reading, command line overrides, and comparison."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sam3_jax.training.config import TrainConfig
from sam3_jax.utils.json_text import parse


def read(path: str | Path) -> dict[str, Any]:
  """Reads the values of a TOML or JSON file, for `TrainConfig.from_dict`.

  Raises:
    FileNotFoundError: no such file.
    ValueError: it is not valid, or holds no table.
  """
  path = Path(path)
  if not path.is_file():
    raise FileNotFoundError(f"configuration {path} not found; check the path.")
  try:
    text = path.read_text(encoding="utf-8")
    values = tomllib.loads(text) if path.suffix == ".toml" else parse(text, "it")
  except ValueError as error:  # of TOML, JSON and UTF-8
    raise ValueError(
      f"{path} is not readable {path.suffix.lstrip('.') or 'JSON'}: {error}."
    ) from error
  if not isinstance(values, dict):
    raise ValueError(f"{path} must hold one object with fields such as steps; got {values!r:.40}.")
  return values


def override(values: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a copy of `values` with the options that are not None in it.

  Args:
    values: nested plain values.
    options: values by field name, `a.b` for field `b` of the table `a`. A path becomes text.
  """
  result = dict(values)
  for name, value in options.items():
    if value is None:
      continue
    table, _, field = name.rpartition(".")
    value = str(value) if isinstance(value, Path) else value
    if not table:
      result[field] = value
      continue
    inner = result.get(table, {})
    result[table] = {**inner, field: value} if isinstance(inner, Mapping) else inner
  return result


def with_defaults(values: Any) -> Any:
  """Fills in the defaults of missing fields, which an earlier release did not have yet.

  Values that are no valid configuration are returned as they are.
  """
  try:
    return TrainConfig.from_dict(values).to_dict()
  except ValueError:
    return values


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
  """Names of the fields whose values differ, `a.b` for nested ones."""
  found = []
  for name in [*old, *(name for name in new if name not in old)]:
    before, after = old.get(name), new.get(name)
    if isinstance(before, Mapping) and isinstance(after, Mapping):
      found += differences(before, after, f"{prefix}{name}.")
    elif before != after:
      found.append(prefix + name)
  return found
