"""Images in records between runs and under faults: resuming, several readers, damaged records."""

import dataclasses
import errno
import hashlib
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest
import record_files
from batches import files, load_images
from record_files import Scene, example, scene_example, start, write

from sam3_jax.batch.frozen_inputs import open_job
from sam3_jax.batch.image_bytes import read_image_bytes
from sam3_jax.batch.input_list import image_file
from sam3_jax.batch.inputs import list_inputs
from sam3_jax.batch.record_files import array_record, open_files, parquet
from sam3_jax.batch.record_files.columns import Columns

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
stub, scenes = record_files.stub, record_files.scenes


@pytest.mark.parametrize(("kind", "count"), [("array_record", 1), ("tfrecord", 1), ("parquet", 5)])
def test_damaged_records_are_recorded(tmp_path, scenes, kind, count):
  """The other images are processed. In Parquet, a damaged page costs the rest of its row group."""
  path = Path(write(tmp_path, kind, scenes)[0])
  found = list_inputs(str(path), "cat")
  data = bytearray(path.read_bytes())
  if kind == "parquet":
    from pyarrow import parquet

    start = parquet.read_metadata(path).row_group(1).column(1).data_page_offset
  else:  # the data of a record begins with the feature `label`
    start = data.index(scene_example(scenes[5])[:20] if kind == "tfrecord" else scenes[5].data)
  rewrite(path, data[:start] + b"\xff" * 8 + data[start + 8 :])
  loaded = load_images(found)
  damaged = [image for image in loaded if "#" in image.reason and "its " in image.reason]
  assert len(damaged) == count, [image.reason for image in loaded]
  assert len([image for image in loaded if image.reason]) == count + (kind != "parquet")
  assert all(image.identity and not image.unreadable for image in damaged)


def rewrite(path: Path, data: bytes) -> None:
  """Writes a file of the same size without a new modification time."""
  status = path.stat()
  assert len(data) == status.st_size
  path.write_bytes(data)
  os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_missing_record_is_not_made_from_the_list(tmp_path, scenes):
  """As in a bucket, for a pattern that matches whole images and files of records."""
  found = list_inputs(write(tmp_path, "array_record", scenes)[0], "cat")
  open_job(tmp_path / "out", {"part_size": 4}, found)

  def make(name, identity):
    return dataclasses.replace(found[0], name=name, identity=identity, record=None)

  with pytest.raises(ValueError, match="1 file removed"):
    open_job(tmp_path / "out", {"part_size": 4}, found[:-1], frozen_input=make)


READ_BY_INDEX = ["array_record", "parquet"]


@pytest.mark.parametrize("kind", READ_BY_INDEX)
def test_several_processes_give_the_same_parts(tmp_path, scenes, kind):
  images, columns = write(tmp_path, kind, scenes)
  assert start(images, tmp_path / "alone", columns)
  for process in (1, 0):
    assert start(images, tmp_path / "two", columns, processes=2, process=process)
  expected, found = files(tmp_path / "alone"), files(tmp_path / "two")
  assert {name: data for name, data in found.items() if name != "job.json"} == {
    name: data for name, data in expected.items() if name != "job.json"
  }


@pytest.mark.parametrize("kind", READ_BY_INDEX)
def test_changes_between_two_runs(tmp_path, scenes, kind):
  path, columns, out = (
    Path(write(tmp_path, kind, scenes)[0]),
    Columns(name="name"),
    tmp_path / "out",
  )
  assert start(str(path), out, columns)
  before = files(out)

  os.utime(path, ns=(0, 10**18))  # touched: the content is compared
  assert start(str(path), out, columns)
  write(tmp_path, kind, [*scenes, Scene("new.png", scenes[0].data)])
  with pytest.raises(ValueError, match=r"1 file added \(new.png\)"):
    start(str(path), out, columns)
  assert start(str(path), out, columns, add=True)
  after = files(out)
  assert all(after[name] == data for name, data in before.items() if name.startswith("parts/"))

  changed = [*scenes[:3], scenes[3]._replace(data=scenes[4].data), *scenes[4:]]
  write(tmp_path, kind, [*changed, Scene("new.png", scenes[0].data)])
  with pytest.raises(ValueError, match=rf"1 file modified \({scenes[3].name}\)"):
    start(str(path), out, columns)


def test_another_column_is_another_image(tmp_path, scenes):
  records = [example(image=[scenes[i].data], other=[scenes[i + 1].data]) for i in range(3)]
  path = record_files.write_array_record(tmp_path / "a.array_record", records)
  assert start(str(path), tmp_path / "out", Columns(image="image"))
  with pytest.raises(ValueError, match=r"3 files modified"):
    start(str(path), tmp_path / "out", Columns(image="other"))


@pytest.mark.parametrize("kind", READ_BY_INDEX)
def test_files_that_change_or_fail_while_the_job_runs(tmp_path, scenes, kind, monkeypatch):
  """Both are unreadable, not undecodable: the images stay pending."""
  path = Path(write(tmp_path, kind, scenes)[0])
  found = list_inputs(str(path), "cat")
  assert not load_images(found[:1])[0].reason  # the file is open now
  write(tmp_path, kind, scenes[::-1])
  os.utime(path, ns=(0, 10**18))
  (image,) = load_images(found[:1])
  assert image.unreadable
  assert "has changed since it was listed" in image.reason

  found = list_inputs(str(path), "cat")
  failure = OSError(errno.EIO, "Input/output error")
  if kind == "parquet":
    monkeypatch.setattr(parquet.os, "pread", raising(failure))
  else:
    monkeypatch.setattr(array_record.ArrayRecordReader, "_opened", raising(failure))
  (image,) = load_images(found[:1])
  assert image.unreadable
  assert "cannot be read (Input/output error)" in image.reason
  monkeypatch.undo()
  assert read_image_bytes(image_file(found[0]))[0] == scenes[-1].data
  path.unlink()
  assert load_images(found[:1])[0].unreadable


