"""Validation of settings: ranges of numbers, flags, patterns, and error messages."""

import math
import re
import types

import numpy as np
import pytest

from sam3_jax.utils.validation import (
  as_array,
  check_flag,
  check_number,
  check_numbers,
  check_pattern,
)


def check(value, *bounds, table="losses"):
  check_numbers(types.SimpleNamespace(a=value, other=math.nan), table, ("a",), *bounds)


@pytest.mark.parametrize(
  ("value", "bounds"),
  [
    (0, (0,)), (10**400, (0,)), (-5.0, (-math.inf,)),
    (0.0, (0, 1)), (1.0, (0, 1)), (0.0, (0, 1, "[)")), (0.999, (0, 1, "[)")),
    (1e-9, (0, 1, "(]")), (1, (0, 1, "(]")), (0.5, (0, 1, "()")),
  ],
)  # fmt: skip
def test_numbers_in_range(value, bounds):
  check(value, *bounds)


@pytest.mark.parametrize(
  ("value", "bounds", "wanted"),
  [
    (-1, (0,), "0 or more; got -1."),
    (0, (1,), "1 or more; got 0."),
    (0.0, (0, math.inf, "(]"), "more than 0; got 0.0."),
    (1.5, (0, 1), "in [0, 1]; got 1.5."),
    (1.0, (0, 1, "[)"), "in [0, 1); got 1.0."),
    (0.0, (0, 1, "(]"), "in (0, 1]; got 0.0."),
    ("1", (0, 1), "a finite number; got '1'."),
    (None, (0,), "a finite number; got None."),
    (math.nan, (0, 1), "a finite number; got nan."),
    (math.inf, (0,), "a finite number; got inf."),
    (-math.inf, (-math.inf,), "a finite number; got -inf."),
  ],
)
def test_numbers_out_of_range(value, bounds, wanted):
  with pytest.raises(ValueError, match=re.escape(f"losses.a must be {wanted}")):
    check(value, *bounds)


@pytest.mark.parametrize(
  ("value", "high", "wanted"),
  [
    (0, math.inf, "from 1; got 0."),
    (2.0, math.inf, "from 1; got 2.0."),
    (True, math.inf, "from 1; got True."),
    (9, 8, "from 1 to 8; got 9."),
    ("3", 8, "from 1 to 8; got '3'."),
  ],
)
def test_whole_numbers(value, high, wanted):
  check_number("a", np.int64(3), 1, high, whole=True)
  with pytest.raises(ValueError, match=rf"^a must be a whole number {wanted} Fix it\.$"):
    check_number("a", value, 1, high, whole=True, remedy="Fix it.")


def test_flags():
  assert check_flag("a", np.bool_(True)) is True
  with pytest.raises(ValueError, match=r"a must be True or False; got 1\."):
    check_flag("a", 1)


def test_ragged_arrays():
  assert as_array([[1, 2], [3, 4]]).shape == (2, 2)
  assert as_array([[1, 2], [3]]).dtype == object


def test_messages_of_top_level_fields():
  with pytest.raises(ValueError, match=r"^a must be 1 or more; got 0\.$"):
    check(0, 1, table="")


def test_patterns():
  check_pattern(r"(trunk|neck)/.*", "train")
  with pytest.raises(ValueError, match=r"^train: '\(' is not a regular expression"):
    check_pattern("(", "train")
