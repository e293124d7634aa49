"""Dataclasses from nested plain values (of JSON or TOML), with checks of fields and types."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any

from sam3_jax.utils.json_text import shown


def from_dict(
  cls: type, values: Any, where: str = "", *, what: str = "", complete: str | None = None
) -> Any:
  """Builds a dataclass, and the dataclasses that its fields hold.

  A field may be a bool, int, float, str, dataclass, union of dataclasses and None, or tuple of
  these. A whole number may stand for a float, and a table for a tuple of pairs.

  Args:
    cls: the dataclass.
    values: field names and values.
    where: the position of `values` in the file, for messages, such as "model.trunk".
    what: what a field belongs to, for messages, such as "a training configuration".
    complete: if given, every field must be there; the remedy if one is not, for the message. None
      gives missing fields their defaults.

  Raises:
    ValueError: an unknown or missing field, or a value of another type, in one line.
  """
  if not isinstance(values, Mapping):
    raise ValueError(
      f"{where or 'it'} must be an object with the fields of {cls.__name__}; got {shown(values)}."
    )
  known = typing.get_type_hints(cls)
  if complete is None:
    _check_names(cls, values, where, what)
  elif values.keys() != known.keys():
    raise ValueError(
      f"{where} must have exactly the fields of {cls.__name__}; unknown: "
      f"{shown(sorted(values.keys() - known.keys()))}, missing: "
      f"{sorted(known.keys() - values.keys())}. {complete}"
    )
  prefix = f"{where}." if where else ""
  return cls(
    **{
      name: _value(value, known[name], prefix + name, what, complete)
      for name, value in values.items()
    }
  )


def _check_names(cls: type, values: Mapping[str, Any], where: str, what: str) -> None:
  """Refuses unknown fields, and missing ones that have no default."""
  fields = {field.name: field for field in dataclasses.fields(cls)}
  prefix = f"{where}." if where else ""
  for name in values:
    if name not in fields:
      close = difflib.get_close_matches(str(name), fields, n=1)
      hint = f"did you mean {close[0]}?" if close else f"{cls.__name__} has {', '.join(fields)}."
      raise ValueError(f"{shown(f'{prefix}{name}')} is not a field of {what}; {hint}")
  missing = [
    name
    for name, field in fields.items()
    if name not in values
    and field.default is dataclasses.MISSING
    and field.default_factory is dataclasses.MISSING
  ]
  if missing:
    raise ValueError(f"{where or cls.__name__} lacks {', '.join(missing)}.")


def _value(value: Any, expected: Any, where: str, what: str, complete: str | None) -> Any:
  """A value of the expected type."""
  if dataclasses.is_dataclass(expected):
    cls = typing.cast(type, expected)
    return from_dict(cls, value, where, what=what, complete=complete)
  if isinstance(expected, types.UnionType):
    kinds = [kind for kind in typing.get_args(expected) if kind is not types.NoneType]
    if value is None and len(kinds) < len(typing.get_args(expected)):
      return None
    kind = next((kind for kind in kinds if _has_fields(kind, value)), kinds[0])
    return _value(value, kind, where, what, complete)
  if typing.get_origin(expected) is tuple:
    return _tuple(value, typing.get_args(expected), where, what, complete)
  if type(value) is expected:
    return value
  if expected is float and type(value) is int and abs(value) < 2**1000:
    return float(value)
  raise ValueError(f"{where} must be of type {expected.__name__}; got {shown(value)}.")


def _has_fields(cls: Any, value: Any) -> bool:
  """Whether all names of a table are fields of a dataclass."""
  table = isinstance(value, Mapping) and dataclasses.is_dataclass(cls)
  return table and value.keys() <= typing.get_type_hints(cls).keys()


def _tuple(
  value: Any, kinds: tuple[Any, ...], where: str, what: str, complete: str | None
) -> tuple[Any, ...]:
  if isinstance(value, Mapping) and typing.get_origin(kinds[0]) is tuple:
    value = list(value.items())
  if not isinstance(value, list | tuple):
    raise ValueError(f"{where} must be a list; got {shown(value)}.")
  if kinds[-1] is ...:
    kinds = kinds[:1] * len(value)
  if len(kinds) != len(value):
    raise ValueError(f"{where} must have {len(kinds)} values; got {shown(value)}.")
  return tuple(
    _value(item, kind, f"{where}[{i}]", what, complete)
    for i, (item, kind) in enumerate(zip(value, kinds, strict=True))
  )
