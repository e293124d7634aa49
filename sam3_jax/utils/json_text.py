"""JSON from users: one strict parser, whose errors are one line, whatever the text holds.

Python's parser takes the last of two equal keys, accepts NaN, and raises RecursionError on a text
that is nested deeply. Here each of them is a ValueError that says what is wrong.
"""

import json
import math
import reprlib
from collections.abc import Callable
from typing import Any

MAX_DIGITS = 40  # of a whole number


def parse(
  data: bytes | bytearray | str,
  what: str,
  *,
  convert: Callable[[dict[str, Any]], Any] | None = None,
  check_numbers: bool = True,
  allow_nan: bool = False,
) -> Any:
  """The values of a JSON text (RFC 8259).

  Args:
    data: the text, or its bytes in UTF-8, UTF-16 or UTF-32, with or without a byte order mark.
    what: the name of the text in messages, such as a path or "line 3".
    convert: makes what takes the place of each object, innermost first: a file of millions of
      numbers is packed while it is read.
    check_numbers: look at each number as it is read; without it, numbers beyond float64 are
      infinite and whole numbers may have 4,300 digits, for callers that check their numbers later.
    allow_nan: take NaN and Infinity, as Python writes them, for numbers.

  Raises:
    ValueError: it is not JSON, not valid in its encoding, is nested too deeply, has a key twice in
      an object, or a number that is not finite or has more than `MAX_DIGITS` digits; in one line.
  """
  numbers = {"parse_int": _whole, "parse_float": _finite} if check_numbers else {}
  objects = _unique if convert is None else lambda pairs: convert(_unique(pairs))
  try:
    return json.loads(
      _decode(data),
      object_pairs_hook=objects,
      parse_constant=float if allow_nan else _no_constant,
      **numbers,
    )
  except RecursionError:
    raise ValueError(f"{what} is not valid JSON: it is nested too deeply") from None
  except UnicodeDecodeError as error:
    raise ValueError(
      f"{what} is not valid JSON: byte {error.start:,} is not {error.encoding.upper()}"
    ) from None
  except json.JSONDecodeError as error:
    where = f"line {error.lineno:,}, column {error.colno:,}"
    raise ValueError(f"{what} is not valid JSON: {error.msg} ({where})") from None
  except ValueError as error:
    raise ValueError(f"{what} is not valid JSON: {error}") from None


def shown(value: Any, width: int = 80) -> str:
  """A parsed value for a message: short and in one line, however large or nested it is."""
  return f"{_REPR.repr(value):.{width}}"


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 100
_REPR.maxlist = _REPR.maxdict = 8


def _decode(data: bytes | bytearray | str) -> str:
  if isinstance(data, str):
    return data.removeprefix("\ufeff")
  # Not json.loads's own decoding, which lets halves of surrogate pairs pass.
  return data.decode(json.detect_encoding(data)).removeprefix("\ufeff")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  values = dict(pairs)
  if len(values) != len(pairs):
    seen: set[str] = set()
    twice = next(key for key, _ in pairs if key in seen or seen.add(key))
    raise ValueError(f"the key {shown(twice, 40)} is given twice in one object")
  return values


def _whole(digits: str) -> int:
  if len(digits) > MAX_DIGITS:
    raise ValueError(f"it has a number of {len(digits):,} digits")
  return int(digits)


def _finite(number: str) -> float:
  value = float(number)
  if math.isinf(value):
    raise ValueError(f"the number {shown(number, 40)} is not finite as float64")
  return value


def _no_constant(name: str) -> float:
  raise ValueError(f"{name} is not a JSON number; write null or leave the value out")
