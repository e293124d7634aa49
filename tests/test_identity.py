"""Identities of files and checkpoints, and changes between lists of files."""

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


def test_replaced_file_of_the_same_size_has_another_identity(tmp_path):
  path = tmp_path / "a.jpg"
  path.write_bytes(b"one")
  before = identify(path)
  path.write_bytes(b"two")
  os.utime(path, ns=(0, 7))
  assert before is not None
  assert not before.matches(identify(path))
  assert identify(path, content=True) == FileIdentity(3, 7, file_sha256(path))


def test_touched_file_has_the_same_content(tmp_path):
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


def test_missing_file_has_no_identity(tmp_path):
  assert identify(tmp_path / "a.jpg") is None
  assert identify(tmp_path / "a.jpg", content=True) is None


@given(FILES, FILES)
def test_only_equal_lists_have_no_changes(before, after):
  found = changes(before, after)
  same = before.keys() == after.keys() and all(
    before[n] == after[n] or (before[n] is not None and before[n].matches(after[n])) for n in before
  )
  assert (found == []) == same
  assert changes(before, before) == []


def test_changes_count_all_files_and_name_some():
  after = {f"{i}.jpg": FileIdentity(1, 1) for i in range(5)}
  assert changes({}, after) == ["5 files added (0.jpg, 1.jpg, 2.jpg and 2 more)"]
  assert changes({"0.jpg": FileIdentity(1, 1)}, {"0.jpg": FileIdentity(2, 1)}) == [
    "1 file modified (0.jpg)"
  ]


@pytest.mark.parametrize("part", ["shape", "dtype", "sha256", "name", "model", "tokenizer"])
def test_checkpoint_identity_depends_on_all_parts(part):
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


def test_digest_is_independent_of_key_order():
  assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
