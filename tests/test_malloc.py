"""Freed memory is returned to the operating system, if the C library supports it."""

import ctypes
import platform
from pathlib import Path

import numpy as np
import pytest

from sam3_jax.utils import malloc


def resident() -> int:
  return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a function of glibc")
def test_fragmented_memory_is_returned():
  """100 MB in adjacent blocks, every sixteenth of which is still in use."""
  blocks = [np.ones(8000) for _ in range(1600)]
  kept = blocks[15::16]
  del blocks
  before = resident()
  malloc.trim()
  assert before - resident() > 60e6
  assert all(one.all() for one in kept)


@pytest.mark.parametrize("missing", [OSError("none"), AttributeError("malloc_trim")])
def test_other_c_libraries_are_ignored(monkeypatch, missing):
  def fail(*_):
    raise missing

  monkeypatch.setattr(ctypes, "CDLL", fail)
  malloc.trim()
