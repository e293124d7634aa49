"""The output buffer: rows on device and host, too little memory, free memory."""

import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam3_jax.inference import output_buffer
from sam3_jax.inference.output_buffer import HOST_FRACTION, OutputBuffer

MASKS = {"masks": jax.ShapeDtypeStruct((5, 2, 3), jnp.dtype("bfloat16"))}
SIZE = 5 * 2 * 3 * 2


def part(rows, masks=True):
  """Arrays whose values are the indices of their rows."""
  rows = jnp.asarray(rows)
  arrays = {"scores": rows.astype(jnp.float32), "else": rows}
  if masks:
    arrays["masks"] = jnp.broadcast_to(rows[:, None, None], (len(rows), 2, 3)).astype(jnp.bfloat16)
  return types.SimpleNamespace(**arrays)


@pytest.mark.parametrize(("budget", "kind"), [(SIZE, jax.Array), (SIZE - 1, np.ndarray)])
def test_parts_in_any_order(budget, kind):
  found = OutputBuffer(["scores", "masks"], MASKS, budget)
  for rows in ([3, 1], [0], [4, 2]):
    found.put(part(rows), np.array(rows))
  assert found.arrays.keys() == {"scores", "masks"}
  assert isinstance(found.arrays["masks"], kind)
  assert found.arrays["masks"].dtype == jnp.bfloat16
  np.testing.assert_array_equal(found.arrays["scores"], np.arange(5))
  np.testing.assert_array_equal(np.float32(found.arrays["masks"][:, 1, 2]), np.arange(5))


@pytest.mark.parametrize("budget", [SIZE, 0])
def test_parts_without_masks(budget):
  found = OutputBuffer(["scores", "masks"], MASKS, budget)
  found.put(part([0, 1, 2, 3, 4], masks=False), np.arange(5))
  found.put(part([3]), np.array([3]))
  np.testing.assert_array_equal(found.arrays["scores"], np.arange(5))
  np.testing.assert_array_equal(np.float32(found.arrays["masks"][:, 0, 0]), [0, 0, 0, 3, 0])


def test_a_complete_part_needs_no_copy():
  small, large = (OutputBuffer(["masks"], MASKS, budget) for budget in (SIZE, 0))
  assert small.is_whole(np.arange(5))
  assert not small.is_whole(np.arange(4))
  assert not small.is_whole(np.array([1, 0, 2, 3, 4]))
  assert not large.is_whole(np.arange(5))


def test_too_little_memory(monkeypatch):
  """On the host: a device raises its own error."""
  monkeypatch.setattr(output_buffer, "free_memory", lambda: 2.5 * SIZE / 5 / HOST_FRACTION)
  small, large = (OutputBuffer(["masks"], MASKS, budget) for budget in (SIZE, 0))
  small.reserve(5)
  large.reserve(2)
  with pytest.raises(ValueError, match=r"^the masks of 3 prompts take 0.0 GB, .* fewer prompts"):
    large.reserve(3)
  with pytest.raises(ValueError, match="the masks of 3 prompts"):
    large.put(part([0, 1, 2]), np.arange(3))


def test_allocation_fails(monkeypatch):
  def zeros(*_):
    raise MemoryError

  large, one = OutputBuffer(["masks"], MASKS, 0), part([0])
  monkeypatch.setattr(np, "zeros", zeros)
  with pytest.raises(ValueError, match="the masks of 5 prompts take"):
    large.put(one, np.array([0]))


class TestFreeMemory:
  @pytest.fixture
  def files(self, tmp_path, monkeypatch):
    monkeypatch.setattr(output_buffer, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(output_buffer, "CGROUP", tmp_path)
    return tmp_path

  @pytest.mark.skipif(sys.platform != "linux", reason="only Linux reports it")
  def test_this_machine(self):
    assert 0 < output_buffer.free_memory() < 2**50

  def test_not_reported(self, files):
    assert output_buffer.free_memory() == sys.maxsize

  def test_system(self, files):
    (files / "meminfo").write_text("MemTotal:  9 kB\nMemAvailable:   7 kB\nHugePages_Total: 0\n")
    assert output_buffer.free_memory() == 7 * 1024

  @pytest.mark.parametrize(("limit", "free"), [("max", 7 * 1024), ("900", 650), ("100", 0)])
  def test_container(self, files, limit, free):
    (files / "meminfo").write_text("MemAvailable:   7 kB\n")
    (files / "memory.max").write_text(f"{limit}\n")
    (files / "memory.current").write_text("300\n")
    (files / "memory.stat").write_text("anon 250\ninactive_file 50\n")
    assert output_buffer.free_memory() == free
