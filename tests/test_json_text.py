"""Strict JSON: accepted texts equal Python's values, all others raise a one-line ValueError."""

import contextlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sam3_jax.utils.json_text import parse, shown

VALUES = st.recursive(
  st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False,
  allow_infinity=False) | st.text(),
  lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)  # fmt: skip


@settings(max_examples=50, deadline=None)
@given(VALUES, st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32", None]), st.booleans())
def test_values_equal_pythons(values, encoding, escaped):
  text = json.dumps(values, ensure_ascii=escaped)
  if encoding and not escaped and any(0xD800 <= ord(c) <= 0xDFFF for c in text):
    return
  assert parse(text.encode(encoding) if encoding else text, "x") == values


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("[" * 100_000, "it is nested too deeply"),
    ('{"a":' * 100_000, "it is nested too deeply"),
    ('{"a": 1, "b": {"c": 2, "c": 2}}', "the key 'c' is given twice in one object"),
    ("[NaN]", "NaN is not a JSON number"),
    ("-Infinity", "-Infinity is not a JSON number"),
    ("1e999", "the number '1e999' is not finite"),
    ("-1" + "0" * 400 + ".5", "is not finite"),
    ("9" * 5000, "it has a number of 5,000 digits"),
    (b'"\xff"', "byte 1 is not UTF-8"),
    (b'"\xed\xa0\x80"', "byte 1 is not UTF-8"),
    (b"\xff\xfe\x00", "is not UTF-16"),
    ("", "Expecting value (line 1, column 1)"),
    (b"", "Expecting value (line 1, column 1)"),
    ('{"a": 1}\n{"b": 2}', "Extra data (line 2, column 1)"),
  ],
)
def test_invalid_json_gives_a_one_line_error(text, message):
  with pytest.raises(ValueError, match=r"^list\.json is not valid JSON: ") as caught:
    parse(text, "list.json")
  assert message in str(caught.value)
  assert "\n" not in str(caught.value)
  assert len(str(caught.value)) < 200


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=40))
def test_random_bytes_raise_only_value_errors(data):
  with contextlib.suppress(ValueError):
    parse(data, "x")


def test_shown_is_short_for_any_value():
  deep = []
  for _ in range(100_000):
    deep = [deep]
  for value in (deep, "x\n" * 10**6, [0] * 10**6, {"a\n": [1, 2]}):
    assert len(shown(value)) <= 80
    assert "\n" not in shown(value)
  assert shown({"a": [1, "b"]}) == "{'a': [1, 'b']}"