def raising(error: Exception):
  def raises(*_):
    raise error

  return raises


@pytest.mark.parametrize("kind", READ_BY_INDEX)
def test_threads_that_read_in_any_order(tmp_path, scenes, kind):
  found = list_inputs(write(tmp_path, kind, scenes)[0], "cat")
  order = np.random.default_rng(0).permutation(np.tile(np.arange(len(found)), 8))
  read = dict[int, bytes]()

  def work(rows):
    for row in rows:
      data, _ = read_image_bytes(image_file(found[row]))
      assert read.setdefault(row, data) == data

  threads = [threading.Thread(target=work, args=(rows,)) for rows in np.array_split(order, 8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert [read[row] for row in range(len(found))] == [scene.data for scene in scenes]


def test_open_files_are_limited(tmp_path, scenes):
  record = [scene_example(scenes[0])]
  paths = [
    record_files.write_array_record(tmp_path / f"{i}.array_record", record) for i in range(9)
  ]
  for path in paths:
    (item,) = list_inputs(str(path), "cat")
    read_image_bytes(image_file(item))
    assert len(open_files._open_files) <= open_files.MAX_OPEN


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_bounded_by_the_pages_of_a_row_group(tmp_path):
  """300 MB of images in one row group, in pages of about 1 MB, are read in order."""
  pyarrow = pytest.importorskip("pyarrow", reason="tables need the extra `parquet`")
  parquet = pytest.importorskip("pyarrow.parquet")
  rng, path = np.random.default_rng(0), tmp_path / "a.parquet"
  images = pyarrow.array([rng.bytes(100_000) for _ in range(3000)])
  table = pyarrow.table({"image": images})
  parquet.write_table(table, path, row_group_size=10**6, write_batch_size=8)
  code = """
    import hashlib, sys
    from pathlib import Path
    from sam3_jax.batch.image_bytes import read_image_bytes
    from sam3_jax.batch.input_list import image_file
    from sam3_jax.batch.inputs import list_inputs

    def peak():  # ru_maxrss would count the parent too
      return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024

    found = list_inputs(sys.argv[1], "cat")
    before, digest = peak(), hashlib.sha256()
    for item in found:
      digest.update(read_image_bytes(image_file(item))[0])
    print(peak() - before, digest.hexdigest())
  """
  command = [sys.executable, "-c", textwrap.dedent(code), str(path)]
  growth, found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
  expected = hashlib.sha256()
  for image in images:
    expected.update(image.as_py())
  assert found == expected.hexdigest()
  assert int(growth) < 160e6  # measured 97 MB, constant after the first 100 MB


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*READ_BY_INDEX, "tfrecord", "arrow stream"])
def test_reader_processes(tmp_path, scenes, kind):
  images, columns = write(tmp_path, kind, scenes)
  for workers in (0, 2):
    assert start(images, tmp_path / f"out{workers}", columns, workers=workers)
  assert files(tmp_path / "out2") == files(tmp_path / "out0")


FLIPS = """
import sys
from pathlib import Path
import numpy as np
from sam3_jax.batch.image_bytes import UnusableFileError, read_image_bytes
from sam3_jax.batch.input_list import image_file
from sam3_jax.batch.inputs import list_inputs
from sam3_jax.batch.record_files.columns import Columns

path, rng, outcomes = Path(sys.argv[1]), np.random.default_rng(0), set()
data = np.fromfile(path, np.uint8)
for number in range(60):
  changed = data.copy()
  # In the whole file, in the headers or footers at its ends, or a file that is cut.
  start, stop = [(0, len(data)), (0, 1500), (len(data) - 1500, len(data))][number % 3]
  at = rng.integers(start, stop, rng.choice([1, 10, 100]))
  changed[at] ^= rng.integers(1, 256, len(at), np.uint8)
  copy = path.with_name(f"{number}{path.suffix}")
  changed[: len(data) if number % 5 else rng.integers(len(data))].tofile(copy)
  try:
    for item in list_inputs(str(copy), columns=Columns(name="name", prompts="phrases")):
      try:
        read_image_bytes(image_file(item))
        outcomes.add("read")
      except UnusableFileError as error:
        assert len(str(error).splitlines()) == 1
  except ValueError as error:
    assert len(str(error).splitlines()) == 1
    outcomes.add("refused")
print(*sorted(outcomes))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", record_files.FILES)
def test_changed_bytes_cause_no_crash(tmp_path, scenes, kind):
  """A changed file is refused, or its images are read or fail, each with one line."""
  path, _ = write(tmp_path, kind, scenes)
  done = subprocess.run([sys.executable, "-c", FLIPS, path], capture_output=True, text=True)
  assert (done.returncode, done.stdout) == (0, "read refused\n"), done.stderr
