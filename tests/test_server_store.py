"""The store: budgets of memory and disk, sessions, expiry, restarts, files of killed servers."""

import dataclasses
import os
import stat
import tempfile
import time

import numpy as np
import pytest

from sam3_jax.server.errors import ApiError
from sam3_jax.server.store import Store, hashed, remove_abandoned
from sam3_jax.types import ImageEmbedding, VisualEmbedding
from sam3_jax.utils.identity import Origin

ORIGIN = Origin("abc", "toy")
SESSION = "s" * 43


def embedding(seed: int) -> ImageEmbedding:
  values = np.random.default_rng(seed).standard_normal((1, 4, 4, 2)).astype(np.float32)
  visual = VisualEmbedding(fine=values, middle=values, coarse=values)
  return ImageEmbedding(
    fine=values, middle=values, coarse=values, attended=values,
    sizes=np.array([[40, 60]], np.int32), visual=visual, origin=ORIGIN,
  )  # fmt: skip


SIZE = 7 * 4 * 4 * 2 * 4 + 8  # bytes of an embedding


@pytest.fixture
def opened(tmp_path):
  stores = []

  def open_store(memory=10 * SIZE, disk=10 * SIZE, **options):
    stores.append(Store(memory=memory, disk=disk, origin=ORIGIN, **options))
    return stores[-1]

  yield open_store
  for store in stores:
    store.close()


def files(store: Store) -> list[str]:
  return sorted(path.name for path in store.directory.glob("*.*"))


def test_keeps_embeddings_in_memory(opened):
  store = opened()
  one = embedding(0)
  identity = store.add(one, (40, 60), None)
  assert store.load(store.find(identity, None)) is one
  assert (store.memory_bytes, store.disk_bytes, files(store)) == (SIZE, 0, [])


def test_moves_the_least_recently_used_to_disk(opened):
  store = opened(memory=2 * SIZE)
  ids = [store.add(embedding(seed), (40, 60), None) for seed in range(2)]
  store.find(ids[0], None)  # now 1 is the least recently used
  ids.append(store.add(embedding(2), (40, 60), None))
  assert (store.memory_bytes, store.disk_bytes) == (2 * SIZE, SIZE)
  assert files(store) == [f"{hashed(ids[1])}.safetensors"]
  for seed, identity in enumerate(ids):  # all are as they were, wherever they are
    loaded = store.load(store.find(identity, None))
    np.testing.assert_array_equal(loaded.visual.fine, embedding(seed).fine)
    assert loaded.origin == ORIGIN
    assert store.memory_bytes <= 2 * SIZE


def test_deletes_beyond_the_disk_budget(opened):
  store = opened(memory=SIZE, disk=2 * SIZE)
  ids = [store.add(embedding(seed), (40, 60), None) for seed in range(5)]
  assert store.disk_bytes <= 2 * SIZE
  for identity in ids[:2]:
    with pytest.raises(ApiError, match="no image with this id"):
      store.find(identity, None)
  for identity in ids[2:]:
    store.load(store.find(identity, None))
  assert len(files(store)) <= 2


def test_without_budgets_nothing_stays(opened):
  store = opened(memory=0, disk=0)
  identity = store.add(embedding(0), (40, 60), None)
  with pytest.raises(ApiError):
    store.find(identity, None)
  assert files(store) == []


def test_sessions(opened):
  store = opened()
  own, shared = (store.add(embedding(0), (40, 60), session) for session in (SESSION, None))
  assert store.find(own, SESSION).size == (40, 60)
  for session in (None, "t" * 43, ""):
    with pytest.raises(ApiError):
      store.find(own, session)
  for session in (None, "t" * 43, SESSION):
    store.find(shared, session)


