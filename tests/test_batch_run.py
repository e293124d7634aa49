"""Jobs with an engine without a model: no input is lost or done twice, whatever fails."""

import functools
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import batches
import pytest
from batches import MODEL, QUIET, broken, files, job, write_images
from rich.console import Console

from sam3_jax.batch import job as jobs
from sam3_jax.batch import job_files, part_files, pipeline
from sam3_jax.batch.files import Draft
from sam3_jax.batch.merge import ANNOTATIONS, merge
from sam3_jax.batch.part_writer import PartWriter
from sam3_jax.batch.run import run
from sam3_jax.inference.predictor import Sam3
from sam3_jax.utils.lease import Lease

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(autouse=True)
def stub(monkeypatch):
  monkeypatch.setattr(pipeline, "Engine", batches.Engine)
  monkeypatch.setattr(pipeline, "BACKOFF", (0.0, 0.0, 0.0))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
  """A directory with 23 good images and three broken ones."""
  folder = write_images(tmp_path_factory.mktemp("images"), 23)
  (folder / "004-empty.png").write_bytes(b"")
  (folder / "011-text.jpg").write_text("no image")
  (folder / "022-cut.png").write_bytes((folder / "022.png").read_bytes()[:60])
  return folder


@pytest.fixture(scope="module")
def undisturbed(images, tmp_path_factory):
  """All files of a merged job that one process did without interruption."""
  out = tmp_path_factory.mktemp("undisturbed")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(pipeline, "Engine", batches.Engine)
    assert run(job(images, out), MODEL, QUIET, QUIET)
  merge(out)
  return files(out)


def test_every_input_is_done_once(images, undisturbed):
  records = [
    json.loads(line)
    for name, data in undisturbed.items()
    if name.endswith("jsonl") and name.startswith("parts")
    for line in data.splitlines()
  ]
  failed = [json.loads(line) for line in undisturbed["errors.jsonl"].splitlines()]
  names = sorted(path.name for path in images.iterdir())
  assert sorted(one["image"] for one in records + failed) == names
  assert [names[one["input"]] for one in records] == [one["image"] for one in records]
  assert [one["image"] for one in failed] == ["004-empty.png", "011-text.jpg", "022-cut.png"]
  assert all(one["reason"] and "\n" not in one["reason"] for one in failed)
  assert "is empty (0 bytes)" in failed[0]["reason"]


def test_manifests_count_the_inputs_of_their_parts(undisturbed):
  manifests = [json.loads(undisturbed[f"parts/part-{part:06}.json"]) for part in range(6)]
  assert [one["first"] for one in manifests] == [0, 5, 10, 15, 20, 25]
  assert [one["inputs"] for one in manifests] == [5, 5, 5, 5, 5, 1]
  assert sum(one["done"] for one in manifests) == 23
  assert sum(len(one["failed"]) for one in manifests) == 3
  for part, one in enumerate(manifests):
    data = undisturbed[f"parts/part-{part:06}.jsonl"]
    assert one["bytes"] == len(data)
    assert one["done"] == data.count(b"\n")


@pytest.mark.parametrize("processes", [2, 4])
def test_any_number_and_order_of_processes(images, undisturbed, tmp_path, processes):
  order = list(range(processes))
  random.Random(processes).shuffle(order)
  for process in order:
    assert run(job(images, tmp_path, process=process, processes=processes), MODEL, QUIET, QUIET)
  merge(tmp_path)
  assert files(tmp_path) == undisturbed


def test_reading_in_worker_processes(images, undisturbed, tmp_path):
  assert run(job(images, tmp_path, workers=1), MODEL, QUIET, QUIET)
  merge(tmp_path)
  assert files(tmp_path) == undisturbed


def test_stopped_and_resumed_with_other_numbers_of_processes(images, undisturbed, tmp_path):
  """Stopped after each batch, in the middle of a part; resumed by one or two processes in turn."""
  for turn in range(40):
    processes = 1 + turn % 2
    complete = []
    for process in range(processes):
      started, stop = batches.Engine.started, lambda: batches.Engine.started > started  # noqa: B023
      part_of_job = job(images, tmp_path, process=process, processes=processes)
      complete.append(run(part_of_job, MODEL, QUIET, QUIET, stop))
    if turn == 1:
      assert list((tmp_path / "parts").glob("*.begun.jsonl"))
    if all(complete):
      break
  assert turn > 5
  merge(tmp_path)
  assert files(tmp_path) == undisturbed


