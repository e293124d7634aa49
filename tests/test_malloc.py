"""Free pages of the heap go back to the system, where its C library can do that."""

import ctypes
import platform
from pathlib import Path

import numpy as np
import pytest

from sam3_jax.utils import malloc


def resident() -> int:
  return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's own function")
def test_holes_are_given_back():
  """100 MB in blocks that lie beside each other, every sixteenth still in use."""
  blocks = [np.ones(8000) for _ in range(1600)]
  kept = blocks[15::16]
  del blocks
  before = resident()
  malloc.trim()
  assert before - resident() > 60e6
  assert all(one.all() for one in kept)


@pytest.mark.parametrize("missing", [OSError("none"), AttributeError("malloc_trim")])
def test_other_libraries_are_left_alone(monkeypatch, missing):
  def fail(*_):
    raise missing

  monkeypatch.setattr(ctypes, "CDLL", fail)
  malloc.trim()
