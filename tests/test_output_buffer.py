"""Room for results: rows in their places on device and host, none without memory, what is free."""

import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam3_jax.inference import output_buffer

MASKS = {"masks": jax.ShapeDtypeStruct((5, 2, 3), jnp.dtype("bfloat16"))}
SIZE = 5 * 2 * 3 * 2


def part(rows, masks=True):
  """Numbers that say of which row they are."""
  rows = jnp.asarray(rows)
  arrays = {"scores": rows.astype(jnp.float32), "else": rows}
  if masks:
    arrays["masks"] = jnp.broadcast_to(rows[:, None, None], (len(rows), 2, 3)).astype(jnp.bfloat16)
  return types.SimpleNamespace(**arrays)


@pytest.mark.parametrize(("budget", "kind"), [(SIZE, jax.Array), (SIZE - 1, np.ndarray)])
def test_rows_come_to_their_places(budget, kind):
  found = output_buffer.Room(["scores", "masks"], MASKS, budget)
  for rows in ([3, 1], [0], [4, 2]):
    found.put(part(rows), np.array(rows))
  assert found.arrays.keys() == {"scores", "masks"}
  assert isinstance(found.arrays["masks"], kind)
  assert found.arrays["masks"].dtype == jnp.bfloat16
  np.testing.assert_array_equal(found.arrays["scores"], np.arange(5))
  np.testing.assert_array_equal(np.float32(found.arrays["masks"][:, 1, 2]), np.arange(5))


@pytest.mark.parametrize("budget", [SIZE, 0])
def test_masks_may_come_later_or_not_at_all(budget):
  found = output_buffer.Room(["scores", "masks"], MASKS, budget)
  found.put(part([0, 1, 2, 3, 4], masks=False), np.arange(5))
  found.put(part([3]), np.array([3]))
  np.testing.assert_array_equal(found.arrays["scores"], np.arange(5))
  np.testing.assert_array_equal(np.float32(found.arrays["masks"][:, 0, 0]), [0, 0, 0, 3, 0])


def test_all_rows_in_order_stay_where_they_are():
  within, beyond = (output_buffer.Room(["masks"], MASKS, budget) for budget in (SIZE, 0))
  assert within.is_whole(np.arange(5))
  assert not within.is_whole(np.arange(4))
  assert not within.is_whole(np.array([1, 0, 2, 3, 4]))
  assert not beyond.is_whole(np.arange(5))


def test_no_room(monkeypatch):
  """On the host: a device says so itself."""
  monkeypatch.setattr(output_buffer, "free_memory", lambda: 2.5 * SIZE / 5 / output_buffer.SHARE)
  within, beyond = (output_buffer.Room(["masks"], MASKS, budget) for budget in (SIZE, 0))
  within.reserve(5)
  beyond.reserve(2)
  with pytest.raises(ValueError, match=r"^the masks of 3 prompts take 0.0 GB, .* fewer prompts at"):
    beyond.reserve(3)
  with pytest.raises(ValueError, match="the masks of 3 prompts"):
    beyond.put(part([0, 1, 2]), np.arange(3))


def test_no_room_of_which_the_system_did_not_tell(monkeypatch):
  def zeros(*_):
    raise MemoryError

  beyond, one = output_buffer.Room(["masks"], MASKS, 0), part([0])
  monkeypatch.setattr(np, "zeros", zeros)
  with pytest.raises(ValueError, match="the masks of 5 prompts take"):
    beyond.put(one, np.array([0]))


class TestFreeMemory:
  @pytest.fixture
  def files(self, tmp_path, monkeypatch):
    monkeypatch.setattr(output_buffer, "MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(output_buffer, "GROUP", tmp_path)
    return tmp_path

  @pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing tells")
  def test_here(self):
    assert 0 < output_buffer.free_memory() < 2**50

  def test_untold(self, files):
    assert output_buffer.free_memory() == sys.maxsize

  def test_of_the_system(self, files):
    (files / "meminfo").write_text("MemTotal:  9 kB\nMemAvailable:   7 kB\nHugePages_Total: 0\n")
    assert output_buffer.free_memory() == 7 * 1024

  @pytest.mark.parametrize(("limit", "free"), [("max", 7 * 1024), ("900", 650), ("100", 0)])
  def test_of_a_container(self, files, limit, free):
    (files / "meminfo").write_text("MemAvailable:   7 kB\n")
    (files / "memory.max").write_text(f"{limit}\n")
    (files / "memory.current").write_text("300\n")
    (files / "memory.stat").write_text("anon 250\ninactive_file 50\n")
    assert output_buffer.free_memory() == free
