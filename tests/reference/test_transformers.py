"""Parity with transformers on the tiny model: runs `benchmarks/parity.py` from end to end."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

PARITY = pathlib.Path(__file__).parents[2] / "benchmarks" / "parity.py"
MISSING = [n for n in ("torch", "transformers", "skimage") if not importlib.util.find_spec(n)]

pytestmark = [
  pytest.mark.reference,
  pytest.mark.skipif(bool(MISSING), reason=f"{MISSING} not installed: the extra `reference`"),
]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
  """The benchmark's report; the benchmark fails if a difference exceeds its limit."""
  out = tmp_path_factory.mktemp("parity")
  command = [sys.executable, str(PARITY), "--size", "tiny", "--limit", "1e-4"]
  done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr[-2000:]
  return json.loads((out / "parity-tiny.json").read_text())


@pytest.mark.parametrize("kind", ["text", "box", "text + box", "text + box + negative box"])
def test_float32_equals_transformers(report, kind):
  row = report["parity"][kind]
  errors = ("logits", "presence", "boxes", "mask_logits", "semantic_logits")
  assert max(row[name] for name in errors) <= 2e-5, row  # measured 6.7e-6
  assert row["min_iou"] >= 0.999
  assert row["compared"] == row["queries"] == 10


@pytest.mark.parametrize("kind", ["text", "box", "text + box", "text + box + negative box"])
def test_bfloat16_error_is_comparable_to_that_of_transformers(report, kind):
  ours, theirs = (report["bfloat16"][side][kind] for side in ("ours", "transformers"))
  assert ours["mask_logits"] <= 2 * theirs["mask_logits"]  # measured 1.2 times
  assert ours["logits"] <= 2 * theirs["logits"]  # measured 0.7 times
  assert ours["min_confident_iou"] >= 0.999
