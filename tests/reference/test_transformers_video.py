"""Parity with transformers' video tracker on the tiny model: runs `benchmarks/parity_video.py`."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

PARITY = pathlib.Path(__file__).parents[2] / "benchmarks" / "parity_video.py"
MISSING = [n for n in ("torch", "transformers", "skimage") if not importlib.util.find_spec(n)]

pytestmark = [
  pytest.mark.reference,
  pytest.mark.skipif(bool(MISSING), reason=f"{MISSING} not installed: the extra `reference`"),
]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
  """The benchmark's report; the benchmark fails if a difference exceeds its limit."""
  out = tmp_path_factory.mktemp("parity")
  command = [sys.executable, str(PARITY), "--size", "tiny", "--out", str(out)]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr[-2000:]
  return json.loads((out / "parity-video.json").read_text())


@pytest.mark.parametrize("kind", ["click", "box"])
def test_tracking_equals_transformers(report, kind):
  rows = report["parity"][kind]
  assert len(rows) == 4
  assert max(row["memory"] for row in rows) <= 1.1e-5  # measured 1.1e-6
  assert max(row["conditioned"] for row in rows[1:]) <= 7.7e-6  # measured 7.7e-7
  for row in rows:
    assert row["object_logit"] > 1  # the stages of an absent object would be constant
    assert 0.05 < row["coverage"] < 0.5
  # Meta's selection: the oldest previous frame gives a memory, but no pointer.
  assert rows[3]["reads"] == {"memories": [0, 1, 2], "pointers": [0, 2]}
