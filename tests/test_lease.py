"""Leases: one holder at a time, even if processes are killed."""

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time

import pytest

from sam3_jax.utils import lease as leases
from sam3_jax.utils.lease import (
  Holder,
  Lease,
  LeaseHeldError,
  create_exclusively,
  draft_path,
  is_abandoned,
)


@pytest.fixture
def path(tmp_path):
  return tmp_path / "work" / "part.lease"


def write(path, age=0.0, **changed):
  """Writes the lease of a running process, with some fields changed."""
  path.parent.mkdir(exist_ok=True)
  holder = dataclasses.replace(Holder.this_process(), **changed)
  path.write_text(json.dumps(dataclasses.asdict(holder)))
  then = time.time() - age
  os.utime(path, (then, then))


def test_one_holder(path):
  first, second = Lease(path), Lease(path)
  assert first.acquire()
  assert first.acquire()
  assert not second.acquire()
  with pytest.raises(LeaseHeldError, match=f"process {os.getpid()} on .* is working on it"):
    second.__enter__()
  first.release()
  with second:
    assert second.held
    assert not first.held
  assert not second.held
  assert list(path.parent.iterdir()) == []


def test_many_threads_at_once(path):
  for stale in (False, True):
    if stale:
      write(path, pid=2**22 + 1, started=1)
    ready, got = threading.Barrier(8), []

    def race(ready=ready, got=got):
      lease = Lease(path)
      ready.wait()
      got.append(lease.acquire())

    threads = [threading.Thread(target=race) for _ in range(8)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    assert sum(got) == 1
    path.unlink()


@pytest.mark.parametrize(
  ("age", "changed", "stale"),
  [
    (0, {"pid": 2**22 + 1}, True),  # no such process
    (0, {"started": 1}, True),  # its id now belongs to another process
    (500, {}, False),  # running, but slow
    (0, {"host": "other"}, False),  # the host name does not count
    (0, {"system": "other", "pid": 2**22 + 1}, False),  # not known to have ended
    (100, {"system": "other"}, False),
    (130, {"system": "other"}, True),
  ],
)
def test_stale(path, age, changed, stale):
  write(path, age, **changed)
  lease = Lease(path)
  assert lease.acquire() == stale
  assert lease.held == stale
  assert len(list(path.parent.iterdir())) == 1


def test_damaged_file_is_stale_only_by_age(path):
  write(path)
  path.write_bytes(b"")
  assert not Lease(path).acquire()
  os.utime(path, (1, 1))
  assert Lease(path).acquire()


@pytest.mark.slow
def test_killed_process_leaves_a_stale_lease(path):
  code = "import sys; from sam3_jax.utils.lease import Lease; print(Lease(sys.argv[1]).acquire())"
  command = [sys.executable, "-c", f"{code}; sys.stdout.flush(); sys.stdin.read()", str(path)]
  process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
  assert process.stdout.readline() == b"True\n"
  assert not Lease(path).acquire()
  process.kill()
  process.communicate()
  assert Lease(path).acquire()


def test_lost_lease_is_not_released(path):
  lease = Lease(path)
  assert lease.acquire()
  write(path, 50)
  assert not lease.held
  lease.renew()
  lease.release()
  assert time.time() - path.stat().st_mtime > 40


def test_renewal(path, monkeypatch):
  monkeypatch.setattr(leases, "RENEWED", 0.01)
  monkeypatch.setattr(leases, "renewals", leases._Renewals())
  lease = Lease(path)
  assert lease.acquire()
  os.utime(path, (1, 1))
  end = time.monotonic() + 10
  while path.stat().st_mtime < 2 and time.monotonic() < end:
    time.sleep(0.01)
  assert path.stat().st_mtime > 2
  lease.release()


def test_killed_takeover(path):
  write(path, pid=2**22 + 1)
  guard = path.with_name(f"{path.name}.takeover")
  guard.touch()
  assert not Lease(path).acquire()
  os.utime(guard, (1, 1))
  assert not Lease(path).acquire()
  assert Lease(path).acquire()


@pytest.mark.parametrize("links", [True, False])
def test_create_exclusively(tmp_path, monkeypatch, links):
  if not links:

    def refuse(*_):
      raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
  path = tmp_path / "job.json"
  assert create_exclusively(path, b"one")
  assert not create_exclusively(path, b"two")
  assert path.read_bytes() == b"one"
  assert os.listdir(tmp_path) == ["job.json"]


def test_drafts_belong_to_their_process(tmp_path):
  draft = draft_path(tmp_path / "part.json")
  assert draft != draft_path(tmp_path / "part.json")
  draft.touch()
  os.utime(draft, (1, 1))
  assert not is_abandoned(draft)
  lost = draft.with_name(draft.name.replace(f"-{os.getpid()}-", f"-{2**22 + 1}-"))
  lost.touch()
  assert is_abandoned(lost)
  elsewhere = tmp_path / ".part.json.00000000-1-1-00000000.partial"
  elsewhere.touch()
  assert not is_abandoned(elsewhere)
  os.utime(elsewhere, (1, 1))
  assert is_abandoned(elsewhere)
  draft_path(tmp_path / ("n" * 255)).touch()
