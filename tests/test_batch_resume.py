"""Rerunning a job: changes are reported, failures are retried, results are never mixed."""

import contextlib
import io
import json
import os
import shutil

import batch_mutations
import batches
import pytest
from batches import MODEL, QUIET, files, job, write_images
from rich.console import Console

from sam3_jax.batch import frozen_inputs, image_bytes, job_files, part_files, pipeline
from sam3_jax.batch import job as jobs
from sam3_jax.batch.leased_part import LeasedPart
from sam3_jax.batch.merge import merge
from sam3_jax.batch.run import run as run_job

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(autouse=True)
def stub(monkeypatch):
  monkeypatch.setattr(pipeline, "Engine", batches.Engine)
  monkeypatch.setattr(pipeline, "BACKOFF", (0.0, 0.0))


@pytest.fixture
def images(tmp_path):
  return write_images(tmp_path / "images", 12)


@pytest.fixture
def out(tmp_path):
  return tmp_path / "out"


def run(*given, **settings) -> bool:
  return run_job(job(*given, **settings), MODEL, QUIET, QUIET)


def listed(folder, *names) -> object:
  path = folder / "list.jsonl"
  path.write_text("".join(json.dumps({"image": str(name)}) + "\n" for name in names))
  return path


def results(out) -> dict[str, bytes]:
  """The files of a job except its description and lists."""
  return {
    name: data for name, data in files(out).items() if not name.startswith(("job.", "inputs-"))
  }


def test_random_changes_of_the_inputs():
  """Twelve here, two hundred in `benchmarks/batch_mutations.py`."""
  assert batch_mutations.campaign(12, 5000) == []


def test_other_images_with_the_same_names_are_refused(images, out, tmp_path):
  other = write_images(tmp_path / "other", 12)
  (other / "003.png").write_bytes((images / "004.png").read_bytes())
  assert run(images, out)
  with pytest.raises(ValueError, match=r"another job \(1 file modified \(003.png\)"):
    run(other, out)


def test_same_images_in_another_directory_are_accepted(images, out, tmp_path):
  assert run(images, out)
  before = results(out)
  shutil.copytree(images, tmp_path / "moved")  # keeps the times
  assert run(tmp_path / "moved", out)
  for path in images.iterdir():
    os.utime(path, (1, 1))
  assert run(images, out)  # the content is the same
  assert results(out) == before


def test_other_weights_are_refused(images, out, monkeypatch):
  assert run(images, out)
  monkeypatch.setattr(MODEL, "info", {"name": "converted again"})
  assert run(images, out)
  monkeypatch.setattr(MODEL, "identity", "1")
  with pytest.raises(ValueError, match="the checkpoint: 0 then, 1 now"):
    run(images, out)


class TestAdd:
  def test_needs_the_option(self, images, out):
    assert run(images, out)
    shutil.copy(images / "001.png", images / "000a.png")
    with pytest.raises(ValueError, match=r"1 file added \(000a.png\)\); add --add to extend"):
      run(images, out)

  def test_extends_the_job(self, images, out):
    assert run(images, out)
    first = results(out)
    for number, name in enumerate(("000a.png", "zzz.png"), start=2):
      shutil.copy(images / "001.png", images / name)
      for process in (0, 1):
        assert run(images, out, add=True, process=process, processes=2)
      assert (out / f"job.{number}.json").exists()
      assert run(images, out)
    now = results(out)
    del first["errors.jsonl"], now["errors.jsonl"]
    assert first.items() <= now.items()
    assert job_files.part_range(3, job_files.read_job(out)) == range(12, 13)
    merge(out)
    merged = json.loads((out / "annotations.json").read_text())["images"]
    assert [one["file_name"] for one in merged][-2:] == ["000a.png", "zzz.png"]
    assert [one["id"] for one in merged] == list(range(1, 15))

  def test_still_refuses_changes(self, images, out):
    assert run(images, out)
    shutil.copy(images / "001.png", images / "new.png")
    shutil.copy(images / "001.png", images / "002.png")
    with pytest.raises(ValueError, match=r"1 file modified \(002.png\)"):
      run(images, out, add=True)
    assert not (out / "job.2.json").exists()


