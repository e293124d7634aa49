"""Images that are unreadable, or crash or block their reader; processes that are stopped."""

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
from waiting import wait_until

from sam3_jax.batch import journal, pipeline, prefetch
from sam3_jax.batch.image_bytes import (
  FileChangedError,
  ImageFile,
  NotAFileError,
  read_image_bytes,
)
from sam3_jax.batch.job import StorageError
from sam3_jax.batch.journal import Journal
from sam3_jax.batch.load_image import load_image
from sam3_jax.batch.prefetch import ReadTask, StoppedError
from sam3_jax.batch.reader_process import ReaderDiedError, ReaderProcess
from sam3_jax.batch.run import run
from sam3_jax.utils.identity import FileIdentity, file_sha256, identify

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
SIDE = 16


def file_at(path, **changed) -> ImageFile:
  return ImageFile(path.name, str(path), None, identify(path))._replace(**changed)


def read(tasks, threads=2, ahead=3, **settings) -> list:
  settings = {"workers": 0, "threads": threads, "ahead": ahead} | settings
  with prefetch.prefetch(tasks, side=SIDE, max_pixels=10**8, **settings) as images:
    return list(images)


@pytest.fixture
def images(tmp_path):
  return write_images(tmp_path / "images", 6)


class TestReadImageBytes:
  def test_bytes_and_identity(self, images):
    path = images / "000.png"
    data, identity = read_image_bytes(file_at(path))
    assert data == path.read_bytes()
    assert identity.sha256 == file_sha256(path)
    assert identity.matches(identify(path))

  def test_span(self, images):
    path = images / "000.png"
    size = 20
    expected = FileIdentity(size, path.stat().st_mtime_ns)
    data, identity = read_image_bytes(file_at(path, span=(5, size), expected=expected))
    assert data == path.read_bytes()[5 : 5 + size]
    assert identity.size == size
    with pytest.raises(FileChangedError, match="its file ends before it"):
      read_image_bytes(file_at(path, span=(5, 10**6), expected=None))

  def test_changed_file(self, images):
    path = images / "000.png"
    listed = file_at(path)
    os.utime(path, (1, 1))
    with pytest.raises(FileChangedError, match=r"000\.png has changed since it was listed"):
      read_image_bytes(listed)

  @pytest.mark.parametrize("kind", ["FIFO", "socket", "directory", "device"])
  def test_not_a_file(self, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)  # names of sockets are short
    path = tmp_path / "x.jpg"
    if kind == "FIFO":
      os.mkfifo(path)
    elif kind == "socket":
      with socket.socket(socket.AF_UNIX) as server:
        server.bind("x.jpg")
    elif kind == "directory":
      path.mkdir()
    else:
      path.symlink_to("/dev/zero")
    with pytest.raises(NotAFileError, match=f"x.jpg is a {kind}, not a file with an image"):
      read_image_bytes(file_at(path))
    image = load_image(file_at(path), SIDE, 100)
    assert image.reason
    assert not image.unreadable


def test_undecodable_and_unreadable_images(images):
  (images / "text.jpg").write_bytes(b"no image")
  missing = file_at(images / "none.png")
  text, none = read([ReadTask(file_at(images / "text.jpg")), ReadTask(missing)])
  assert (text.unreadable, none.unreadable) == (False, True)
  assert text.identity == identify(images / "text.jpg", content=True)
  assert none.reason.startswith("there is no image ")


class TestReaderProcess:
  """One process for all checks, because it is slow to start."""

  @pytest.mark.slow
  def test_reads_images_and_dies(self, images, tmp_path):
    large, slow = tmp_path / "large.png", tmp_path / "slow.png"
    Image.new("RGB", (9000, 9000)).save(large, compress_level=1)
    Image.effect_noise((4000, 4000), 80).save(slow)
    reader = ReaderProcess(SIDE, 10**8, memory=300 * 2**20)
    try:
      for path in sorted(images.iterdir()):
        wanted, got = load_image(file_at(path), SIDE, 10**8), reader.read(file_at(path))
        assert np.array_equal(got.pixels, wanted.pixels)
        assert got.size == wanted.size
        assert got.identity == wanted.identity
      assert "more memory than there is" in reader.read(file_at(large)).reason
      with pytest.raises(ReaderDiedError, match="signal 9") as died:
        reader.read(file_at(slow), on_read=reader.kill)
      assert died.value.identity == identify(slow, content=True)
      assert not died.value.was_terminated
    finally:
      reader.close()


