"""Jobs with broken images, full disks and killed processes: nothing is lost or done twice."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import batch_runs
import batches
import pytest
from batches import MODEL, QUIET, broken, files, job, write_images

from sam3_jax.batch import job as jobs
from sam3_jax.batch import job_files, pipeline
from sam3_jax.batch.files import Draft
from sam3_jax.batch.merge import ANNOTATIONS, merge
from sam3_jax.batch.part_writer import PartWriter
from sam3_jax.batch.run import run

stub = batch_runs.stub
images = batch_runs.images
undisturbed = batch_runs.undisturbed


pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def test_too_many_failures_stop_the_job(tmp_path, monkeypatch):
  """The first 20 of 60 images are broken. Finished parts stay; a higher rate resumes the job."""
  folder = write_images(tmp_path / "images", 40)
  for i in range(20):
    (folder / f"+{i:02}.png").write_bytes(b"")
  monkeypatch.setattr(jobs, "MIN_SAMPLE", 10)
  out = tmp_path / "out"
  with pytest.raises(jobs.TooManyFailuresError, match=r"of \d+ images failed.*--max-error-rate"):
    run(job(folder, out, max_error_rate=0.2), MODEL, QUIET, QUIET)
  listed = (out / "errors.jsonl").read_text().splitlines()
  assert len(job_files.finished_parts(out)) < 4
  assert len(listed) < 20
  with pytest.raises(ValueError, match=r"parts in .* are not done yet, the first is"):
    merge(out)
  assert run(job(folder, out, max_error_rate=1.0), MODEL, QUIET, QUIET)
  assert len((out / "errors.jsonl").read_text().splitlines()) == 20
  assert merge(out) | {"annotations": 0} == {
    "images": 40, "annotations": 0, "failed": 20, "categories": 2
  }  # fmt: skip


@pytest.mark.slow
def test_thirty_broken_images_among_a_thousand(tmp_path):
  """Of ten kinds, one of which is a box outside its image: 3 %, which the default rate allows."""
  folder, faults = write_images(tmp_path / "images", 970), list(broken().items())
  lines = [{"image": f"images/{i:03}.png", "prompts": ["cat"]} for i in range(970)]
  for i in range(30):
    name, data = faults[i % 10] if i % 10 < 9 else ("box.png", (folder / "000.png").read_bytes())
    (folder / f"{i}-{name}").write_bytes(data)
    boxes = [[900, 900, 950, 950]] if name == "box.png" else [[0, 0, 2, 2]]
    lines.insert(33 * i, {"image": f"images/{i}-{name}", "prompts": [{"boxes": boxes}]})
  path, out = tmp_path / "list.jsonl", tmp_path / "out"
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  settings = {"max_error_rate": 0.05, "max_pixels": 10**6, "part_size": 128}
  assert run(job(path, out, None, **settings), MODEL, QUIET, QUIET)
  assert merge(out)["images"] == 970
  failed = [json.loads(line) for line in (out / "errors.jsonl").read_text().splitlines()]
  assert [one["input"] for one in failed] == [33 * i for i in range(30)]
  assert [one["image"] for one in failed] == [lines[33 * i]["image"] for i in range(30)]
  assert all(one["reason"] for one in failed)


class TestFullDisk:
  @pytest.mark.parametrize("name", ["part-000002.jsonl", "part-000002.json", "job.json"])
  def test_is_reported_in_one_line_and_the_job_is_resumed(
    self, images, undisturbed, tmp_path, monkeypatch, name
  ):
    write = Draft.write

    def fail(self, data):
      if self.path.name == name:
        with self.naming():
          raise OSError(28, "No space left on device")
      write(self, data)

    def refuse(path, data):
      raise OSError(28, "No space left on device")

    monkeypatch.setattr(Draft, "write", fail)
    if name == "job.json":
      monkeypatch.setattr("sam3_jax.batch.files.create_exclusively", refuse)
    with pytest.raises(
      OSError, match=rf"cannot write .*{name}: No space left on device; "
    ) as caught:
      run(job(images, tmp_path), MODEL, QUIET, QUIET)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*.partial"))
    monkeypatch.undo()
    monkeypatch.setattr(pipeline, "Engine", batches.Engine)
    assert run(job(images, tmp_path), MODEL, QUIET, QUIET)
    merge(tmp_path)
    assert files(tmp_path) == undisturbed

  def test_part_of_a_batch_is_not_kept(self, images, undisturbed, tmp_path, monkeypatch):
    """The disk is full for the fourth record, but not for the files after it."""
    write, count = PartWriter._write, iter(range(1000))

    def fail(self, *record):
      if next(count) == 3:
        raise OSError(28, "No space left on device")
      write(self, *record)

    monkeypatch.setattr(PartWriter, "_write", fail)
    with pytest.raises(OSError, match="No space left"):
      run(job(images, tmp_path), MODEL, QUIET, QUIET)
    assert run(job(images, tmp_path), MODEL, QUIET, QUIET)
    merge(tmp_path)
    assert files(tmp_path) == undisturbed


def _start(images: Path, out: Path, pause: float) -> subprocess.Popen:
  command = [sys.executable, batches.__file__, images, out, json.dumps({}), str(pause)]
  return subprocess.Popen(
    [str(one) for one in command], stdout=subprocess.PIPE, env=os.environ | {"JAX_PLATFORMS": "cpu"}
  )


@pytest.mark.slow
def test_killed_and_resumed(images, undisturbed, tmp_path):
  """By SIGKILL at random moments, three times here, thirty in `benchmarks/batch_faults.py`."""
  rng = random.Random(1)
  for _ in range(3):
    process = _start(images, tmp_path, 0.05)
    process.stdout.readline()
    time.sleep(rng.uniform(0.1, 0.6))
    process.send_signal(signal.SIGKILL)
    process.communicate()
  assert run(job(images, tmp_path), MODEL, QUIET, QUIET)
  merge(tmp_path)
  assert files(tmp_path) == undisturbed


def test_resumes_from_files_of_processes_killed_between_renames(images, undisturbed, tmp_path):
  run(job(images, tmp_path), MODEL, QUIET, QUIET)
  folder = tmp_path / "parts"
  (folder / "part-000001.json").unlink()  # records without a manifest
  (folder / "part-000003.json").rename(folder / ".part-000003.json.host.123.partial")
  (folder / "part-000003.jsonl").rename(folder / ".part-000003.jsonl.host.123.partial")
  shutil.copy(
    folder / "part-000002.jsonl", folder / "part-000002.begun.jsonl"
  )  # of a finished part
  (folder / "part-000005.json").unlink()
  (folder / "part-000005.jsonl").unlink()
  # An unfinished part with new records and the old manifest.
  (folder / "part-000005.begun.jsonl").write_bytes(b"{}\n")
  (folder / "part-000005.begun.json").write_text('{"inputs": 1, "sha256": "0", "failed": []}')
  for name in ("annotations.json", "errors.jsonl", "job.json", "inputs-0123.jsonl"):
    draft = tmp_path / f".{name}.01234567-1-1-01234567.partial"
    draft.write_bytes(b"half")
    os.utime(draft, (1, 1))
  draft = tmp_path / "leases" / ".part-000002.lease.01234567-1-1-01234567.partial"
  draft.touch()
  os.utime(draft, (1, 1))
  (tmp_path / "leases" / "part-000002.lease").write_bytes(b"{}\n")
  (tmp_path / "leases" / "part-000002.journal").write_bytes(b"+11\n")
  os.utime(tmp_path / "leases" / "part-000002.lease", (1, 1))
  assert run(job(images, tmp_path), MODEL, QUIET, QUIET)
  merge(tmp_path)
  assert files(tmp_path) == undisturbed


def test_damaged_part_is_refused(images, tmp_path):
  run(job(images, tmp_path), MODEL, QUIET, QUIET)
  path = tmp_path / "parts" / "part-000002.jsonl"
  original = path.read_bytes()
  for data in (original[:-30], original.replace(b"score", b"scare", 1), b""):
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"part-000002.jsonl is damaged; remove .*000002.json and"):
      merge(tmp_path)
  assert not (tmp_path / ANNOTATIONS).exists()
  path.unlink()
  with pytest.raises(ValueError, match="is damaged"):
    merge(tmp_path)
  path.with_suffix(".json").unlink()
  assert run(job(images, tmp_path), MODEL, QUIET, QUIET)
  assert path.read_bytes() == original
  assert merge(tmp_path)["images"] == 23


def test_boxes_outside_the_image_fail_the_input(images, tmp_path):
  lines = [
    {"image": str(images / "000.png"), "prompts": [{"boxes": [[900, 900, 950, 950]]}]},
    {"image": str(images / "001.png"), "prompts": ["cat"]},
    {"image": str(images / "none.png"), "prompts": ["cat"]},
  ]
  path = tmp_path / "list.jsonl"
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  assert run(job(path, tmp_path / "out", None, skip_unreadable=True), MODEL, QUIET, QUIET)
  failed = [json.loads(line) for line in (tmp_path / "out/errors.jsonl").read_text().splitlines()]
  assert [one["input"] for one in failed] == [0, 2]
  assert "completely outside" in failed[0]["reason"]
  assert "there is no image" in failed[1]["reason"]
