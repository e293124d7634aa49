"""Images that cannot be read, or end or block what reads them; processes that are told to end."""

import json
import os
import signal
import socket
import time

import batch_job
import batches
import numpy as np
import pytest
from batches import MODEL, QUIET, job, write_images
from PIL import Image

from sam3_jax.batch import journal, pipeline, reading
from sam3_jax.batch import run as runs
from sam3_jax.batch.children import Child, DiedError
from sam3_jax.batch.fetch import ChangedError, File, NotAFileError, fetch
from sam3_jax.batch.job import StorageError
from sam3_jax.batch.journal import Journal
from sam3_jax.batch.loading import load
from sam3_jax.batch.reading import Source, StoppedError, Task
from sam3_jax.utils.identity import FileIdentity, file_sha256, identify

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
SIDE = 16


def file_at(path, **changed) -> File:
  return File(path.name, str(path), None, identify(path))._replace(**changed)


def read(tasks, threads=2, ahead=3, **settings) -> list:
  source = Source(tasks, SIDE, 10**8)
  settings = {"workers": 0, "threads": threads, "ahead": ahead} | settings
  with reading.reading(source, **settings) as images:
    return list(images)


@pytest.fixture
def images(tmp_path):
  return write_images(tmp_path / "images", 6)


class TestFetch:
  def test_bytes_and_identity(self, images):
    path = images / "000.png"
    data, identity = fetch(file_at(path))
    assert data == path.read_bytes()
    assert identity.sha256 == file_sha256(path)
    assert identity.matches(identify(path))

  def test_a_span(self, images):
    path = images / "000.png"
    size = 20
    expected = FileIdentity(size, path.stat().st_mtime_ns)
    data, identity = fetch(file_at(path, span=(5, size), expected=expected))
    assert data == path.read_bytes()[5 : 5 + size]
    assert identity.size == size
    with pytest.raises(ChangedError, match="its file ends before it"):
      fetch(file_at(path, span=(5, 10**6), expected=None))

  def test_another_version(self, images):
    path = images / "000.png"
    listed = file_at(path)
    os.utime(path, (1, 1))
    with pytest.raises(ChangedError, match=r"000\.png has changed since it was listed"):
      fetch(listed)

  @pytest.mark.parametrize("kind", ["FIFO", "socket", "directory", "device"])
  def test_not_a_file(self, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)  # names of sockets are short
    path = tmp_path / "x.jpg"
    if kind == "FIFO":
      os.mkfifo(path)
    elif kind == "socket":
      with socket.socket(socket.AF_UNIX) as one:
        one.bind("x.jpg")
    elif kind == "directory":
      path.mkdir()
    else:
      path.symlink_to("/dev/zero")
    with pytest.raises(NotAFileError, match=f"x.jpg is a {kind}, not a file with an image"):
      fetch(file_at(path))
    image = load(file_at(path), SIDE, 100)
    assert image.reason
    assert not image.unreadable


def test_two_kinds_of_failures(images):
  (images / "text.jpg").write_bytes(b"no image")
  missing = file_at(images / "none.png")
  rows = read([Task(file_at(images / "text.jpg")), Task(missing)])
  assert [row.unreadable for row in rows] == [False, True]
  assert rows[0].identity == identify(images / "text.jpg", content=True)
  assert rows[1].reason.startswith("there is no image ")


class TestChild:
  """One process for all that is asked of it."""

  def test_reads_and_dies(self, images, tmp_path):
    large, slow = tmp_path / "large.png", tmp_path / "slow.png"
    Image.new("RGB", (9000, 9000)).save(large, compress_level=1)
    Image.effect_noise((4000, 4000), 80).save(slow)
    child = Child(SIDE, 10**8, memory=300 * 2**20)
    try:
      for path in sorted(images.iterdir()):
        wanted, got = load(file_at(path), SIDE, 10**8), child.read(file_at(path))
        assert np.array_equal(got.pixels, wanted.pixels)
        assert got.size == wanted.size
        assert got.identity == wanted.identity
      assert "more memory than there is" in child.read(file_at(large)).reason
      with pytest.raises(DiedError, match="signal 9") as died:
        child.read(file_at(slow), fetched=child.kill)
      assert died.value.identity == identify(slow, content=True)
      assert not died.value.told
    finally:
      child.close()


