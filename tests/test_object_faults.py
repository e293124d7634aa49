"""Jobs on a store that fails, whose processes are killed; see `benchmarks/storage_faults.py`."""

import importlib.util

import pytest
import storage_faults

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(importlib.util.find_spec("gcsfs") is None, reason="needs the extra gcs"),
]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
  """Restores the environment, which the benchmark changes."""
  for name in ("STORAGE_EMULATOR_HOST", "FSSPEC_GS_TOKEN", "HF_ENDPOINT", "TMPDIR"):
    monkeypatch.setenv(name, "")


def test_killed_processes_on_a_failing_bucket():
  """Three kills here, twenty in the benchmark."""
  faults, counts = storage_faults.campaign("gs", 150, processes=2, kills=3, rate=0.05, seed=1)
  assert faults == []
  assert counts["kills"] == 3
  assert counts["faults"] > 5


@pytest.mark.parametrize("scheme", ["hf", "https"])
def test_killed_processes_that_read_from_the_web(scheme):
  faults, counts = storage_faults.campaign(scheme, 60, processes=2, kills=2, rate=0.05, seed=1)
  assert faults == []
  assert counts["kills"] == 2
  assert counts["faults"] > 0


def test_listings_need_little_memory():
  memory = storage_faults.listing(200_000)
  assert memory["find"] < 15  # MB; measured 1.5 for a million names
  assert memory["inputs"] < 40  # measured 67 for a million images
