"""Settings and their ranges, and what is said of one that is no number or out of its range."""

import math
import numbers
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import numpy as np


def is_number(value: Any) -> bool:
  """Whether it is a real number; a bool is none."""
  return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_whole(value: Any) -> bool:
  """Whether it is an integer; a bool is none."""
  return isinstance(value, numbers.Integral) and not isinstance(value, bool)


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
  """Raises ValueError unless a value is a finite number between the bounds.

  Args:
    name: of the value, for the message.
    value: a number, if all is well.
    low, high: bounds; infinity for none.
    ends: of the interval, "[" or "(" and "]" or ")": a parenthesis excludes the bound itself.
    whole: it must be an integer, too.
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
  """As `check_number` of each of these fields.

  Args:
    config: has the fields.
    table: where a training configuration has `config`, for the message; "" for the top.
    fields: their names.
    low, high, ends, whole: as for `check_number`.
  """
  for field in fields:
    name = f"{table}{'.' * bool(table)}{field}"
    check_number(name, getattr(config, field), low, high, ends, whole=whole)


def check_flag(name: str, value: Any) -> bool:
  """True or False; raises ValueError of anything else."""
  if not isinstance(value, bool | np.bool_):
    raise ValueError(f"{name} must be True or False; got {value!r:.60}.")
  return bool(value)


def as_array(values: Any) -> np.ndarray:
  """An array; of rows that are not equally long an empty one of objects, which no check lets
  pass."""
  try:
    return np.asarray(values)
  except Exception:  # NumPy's ValueError of ragged rows; other libraries' of arrays without values
    return np.zeros(0, object)


def plain(values: Any, what: str, depth: int = 2) -> Any:
  """Numbers, and lists of them, of whatever holds numbers: lists, NumPy's and JAX's arrays, ...

  The one conversion of boxes, points and labels, so that what is accepted as one of them is
  accepted as all of them.

  Args:
    values: a number, an array, or an iterable with an order.
    what: the values are called in messages.
    depth: of nested lists, at most.

  Raises:
    TypeError: text, a mapping, a set, something that is no number, or lists nested deeper.
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
  return [plain(value, what, depth - 1) for value in values]


def shown(value: Any) -> str:
  """A value for a message: in one line, and not long."""
  try:
    return f"{value!r:.60}".replace("\n", " ")
  except Exception:  # a repr of someone else's that fails
    return type(value).__name__


def check_pattern(pattern: str, what: str) -> None:
  """Raises ValueError unless `pattern` is a regular expression."""
  try:
    re.compile(pattern)
  except re.error as error:
    raise ValueError(f"{what}: {pattern!r} is no regular expression ({error}).") from error
