"""Identities of files and checkpoints, and what changed between two lists."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sam3_jax.utils.identity import (
  FileIdentity,
  changes,
  checkpoint_identity,
  digest,
  file_sha256,
  identify,
)

FILES = st.dictionaries(
  st.sampled_from("abcdef"),
  st.none()
  | st.builds(FileIdentity, st.integers(0, 3), st.integers(0, 3), st.sampled_from(["", "x", "y"])),
)


def test_a_replaced_file_of_the_same_name_and_size_has_another_identity(tmp_path):
  path = tmp_path / "a.jpg"
  path.write_bytes(b"one")
  before = identify(path)
  path.write_bytes(b"two")
  os.utime(path, ns=(0, 7))
  assert before is not None
  assert not before.matches(identify(path))
  assert identify(path, content=True) == FileIdentity(3, 7, file_sha256(path))


def test_a_touched_file_has_the_same_content(tmp_path):
  path = tmp_path / "a.jpg"
  path.write_bytes(b"one")
  unread, before = identify(path), identify(path, content=True)
  os.utime(path, ns=(0, 7))
  after = identify(path, content=True)
  assert before is not None
  assert unread is not None
  assert before.matches(after)
  assert not unread.matches(after)
  assert changes({"a": before}, {"a": after}) == []


def test_a_missing_file_has_none(tmp_path):
  assert identify(tmp_path / "a.jpg") is None
  assert identify(tmp_path / "a.jpg", content=True) is None


@given(FILES, FILES)
def test_changes_are_none_only_between_equal_lists(then, now):
  found = changes(then, now)
  same = then.keys() == now.keys() and all(
    then[n] == now[n] or (then[n] is not None and then[n].matches(now[n])) for n in then
  )
  assert (found == []) == same
  assert changes(then, then) == []


def test_changes_name_some_and_count_all():
  now = {f"{i}.jpg": FileIdentity(1, 1) for i in range(5)}
  assert changes({}, now) == ["5 files added (0.jpg, 1.jpg, 2.jpg and 2 more)"]
  assert changes({"0.jpg": FileIdentity(1, 1)}, {"0.jpg": FileIdentity(2, 1)}) == [
    "1 file modified (0.jpg)"
  ]


@pytest.mark.parametrize("part", ["shape", "dtype", "sha256", "name", "model", "tokenizer"])
def test_everything_that_decides_results_is_in_a_checkpoints_identity(part):
  entry = {"shape": [2], "dtype": "float32", "sha256": "0"}
  model, tokenizer, name = {"width": 8}, b"pieces", "a/kernel"
  before = checkpoint_identity({name: entry}, model, tokenizer)
  match part:
    case "model":
      model = {"width": 9}
    case "tokenizer":
      tokenizer = b"others"
    case "name":
      name = "b/kernel"
    case _:
      entry = entry | {part: [3] if part == "shape" else "1"}
  assert checkpoint_identity({name: entry}, model, tokenizer) != before


def test_a_digest_does_not_depend_on_the_order_of_keys():
  assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
