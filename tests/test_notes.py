"""Notes about input files: counted, named, and warnings by default."""

import json
import warnings

import pytest
from annotation_content import content, one

from sam3_jax.datasets import annotations
from sam3_jax.utils.notes import Notes

# pycocotools' own, with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def test_notes_are_warnings_by_default(tmp_path):
  (tmp_path / "a.json").write_text(json.dumps(content(one(), one(2))))
  with pytest.warns(UserWarning, match="instances with the mask of another one, left out: 1"):
    annotations.read(tmp_path / "a.json")
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    annotations.read(tmp_path / "a.json", notes=Notes())


def test_notes_count_all_and_name_some():
  notes = Notes()
  assert not notes.lines()
  for i in range(1200):
    notes.add("odd entries", f"entry {i}")
  notes.add("nothing", count=0)
  notes.add("more", count=5)
  assert notes.lines() == [
    "note: odd entries: 1,200 (entry 0, entry 1, entry 2, ...)",
    "note: more: 5",
  ]