class FakeChild:
  """Reads in this process; dies of images called poison*."""

  def __init__(self, side, max_pixels, memory=None):
    self.side, self.limited, self.killed = side, memory is not None, False
    self.reading = []
    FakeChild.made.append(self)

  def wait(self, check=None):
    pass

  def read(self, file, fetched=lambda: None, check=lambda: None):
    self.reading.append(file.name)
    identity = identify(file.path, content=True)
    if "poison" in file.name:
      raise DiedError(-11, identity)
    if "endless" in file.name:
      fetched()
      while not self.killed:
        time.sleep(0.01)
        check()
      raise DiedError(-9, identity)
    return load(file, self.side, 10**8)

  def kill(self):
    self.killed = True

  close = kill


@pytest.fixture
def fakes(monkeypatch):
  monkeypatch.setattr(FakeChild, "made", [], raising=False)
  monkeypatch.setattr(reading, "Child", FakeChild)
  return FakeChild.made


class TestSuspects:
  @pytest.mark.parametrize("workers", [0, 2])
  def test_are_read_alone(self, images, fakes, workers):
    """One that ends its process, at every try; after it the others are read all the same."""
    (images / "000.png").rename(images / "poison.png")
    paths = [images / "poison.png", *sorted(images.glob("0*"))]
    rows = read([Task(file_at(path), alone=not workers and i == 0) for i, path in enumerate(paths)],
                workers=workers)  # fmt: skip
    assert rows[0].reason == "poison.png: it ends the process that reads it (signal 11)"
    assert rows[0].identity == identify(images / "poison.png", content=True)
    assert not rows[0].unreadable
    assert all(not row.reason for row in rows[1:])
    assert [name for fake in fakes if fake.limited for name in fake.reading] == ["poison.png"]

  @pytest.mark.parametrize("workers", [0, 1])
  def test_decoding_without_end(self, images, fakes, monkeypatch, workers):
    monkeypatch.setattr(reading, "DECODING", 0.3)
    (images / "000.png").rename(images / "endless.png")

    def slow(file, side, max_pixels, fetched=lambda _: None):
      if "endless" in file.name:
        fetched(None)
        time.sleep(2)
      return load(file, side, max_pixels, fetched)

    monkeypatch.setattr(reading, "load", slow)
    paths = [images / "endless.png", *sorted(images.glob("0*"))]
    rows = read([Task(file_at(path)) for path in paths], workers=workers, threads=1)
    assert "it ends the process that reads it (time limit of 0 s)" in rows[0].reason
    assert all(not row.reason for row in rows[1:])

  def test_bytes_that_do_not_come(self, images, monkeypatch):
    monkeypatch.setattr(reading, "FETCHING", 0.3)
    monkeypatch.setattr(
      reading, "load",
      lambda file, *given: time.sleep(2) if "000" in file.name else load(file, *given),
    )  # fmt: skip
    rows = read([Task(file_at(path)) for path in sorted(images.iterdir())], threads=1)
    assert rows[0].unreadable
    assert "000.png cannot be read (no answer in 0 s)" in rows[0].reason
    assert all(not row.reason for row in rows[1:])

  def test_many_that_do_not_come(self, images, monkeypatch):
    monkeypatch.setattr(reading, "FETCHING", 0.1)
    monkeypatch.setattr(reading, "LOST", 2)
    monkeypatch.setattr(reading, "load", lambda *_: time.sleep(2))
    with pytest.raises(StorageError, match="3 images could not be read"):
      read([Task(file_at(path)) for path in sorted(images.iterdir())], threads=1)

  def test_of_a_process_that_died(self, images, tmp_path, fakes, monkeypatch):
    """Its journal says what it was reading."""
    monkeypatch.setattr(pipeline, "Engine", batches.Engine)
    (images / "003.png").rename(images / "003-poison.png")
    (tmp_path / "out" / "leases").mkdir(parents=True)
    (tmp_path / "out" / "leases" / "part-000000.journal").write_text("+2\n+1\n-1\n+3\n+4")
    (tmp_path / "out" / "leases" / "part-000001.journal").write_text("+1")
    assert runs.run(job(images, tmp_path / "out"), MODEL, QUIET, QUIET)
    assert fakes[0].reading == ["002.png", "003-poison.png"]
    [failed] = (tmp_path / "out" / "errors.jsonl").read_text().splitlines()
    assert json.loads(failed)["image"] == "003-poison.png"
    assert list((tmp_path / "out" / "leases").iterdir()) == []


