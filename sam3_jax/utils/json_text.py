"""Strict JSON parser for user files, with one-line errors.

Python's parser keeps the last of duplicate keys, accepts NaN, and raises RecursionError on deeply
nested text. Here each of these is a ValueError.
"""

import json
import math
import reprlib
from collections.abc import Callable
from typing import Any

MAX_DIGITS = 40  # of an integer


def parse(
  data: bytes | bytearray | str,
  what: str,
  *,
  convert: Callable[[dict[str, Any]], Any] | None = None,
  check_numbers: bool = True,
  allow_nan: bool = False,
) -> Any:
  """Parses a JSON text (RFC 8259).

  Args:
    data: the text, or its bytes in UTF-8, UTF-16 or UTF-32, with or without a byte order mark.
    what: the name of the text in messages, such as a path or "line 3".
    convert: replaces each object by its result, innermost first. It can pack the numbers of a large
      file while the file is read.
    check_numbers: check each number while parsing. If False, numbers beyond float64 become infinite
      and integers may have 4,300 digits; the caller must check them.
    allow_nan: accept NaN and Infinity as Python writes them.

  Raises:
    ValueError: the text is not JSON, is invalid in its encoding, is nested too deeply, repeats a
      key in an object, or has a number that is not finite or has more than `MAX_DIGITS` digits.
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
  """Any value for a message: short and in one line, even if its `repr` fails."""
  return f"{_REPR.repr(value):.{width}}".replace("\n", " ")


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 100
_REPR.maxlist = _REPR.maxdict = 8


def _decode(data: bytes | bytearray | str) -> str:
  if isinstance(data, str):
    return data.removeprefix("\ufeff")
  # json.loads would decode with "surrogatepass", which accepts lone surrogates.

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
