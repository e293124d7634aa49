"""Ranges of a configuration's numbers: bounds, what is no number, and how it is said."""

import math
import re
import types

import pytest

from sam3_jax.training.ranges import check_numbers, check_pattern


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
    (math.nan, (0, 1), "a finite number; got nan."),
    (math.inf, (0,), "a finite number; got inf."),
    (-math.inf, (-math.inf,), "a finite number; got -inf."),
  ],
)
def test_numbers_out_of_range(value, bounds, wanted):
  with pytest.raises(ValueError, match=re.escape(f"losses.a must be {wanted}")):
    check(value, *bounds)


def test_fields_at_the_top_have_no_table():
  with pytest.raises(ValueError, match=r"^a must be 1 or more; got 0\.$"):
    check(0, 1, table="")


def test_patterns():
  check_pattern(r"(trunk|neck)/.*", "train")
  with pytest.raises(ValueError, match=r"^train: '\(' is no regular expression"):
    check_pattern("(", "train")