class TestTwoJobs:
  def test_parts_of_another_job_are_refused(self, images, out, tmp_path):
    other = tmp_path / "another"
    assert run(images, out)
    assert run(images, other, "bird")
    for ending in ("json", "jsonl"):
      name = f"parts/part-000001.{ending}"
      shutil.copy(other / name, out / name)
    for function in (lambda: run(images, out), lambda: merge(out)):
      with pytest.raises(ValueError, match=r"part 1 in .* is of another job than"):
        function()

  def test_two_processes_that_create_different_jobs(self, images, out, monkeypatch):
    """Both find no job; the slower one must compare itself with the job of the other."""
    create = frozen_inputs.create_json

    def late(*arguments):
      monkeypatch.setattr(frozen_inputs, "create_json", create)
      assert run(images, out, "bird")
      return create(*arguments)

    monkeypatch.setattr(frozen_inputs, "create_json", late)
    with pytest.raises(ValueError, match=r"prompts changed of .* images"):
      run(images, out)


class TestUnreadable:
  def test_unreadable_images_are_done_by_a_later_run(self, images, out, tmp_path):
    names = sorted(images.iterdir())
    path = listed(tmp_path, *names, "late.png")
    console = Console(file=io.StringIO(), width=200)
    shutil.move(names[3], tmp_path / "away")
    assert not run_job(job(path, out), MODEL, QUIET, console)
    message = console.file.getvalue()
    assert "2 images could not be read (there is no image" in message
    assert "late.png" in message
    assert "rerun the same command to retry" in message
    assert (out / "errors.jsonl").read_text() == ""
    with pytest.raises(ValueError, match="are not done yet"):
      merge(out)
    shutil.move(tmp_path / "away", names[3])
    shutil.copy(names[0], tmp_path / "late.png")
    assert run(path, out)
    assert run(path, tmp_path / "undisturbed")
    for name, data in results(tmp_path / "undisturbed").items():
      assert name.endswith(".json") or (out / name).read_bytes() == data

  def test_read_that_fails_once_is_retried(self, images, out, tmp_path, monkeypatch):
    assert run(images, tmp_path / "undisturbed")
    opened, failed = os.open, set()

    class Failing:
      def __getattr__(self, name):
        return getattr(os, name)

      def open(self, path, *arguments):
        if path not in failed and path.endswith(("1.png", "7.png")):
          failed.add(path)
          raise OSError(5, "Input/output error")
        return opened(path, *arguments)

    monkeypatch.setattr(image_bytes, "os", Failing())
    assert run(images, out)
    assert len(failed) == 3
    assert files(out) == files(tmp_path / "undisturbed")

  def test_image_changed_after_listing(self, images, out):
    changing = job(images, out)
    (images / "005.png").write_bytes((images / "006.png").read_bytes())
    console = Console(file=io.StringIO(), width=200)
    assert not run_job(changing, MODEL, QUIET, console)
    assert "005.png has changed since it was listed" in console.file.getvalue()
    with pytest.raises(ValueError, match=r"1 file modified \(005.png\)"):
      run(images, out)

  def test_unavailable_storage_stops_the_job(self, images, out, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "MIN_SAMPLE", 10)
    path = listed(tmp_path, *[f"away/{i}.png" for i in range(40)])
    with pytest.raises(jobs.StorageError, match=r"of \d+ images cannot be read, more than .*away/"):
      run(path, out, max_error_rate=0.2)
    assert not list((out / "leases").iterdir())

  def test_skip_unreadable(self, images, out, tmp_path):
    path = listed(tmp_path, images / "000.png", "none.png")
    assert run(path, out, skip_unreadable=True)
    assert json.loads((out / "errors.jsonl").read_text())["image"] == "none.png"
    shutil.copy(images / "001.png", tmp_path / "none.png")
    with pytest.raises(
      ValueError, match=r"1 image that failed \(none.png\) changed since; add --re"
    ):
      run(path, out)
    assert run(path, out, retry_failed=True)
    assert merge(out)["images"] == 2


