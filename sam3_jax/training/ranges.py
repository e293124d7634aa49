"""Ranges of a configuration's numbers, and what is said of one that is out of its range."""

import math
import re
from collections.abc import Sequence
from typing import Any


def check_numbers(
  config: Any,
  table: str,
  fields: Sequence[str],
  low: float,
  high: float = math.inf,
  ends: str = "[]",
) -> None:
  """Raises ValueError unless these fields are finite and lie between the bounds.

  Args:
    config: has the fields.
    table: where a training configuration has `config`, for the message; "" for the top.
    fields: their names.
    low, high: bounds; infinity for none.
    ends: of the interval, "[" or "(" and "]" or ")": a parenthesis excludes the bound itself.
  """
  for field in fields:
    value = getattr(config, field)
    finite = -math.inf < value < math.inf
    above = value > low if ends[0] == "(" else value >= low
    below = value < high if ends[1] == ")" else value <= high
    if finite and above and below:
      continue
    if not finite:
      wanted = "a finite number"
    elif high < math.inf:
      wanted = f"in {ends[0]}{low:g}, {high:g}{ends[1]}"
    else:
      wanted = f"more than {low:g}" if ends[0] == "(" else f"{low:g} or more"
    raise ValueError(f"{table}{'.' * bool(table)}{field} must be {wanted}; got {value}.")


def check_pattern(pattern: str, what: str) -> None:
  """Raises ValueError unless `pattern` is a regular expression."""
  try:
    re.compile(pattern)
  except re.error as error:
    raise ValueError(f"{what}: {pattern!r} is no regular expression ({error}).") from error