def test_expiry(opened, monkeypatch):
  store = opened(memory=SIZE, expire_seconds=100)
  ids = [store.add(embedding(seed), (40, 60), None) for seed in range(2)]
  later = time.time() + 60
  monkeypatch.setattr(time, "time", lambda: later)
  store.find(ids[0], None)
  later += 60
  store.find(ids[0], None)
  with pytest.raises(ApiError):
    store.find(ids[1], None)
  assert len(store) == 1


def test_remove_deletes_the_file(opened):
  store = opened(memory=0)
  identity = store.add(embedding(0), (40, 60), None)
  stored = store.find(identity, None)
  assert files(store)
  store.remove(stored)
  assert files(store) == []
  with pytest.raises(ApiError):
    store.load(stored)


def test_a_damaged_file_is_an_unknown_image(opened):
  store = opened(memory=0)
  identity = store.add(embedding(0), (40, 60), None)
  stored = store.find(identity, None)
  (store.directory / files(store)[0]).write_bytes(b"damaged")
  with pytest.raises(ApiError, match="no image"):
    store.load(stored)
  assert len(store) == 0


def test_close_deletes_a_temporary_store(opened):
  store = opened(memory=0)
  store.add(embedding(0), (40, 60), None)
  assert stat.S_IMODE(store.directory.stat().st_mode) == 0o700
  assert stat.S_IMODE((store.directory / files(store)[0]).stat().st_mode) == 0o600
  store.close()
  assert not store.directory.exists()


def test_a_kept_store_survives_a_restart(tmp_path):
  first = Store(memory=10 * SIZE, disk=10 * SIZE, origin=ORIGIN, directory=tmp_path / "kept")
  own = first.add(embedding(1), (40, 60), SESSION)
  first.add(embedding(2), (40, 60), None)
  deleted = first.add(embedding(3), (40, 60), None)
  first.remove(first.find(deleted, None))
  first.close()
  assert own not in "".join(path.read_text("latin-1") for path in first.directory.glob("*.*"))
  second = Store(memory=10 * SIZE, disk=10 * SIZE, origin=ORIGIN, directory=tmp_path / "kept")
  assert (len(second), second.memory_bytes) == (2, 0)
  with pytest.raises(ApiError):
    second.find(own, None)
  loaded = second.load(second.find(own, SESSION))
  np.testing.assert_array_equal(loaded.fine, embedding(1).fine)
  second.close()


def test_a_kept_store_of_another_checkpoint_is_emptied(tmp_path):
  first = Store(memory=0, disk=10 * SIZE, origin=ORIGIN, directory=tmp_path)
  first.add(embedding(1), (40, 60), None)
  first.close()
  other = dataclasses.replace(ORIGIN, identity="other")
  second = Store(memory=0, disk=10 * SIZE, origin=other, directory=tmp_path)
  assert (len(second), files(second)) == (0, [])
  second.close()


def test_other_files_are_left_alone(tmp_path):
  (tmp_path / "uploads").mkdir()
  others = [tmp_path / name for name in ("a.json", "a.safetensors", "uploads/a.part")]
  for path in others:
    path.write_text("mine")
  store = Store(memory=0, disk=10 * SIZE, origin=ORIGIN, directory=tmp_path)
  store.add(embedding(1), (40, 60), None)
  store.close()
  assert all(path.read_text() == "mine" for path in others)


def test_two_servers_cannot_share_a_store(tmp_path, opened):
  opened(directory=tmp_path)
  with pytest.raises(ValueError, match="another server uses"):
    opened(directory=tmp_path)


def test_removes_directories_of_killed_servers(tmp_path, monkeypatch, opened):
  monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
  running = opened()
  abandoned = tmp_path / "sam3-jax-serve-killed"
  abandoned.mkdir()
  (abandoned / "image.safetensors").write_bytes(b"")
  link = tmp_path / "sam3-jax-serve-link"
  link.symlink_to(tmp_path)
  remove_abandoned()
  assert not abandoned.exists()
  assert running.directory.exists()
  assert link.is_symlink()
  assert os.listdir(tmp_path)