class TestRetryFailed:
  def test_equals_an_undisturbed_job(self, images, out, tmp_path):
    original = {name: (images / name).read_bytes() for name in ("002.png", "007.png")}
    assert run(images, tmp_path / "undisturbed")
    times = {name: (images / name).stat().st_mtime_ns for name in original}
    for name in original:
      (images / name).write_bytes(b"broken")
    assert run(images, out)
    failed = (out / "errors.jsonl").read_bytes()
    assert run(images, out, retry_failed=True)
    assert (out / "errors.jsonl").read_bytes() == failed
    before = batches.Engine.started
    for name, data in original.items():
      (images / name).write_bytes(data)
      os.utime(images / name, ns=(times[name], times[name]))
    with pytest.raises(ValueError, match=r"2 images that failed \(002.png, 007.png\) changed"):
      run(images, out)
    assert run(images, out, retry_failed=True)
    assert batches.Engine.started - before == 2
    for name, data in results(tmp_path / "undisturbed").items():
      if name.endswith(".jsonl"):
        assert (out / name).read_bytes() == data

  @pytest.mark.parametrize("step", range(5))
  def test_killed_while_a_part_is_reopened(self, images, out, monkeypatch, step):
    (images / "002.png").write_bytes(b"broken")
    assert run(images, out)
    before, count = files(out), iter(range(100))

    def die(function):
      def call(*arguments, **settings):
        if next(count) == step:
          raise KeyboardInterrupt
        return function(*arguments, **settings)

      return call

    with monkeypatch.context() as patch:
      for holder, name in (
        (part_files, "write_json"),
        (part_files, "sync_directory"),
        (type(out), "unlink"),
        (part_files.Draft, "commit"),
      ):
        patch.setattr(holder, name, die(getattr(holder, name)))
      with contextlib.suppress(KeyboardInterrupt):
        part_files.reopen_part(out, 0)
    assert run(images, out)
    assert files(out) == before

  @pytest.mark.parametrize("retry_again", [False, True])
  @pytest.mark.parametrize("paused", [False, True])
  def test_interrupted_retry(self, images, out, paused, retry_again):
    """Failed images may have changed, even if they are still pending."""
    for name in ("001.png", "003.png"):
      (images / name).write_bytes(b"broken")
    assert run(images, out)
    for name in ("001.png", "003.png"):
      (images / name).write_bytes((images / "004.png").read_bytes())
    if paused:
      began = batches.Engine.started
      stopping = lambda: batches.Engine.started > began  # noqa: E731
      assert not run_job(job(images, out, retry_failed=True), MODEL, QUIET, QUIET, stopping)
    else:
      part_files.reopen_part(out, 0)
    assert run(images, out, retry_failed=retry_again)
    assert (out / "errors.jsonl").read_text() == ""
    (images / "005.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"1 file modified \(005.png\)"):
      run(images, out, retry_failed=True)


def test_earlier_failures_count(images, out, tmp_path):
  """A job with too many failures stops at every run, until the allowed rate is higher."""
  for i in range(5):
    (images / f"00{i}.png").write_bytes(b"broken")
  for _ in range(2):
    with pytest.raises(jobs.TooManyFailuresError, match="5 of 12 images failed"):
      run(images, out, max_error_rate=0.2)
  assert run(images, out, max_error_rate=0.5)


def test_errors_are_collected_while_other_processes_finish_parts(out, monkeypatch):
  """From one listing of the parts."""
  read, others = job_files.read_json, iter(range(100, 200))

  def put(part):
    part_files.write_json(
      part_files.manifest_path(out, part), {"part": part, "failed": [], "sha256": ""}
    )

  def slow(path):
    put(next(others))
    return read(path)

  for part in range(10):
    put(part)
  monkeypatch.setattr(job_files, "read_json", slow)
  assert job_files.write_errors(out) == 0
  assert len(job_files.finished_parts(out)) == 20


def test_failures_of_another_process_count(images, out):
  """It does the parts after this process has listed them."""
  for i in range(5):
    (images / f"00{i}.png").write_bytes(b"broken")
  late = job(images, out, max_error_rate=0.2)
  with pytest.raises(jobs.TooManyFailuresError, match="5 of 12"):
    run_job(late, MODEL, QUIET, QUIET, at_deadline=lambda _: run(images, out))


def test_part_whose_lease_was_taken_over_is_discarded(images, out):
  """The process was suspended until its lease was stale, and then stopped."""
  begun = job(images, out)
  description, _ = frozen_inputs.open_job(out, begun.settings(MODEL), begun.inputs)
  part = LeasedPart(begun, 0, description)
  assert part.acquire()
  part.add([b'{"input": 0}\n'], [], [0], {})
  lease = part_files.lease_path(out, 0)
  lease.write_text(json.dumps(json.loads(lease.read_text()) | {"token": "another"}))
  for path in (out / "parts").glob(".*"):
    path.unlink()  # as the process that takes over does
  part.close()
  assert part.leased_elsewhere
  assert lease.exists()
  assert not list((out / "parts").iterdir())