def test_journal(tmp_path):
  path = tmp_path / "journal"
  first = Journal(path)
  for index in (3, 4, 5):
    first.begin(index)
  first.end(4)
  second = Journal(path)
  assert second.suspects == {3, 5}
  second.begin(5)
  second.end(5)
  second.close()
  assert journal._unfinished(path) == {3}
  Journal(path).end(3)
  third = Journal(path)
  third.close()
  third.begin(1)
  assert not path.exists()


def test_stopping_does_not_wait_for_a_read(images, monkeypatch):
  stop = []
  monkeypatch.setattr(reading, "load", lambda *_: (stop.append(1), time.sleep(2)))
  began = time.monotonic()
  with pytest.raises(StoppedError):
    read([Task(file_at(images / "000.png"))], stopping=lambda: bool(stop))
  assert time.monotonic() - began < 1.5


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGTERM, "0"), (signal.SIGHUP, "1")])
def test_told_to_end_while_a_read_hangs(tmp_path, number, workers):
  """Here twice; sixty times, and with all that comes after, in `benchmarks/batch_faults.py`."""
  images = write_images(tmp_path / "images", 12)
  (images / "008.png").rename(images / "hang.png")
  hang = tmp_path / "away"
  hang.touch()
  typed = ["--images", "images", "--prompts", "cat", "--out", "out", "--workers", workers]
  process = batch_job.start(tmp_path, *typed, hang=hang)
  end = time.monotonic() + 240
  while len(list((tmp_path / "out").glob("parts/part-*.json"))) < 1 and time.monotonic() < end:
    time.sleep(0.02)
  time.sleep(0.2)
  children = batch_job.descendants(process.pid)
  process.send_signal(number)
  status, said, seconds = batch_job.finish(process, 60)
  assert status == 75, said
  assert "stopped as asked; rerun the same command to resume" in said
  assert seconds < 10
  assert batch_job.alive(children) == []
  assert list((tmp_path / "out" / "leases").iterdir()) == []


def test_nohup_stays_nohup(monkeypatch):
  from sam3_jax.utils.signals import terminable

  before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
  try:
    with terminable() as stopping:
      os.kill(os.getpid(), signal.SIGHUP)
      time.sleep(0.1)
      assert not stopping()
      os.kill(os.getpid(), signal.SIGTERM)
      time.sleep(0.1)
      assert stopping()
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
  finally:
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("signals", [1, 2])
def test_a_deadline_ends_a_process_that_is_blocked(tmp_path, signals):
  """In C, without a return to Python; what is to be kept is kept by another thread."""
  program = tmp_path / "program.py"
  program.write_text(
    "import ctypes, pathlib, sys\n"
    "from sam3_jax.utils.signals import terminable\n"
    f"with terminable({0.5 if signals == 1 else 60}) as stopping:\n"
    "  stopping.at_deadline(lambda: pathlib.Path('kept').touch())\n"
    "  print('go', flush=True)\n"
    "  libc = ctypes.CDLL(None)\n"
    "  while True: libc.sleep(60) or libc.usleep(0)\n"
  )
  process = batch_job.python(tmp_path, str(program))
  process.stdout.readline()
  for _ in range(signals):
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
  status, said, _ = batch_job.finish(process, 30)
  assert status == 75
  assert "stopped; rerun the same command to resume" in said
  assert (tmp_path / "kept").exists()
