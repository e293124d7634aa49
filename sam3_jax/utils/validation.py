"""Validation of settings: numbers and their ranges, flags, patterns, arrays."""

import math
import numbers
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import numpy as np

from sam3_jax.utils.json_text import shown


def is_number(value: Any) -> bool:
  """Whether a value is a real number; bools do not count."""
  return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_whole(value: Any) -> bool:
  """Whether a value is an integer; bools do not count."""
  return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def are_finite(values: Iterable[Any]) -> bool:
  """Whether all values are finite numbers as parsed from JSON: no bool, no NaN, no infinity."""
  try:
    return all(type(value) in (int, float) and math.isfinite(value) for value in values)
  except OverflowError:  # an integer over 1e308
    return False


def check_number(
  name: str,
  value: Any,
  low: float,
  high: float = math.inf,
  ends: str = "[]",
  *,
  whole: bool = False,
  remedy: str = "",
) -> None:
  """Raises ValueError unless a value is a finite number in an interval.

  Args:
    name: name of the value, for the message.
    value: the value to check.
    low, high: bounds of the interval; infinity for no bound.
    ends: "[" or "(", then "]" or ")"; a parenthesis excludes the bound.
    whole: the value must also be an integer.
    remedy: a sentence at the end of the message.
  """
  finite = is_number(value) and -math.inf < value < math.inf
  if finite and (not whole or is_whole(value)):
    above = value > low if ends[0] == "(" else value >= low
    below = value < high if ends[1] == ")" else value <= high
    if above and below:
      return
  if whole:
    wanted = f"a whole number from {low:g}" + f" to {high:g}" * (high < math.inf)
  elif not finite:
    wanted = "a finite number"
  elif high < math.inf:
    wanted = f"in {ends[0]}{low:g}, {high:g}{ends[1]}"
  else:
    wanted = f"more than {low:g}" if ends[0] == "(" else f"{low:g} or more"
  raise ValueError(f"{name} must be {wanted}; got {value!r:.60}. {remedy}".rstrip())


def check_numbers(
  config: Any,
  table: str,
  fields: Sequence[str],
  low: float,
  high: float = math.inf,
  ends: str = "[]",
  *,
  whole: bool = False,
) -> None:
  """Calls `check_number` for several fields.

  Args:
    config: the object with the fields.
    table: the name of its table in the training file, for the message; "" at the top level.
    fields: names of the fields.
    low, high, ends, whole: as for `check_number`.
  """
  for field in fields:
    name = f"{table}{'.' * bool(table)}{field}"
    check_number(name, getattr(config, field), low, high, ends, whole=whole)


def check_flag(name: str, value: Any) -> bool:
  """Returns a bool; raises ValueError for anything but True or False."""
  if not isinstance(value, bool | np.bool_):
    raise ValueError(f"{name} must be True or False; got {value!r:.60}.")
  return bool(value)


def as_array(values: Any) -> np.ndarray:
  """Converts values to an array; ragged rows give an empty object array, which no check accepts."""
  try:
    return np.asarray(values)
  except Exception:  # ValueError of NumPy for ragged rows, and errors of other libraries
    return np.zeros(0, object)


def as_lists(values: Any, what: str, depth: int = 2) -> Any:
  """Converts numbers in lists, NumPy arrays, JAX arrays etc. to Python numbers in lists.

  Boxes, points and labels all use this function, so that they accept the same types.

  Args:
    values: a number, an array, or an ordered iterable.
    what: name of the values in messages.
    depth: maximal depth of nested lists.

  Raises:
    TypeError: `values` is text, a mapping or a set, contains a value that is not a number, or is
      nested too deeply.
  """
  if is_number(values) or isinstance(values, bool | np.bool_):
    return values.item() if isinstance(values, np.generic) else values
  if isinstance(values, str | bytes | bytearray | Mapping | Set) or depth < 0:
    raise TypeError(f"{what} must be numbers in a list or an array; got {shown(values)}.")
  if hasattr(values, "__array__"):
    array = as_array(values)
    if array.dtype.kind == "V" and "float" in array.dtype.name:  # bfloat16
      array = array.astype(np.float32)
    if array.dtype.kind not in "biuf" or array.ndim > depth:
      raise TypeError(
        f"{what} must be numbers in a list or an array; got {array.dtype} {list(array.shape)}."
      )
    return array.tolist()
  if not isinstance(values, Iterable):
    raise TypeError(f"{what} must be numbers in a list or an array; got {shown(values)}.")
  return [as_lists(value, what, depth - 1) for value in values]


def check_pattern(pattern: str, what: str) -> None:
  """Raises ValueError unless `pattern` is a valid regular expression; `what` is its name."""
  try:
    re.compile(pattern)
  except re.error as error:
    raise ValueError(f"{what}: {pattern!r} is not a regular expression ({error}).") from error