def test_second_run_does_nothing(images, undisturbed, tmp_path, monkeypatch):
  assert run(job(images, tmp_path), MODEL, QUIET, QUIET)
  merge(tmp_path)
  monkeypatch.setattr(batches.Engine, "start", None)
  assert run(job(images, tmp_path), MODEL, QUIET, QUIET)
  assert files(tmp_path) == undisturbed


def test_other_jobs_are_refused(images, tmp_path):
  run(job(images, tmp_path), MODEL, QUIET, QUIET)
  before = files(tmp_path)
  for other, message in (
    (job(images, tmp_path, "cat"), r"prompts changed of 26 images \(000.png, .* and 23 more\)"),
    (job(images, tmp_path, part_size=6), "--part-size: 5 then, 6 now"),
    (job(images, tmp_path, threshold=0.4), "--threshold: 0.5 then, 0.4 now"),
  ):
    with pytest.raises(ValueError, match=message) as caught:
      run(other, MODEL, QUIET, QUIET)
    assert "\n" not in str(caught.value)
  assert files(tmp_path) == before


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


def test_part_leased_by_another_process_is_left_alone(images, undisturbed, tmp_path):
  """Until that process has ended."""
  draft = tmp_path / "parts" / ".part-000002.jsonl.host.1.partial"
  draft.parent.mkdir()
  draft.write_bytes(b"some")
  console = Console(file=io.StringIO())
  with Lease(part_files.lease_path(tmp_path, 2)):
    assert not run(job(images, tmp_path), MODEL, QUIET, console)
    assert job_files.finished_parts(tmp_path) == {0, 1, 3, 4, 5}
    assert draft.exists()
  assert "1 part is being processed by another process; rerun" in console.file.getvalue()
  assert run(job(images, tmp_path), MODEL, QUIET, QUIET)
  merge(tmp_path)
  assert files(tmp_path) == undisturbed


@pytest.mark.slow
def test_same_process_started_three_times_divides_the_work(
  images, undisturbed, tmp_path, monkeypatch
):
  monkeypatch.setattr(batches.Engine, "pause", 0.02)
  before, results = batches.Engine.started, []

  def work():
    results.append(run(job(images, tmp_path), MODEL, QUIET, QUIET))

  threads = [threading.Thread(target=work) for _ in range(3)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert batches.Engine.started - before == 16  # five parts of three batches, and one of one
  assert any(results)
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


def test_merge_without_a_job(tmp_path):
  with pytest.raises(FileNotFoundError, match="there are no results in"):
    merge(tmp_path)


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


class TestVisualPrompts:
  @pytest.fixture
  def listed(self, images, tmp_path):
    """A list of three images with phrases and visual prompts, one of which is outside its image."""
    click, box = {"points": [[2, 2]]}, {"box": [1, 1, 4, 4], "visual": True}
    prompts = [["cat", click, box], [click, {"points": [[900, 2]]}], [{"boxes": [[1, 1, 4, 4]]}]]
    lines = [{"image": f"{images}/{i:03}.png", "prompts": own} for i, own in enumerate(prompts)]
    path = tmp_path / "list.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path

  def test_together_with_concept_prompts(self, listed, tmp_path):
    results = []
    for processes in (1, 2):
      out = tmp_path / str(processes)
      for process in range(processes)[::-1]:
        settings = {"process": process, "processes": processes, "part_size": 1}
        assert run(job(listed, out, None, **settings), MODEL, QUIET, QUIET)
      counts = merge(out)
      results.append(files(out))
    assert results[0] == results[1]
    assert (counts["images"], counts["failed"], counts["categories"]) == (2, 1, 2)
    [failed] = [json.loads(line) for line in results[0]["errors.jsonl"].splitlines()]
    assert failed["input"] == 1
    assert failed["reason"].startswith("point [900, 2] is outside the ")
    record = json.loads(results[0]["parts/part-000000.jsonl"])
    assert [one.get("points") for one in record["prompts"]] == [None, [[2, 2]], []]
    merged = json.loads(results[0][ANNOTATIONS])
    assert [one["name"] for one in merged["categories"]] == ["cat", "visual"]

  def test_checkpoint_without_a_head_is_refused(self, listed, tmp_path):
    without = functools.partial(Sam3.visual_params, types.SimpleNamespace(params={}))
    model = types.SimpleNamespace(**vars(MODEL) | {"visual_params": without})
    with pytest.raises(ValueError, match="this checkpoint has no head for visual prompts") as e:
      run(job(listed, tmp_path / "out", None), model, QUIET, QUIET)
    assert "\n" not in str(e.value)
    assert not (tmp_path / "out").exists()


def test_single_image(images, tmp_path):
  assert run(job(images / "000.png", tmp_path, "cat"), MODEL, QUIET, QUIET)
  assert merge(tmp_path)["images"] == 1