class FakeProcess:
  """Reads in this process; dies of images called poison*, and hangs at those called endless*."""

  def __init__(self, side, max_pixels, memory=None):
    self.side, self.limited, self.killed = side, memory is not None, False
    self.reading = []
    FakeProcess.made.append(self)

  def wait(self, check=None):
    pass

  def read(self, file, on_read=lambda: None, check=lambda: None):
    self.reading.append(file.name)
    identity = identify(file.path, content=True)
    if "poison" in file.name:
      raise ReaderDiedError(-11, identity)
    if "endless" in file.name:
      on_read()
      while not self.killed:
        time.sleep(0.01)
        check()
      raise ReaderDiedError(-9, identity)
    return load_image(file, self.side, 10**8)

  def kill(self):
    self.killed = True

  close = kill


@pytest.fixture
def fakes(monkeypatch):
  monkeypatch.setattr(FakeProcess, "made", [], raising=False)
  monkeypatch.setattr(prefetch, "ReaderProcess", FakeProcess)
  return FakeProcess.made


class TestSuspects:
  @pytest.mark.parametrize("workers", [0, 2])
  def test_are_read_in_isolation(self, images, fakes, workers):
    """An image that crashes its process at every attempt; the images after it are read."""
    (images / "000.png").rename(images / "poison.png")
    paths = [images / "poison.png", *sorted(images.glob("0*"))]
    tasks = [ReadTask(file_at(path)) for path in paths]
    if not workers:
      tasks[0] = tasks[0]._replace(isolated=True)
    loaded = read(tasks, workers=workers)
    assert loaded[0].reason == "poison.png: it crashes the process that reads it (signal 11)"
    assert loaded[0].identity == identify(images / "poison.png", content=True)
    assert not loaded[0].unreadable
    assert all(not image.reason for image in loaded[1:])
    assert [name for fake in fakes if fake.limited for name in fake.reading] == ["poison.png"]

  @pytest.mark.parametrize("workers", [0, 1])
  def test_decoding_that_does_not_end(self, images, fakes, monkeypatch, workers):
    monkeypatch.setattr(prefetch, "DECODE_TIMEOUT", 0.3)
    (images / "000.png").rename(images / "endless.png")

    def slow(file, side, max_pixels, on_read=lambda _: None):
      if "endless" in file.name:
        on_read(None)
        time.sleep(2)
      return load_image(file, side, max_pixels, on_read)

    monkeypatch.setattr(prefetch, "load_image", slow)
    paths = [images / "endless.png", *sorted(images.glob("0*"))]
    loaded = read([ReadTask(file_at(path)) for path in paths], workers=workers, threads=1)
    assert "it crashes the process that reads it (time limit of 0 s)" in loaded[0].reason
    assert all(not image.reason for image in loaded[1:])

  def test_read_that_hangs(self, images, monkeypatch):
    monkeypatch.setattr(prefetch, "READ_TIMEOUT", 0.3)
    monkeypatch.setattr(
      prefetch, "load_image",
      lambda file, *given: time.sleep(2) if "000" in file.name else load_image(file, *given),
    )  # fmt: skip
    loaded = read([ReadTask(file_at(path)) for path in sorted(images.iterdir())], threads=1)
    assert loaded[0].unreadable
    assert "000.png cannot be read (no answer in 0 s)" in loaded[0].reason
    assert all(not image.reason for image in loaded[1:])

  def test_many_reads_that_hang(self, images, monkeypatch):
    monkeypatch.setattr(prefetch, "READ_TIMEOUT", 0.1)
    monkeypatch.setattr(prefetch, "MAX_HUNG_READS", 2)
    monkeypatch.setattr(prefetch, "load_image", lambda *_: time.sleep(2))
    with pytest.raises(StorageError, match="3 images could not be read"):
      read([ReadTask(file_at(path)) for path in sorted(images.iterdir())], threads=1)

  def test_from_the_journal_of_a_killed_process(self, images, tmp_path, fakes, monkeypatch):
    monkeypatch.setattr(pipeline, "Engine", batches.Engine)
    (images / "003.png").rename(images / "003-poison.png")
    (tmp_path / "out" / "leases").mkdir(parents=True)
    (tmp_path / "out" / "leases" / "part-000000.journal").write_text("+2\n+1\n-1\n+3\n+4")
    (tmp_path / "out" / "leases" / "part-000001.journal").write_text("+1")
    assert run(job(images, tmp_path / "out"), MODEL, QUIET, QUIET)
    assert fakes[0].reading == ["002.png", "003-poison.png"]
    [failed] = (tmp_path / "out" / "errors.jsonl").read_text().splitlines()
    assert json.loads(failed)["image"] == "003-poison.png"
    assert list((tmp_path / "out" / "leases").iterdir()) == []


def test_journal_lists_unfinished_reads(tmp_path):
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


def test_stopping_does_not_wait_for_reads(images, monkeypatch):
  stop = []
  monkeypatch.setattr(prefetch, "load_image", lambda *_: (stop.append(1), time.sleep(60)))
  began = time.monotonic()
  with pytest.raises(StoppedError):
    read([ReadTask(file_at(images / "000.png"))], stopping=lambda: bool(stop))
  assert time.monotonic() - began < 30


@pytest.mark.slow
@pytest.mark.parametrize(("number", "workers"), [(signal.SIGTERM, "0"), (signal.SIGHUP, "1")])
def test_stopped_by_a_signal_while_a_read_hangs(tmp_path, number, workers, request):
  """Twice here; sixty times, and resumed, in `benchmarks/batch_faults.py`."""
  # Under nohup SIGHUP is ignored, and so would the job.
  before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
  request.addfinalizer(lambda: signal.signal(signal.SIGHUP, before))
  images = write_images(tmp_path / "images", 12)
  (images / "008.png").rename(images / "hang.png")
  hang, out = tmp_path / "away", tmp_path / "out"
  hang.touch()
  typed = ["--images", "images", "--prompts", "cat", "--out", "out", "--workers", workers]
  process = batch_job.start(tmp_path, *typed, hang=hang)
  request.addfinalizer(process.kill)

  def is_hanging():
    assert process.poll() is None, process.stderr.read()
    return list(out.glob("parts/part-*.json")) and batch_job.hanging(hang).exists()

  wait_until(is_hanging)
  readers = batch_job.children(process.pid)
  process.send_signal(number)
  status, message, seconds = batch_job.finish(process)
  assert status == 75, f"status {status} after {seconds:.1f} s: {message}"
  assert "stopped; rerun the same command to resume" in message
  assert seconds < 10
  assert batch_job.alive(readers, patience=60) == []
  assert list((out / "leases").iterdir()) == []


def test_ignored_sighup_stays_ignored(monkeypatch):
  from sam3_jax.utils.signals import terminable

  before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
  try:
    with terminable() as stopping:
      os.kill(os.getpid(), signal.SIGHUP)
      time.sleep(0.1)
      assert not stopping()
      os.kill(os.getpid(), signal.SIGTERM)
      wait_until(stopping)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
  finally:
    signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
@pytest.mark.parametrize("signals", [1, 2])
def test_deadline_ends_a_blocked_process(tmp_path, signals):
  """Blocked in C code that does not return to Python; another thread saves the results."""
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
  status, message, _ = batch_job.finish(process, 30)
  assert status == 75
  assert "stopped; rerun the same command to resume" in message
  assert (tmp_path / "kept").exists()
