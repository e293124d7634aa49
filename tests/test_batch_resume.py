"""Running a job again: what changed is told, what failed is tried again, nothing is mixed."""

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

from sam3_jax.batch import fetch, freeze, part_files, parts, pipeline
from sam3_jax.batch import job as jobs
from sam3_jax.batch import run as runs
from sam3_jax.batch.merge import merge
from sam3_jax.batch.share import Share

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
  return runs.run(job(*given, **settings), MODEL, QUIET, QUIET)


def listed(folder, *names) -> object:
  path = folder / "list.jsonl"
  path.write_text("".join(json.dumps({"image": str(name)}) + "\n" for name in names))
  return path


def results(out) -> dict[str, bytes]:
  """What was found, without the description of the job."""
  return {n: data for n, data in files(out).items() if not n.startswith(("job.", "inputs-"))}


def test_random_changes():
  """Twelve here, two hundred in `benchmarks/batch_mutations.py`."""
  assert batch_mutations.campaign(12, 5000) == []


def test_another_folder_with_the_same_names(images, out, tmp_path):
  other = write_images(tmp_path / "other", 12)
  (other / "003.png").write_bytes((images / "004.png").read_bytes())
  assert run(images, out)
  with pytest.raises(ValueError, match=r"another job \(1 file modified \(003.png\)"):
    run(other, out)


def test_the_same_images_elsewhere(images, out, tmp_path):
  assert run(images, out)
  before = results(out)
  shutil.copytree(images, tmp_path / "moved")  # keeps the times
  assert run(tmp_path / "moved", out)
  for path in images.iterdir():
    os.utime(path, (1, 1))
  assert run(images, out)  # the content is the same
  assert results(out) == before


def test_other_weights(images, out, monkeypatch):
  assert run(images, out)
  monkeypatch.setattr(MODEL, "info", {"name": "converted again"})
  assert run(images, out)
  monkeypatch.setattr(MODEL, "identity", "1")
  with pytest.raises(ValueError, match="the checkpoint: 0 then, 1 now"):
    run(images, out)


class TestAdd:
  def test_is_asked_for(self, images, out):
    assert run(images, out)
    shutil.copy(images / "001.png", images / "000a.png")
    with pytest.raises(ValueError, match=r"1 file added \(000a.png\)\); add --add to extend"):
      run(images, out)

  def test_extends_the_job(self, images, out):
    assert run(images, out)
    first = results(out)
    for turn, name in enumerate(("000a.png", "zzz.png"), start=2):
      shutil.copy(images / "001.png", images / name)
      for process in (0, 1):
        assert run(images, out, add=True, process=process, processes=2)
      assert (out / f"job.{turn}.json").exists()
      assert run(images, out)
    now = results(out)
    del first["errors.jsonl"], now["errors.jsonl"]
    assert first.items() <= now.items()
    assert parts.bounds(3, parts.read_job(out)) == range(12, 13)
    merge(out)
    merged = json.loads((out / "annotations.json").read_text())["images"]
    assert [one["file_name"] for one in merged][-2:] == ["000a.png", "zzz.png"]
    assert [one["id"] for one in merged] == list(range(1, 15))

  def test_does_not_hide_a_change(self, images, out):
    assert run(images, out)
    shutil.copy(images / "001.png", images / "new.png")
    shutil.copy(images / "001.png", images / "002.png")
    with pytest.raises(ValueError, match=r"1 file modified \(002.png\)"):
      run(images, out, add=True)
    assert not (out / "job.2.json").exists()


class TestTwoJobs:
  def test_parts_of_another_job(self, images, out, tmp_path):
    other = tmp_path / "another"
    assert run(images, out)
    assert run(images, other, "bird")
    for ending in ("json", "jsonl"):
      name = f"parts/part-000001.{ending}"
      shutil.copy(other / name, out / name)
    for what in (lambda: run(images, out), lambda: merge(out)):
      with pytest.raises(ValueError, match=r"part 1 in .* is of another job than"):
        what()

  def test_the_loser_of_a_race_compares(self, images, out, monkeypatch):
    """Both see no job; the other one is quicker."""
    create = freeze.create_json

    def late(*arguments):
      monkeypatch.setattr(freeze, "create_json", create)
      assert run(images, out, "bird")
      return create(*arguments)

    monkeypatch.setattr(freeze, "create_json", late)
    with pytest.raises(ValueError, match=r"prompts changed of .* images"):
      run(images, out)


class TestUnreadable:
  def test_is_left_open_and_done_later(self, images, out, tmp_path):
    names = sorted(images.iterdir())
    path = listed(tmp_path, *names, "late.png")
    console = Console(file=io.StringIO(), width=200)
    shutil.move(names[3], tmp_path / "away")
    assert not runs.run(job(path, out), MODEL, QUIET, console)
    said = console.file.getvalue()
    assert "2 images could not be read (there is no image" in said
    assert "late.png" in said
    assert "rerun the same command to retry" in said
    assert (out / "errors.jsonl").read_text() == ""
    with pytest.raises(ValueError, match="are not done yet"):
      merge(out)
    shutil.move(tmp_path / "away", names[3])
    shutil.copy(names[0], tmp_path / "late.png")
    assert run(path, out)
    assert run(path, tmp_path / "undisturbed")
    for name, data in results(tmp_path / "undisturbed").items():
      assert name.endswith(".json") or (out / name).read_bytes() == data

  def test_a_read_that_fails_for_a_moment(self, images, out, tmp_path, monkeypatch):
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

    monkeypatch.setattr(fetch, "os", Failing())
    assert run(images, out)
    assert len(failed) == 3
    assert files(out) == files(tmp_path / "undisturbed")

  def test_changed_since_it_was_listed(self, images, out):
    changing = job(images, out)
    (images / "005.png").write_bytes((images / "006.png").read_bytes())
    console = Console(file=io.StringIO(), width=200)
    assert not runs.run(changing, MODEL, QUIET, console)
    assert "005.png has changed since it was listed" in console.file.getvalue()
    with pytest.raises(ValueError, match=r"1 file modified \(005.png\)"):
      run(images, out)

  def test_the_mount_is_away(self, images, out, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "SEEN", 10)
    path = listed(tmp_path, *[f"away/{i}.png" for i in range(40)])
    with pytest.raises(jobs.StorageError, match=r"of \d+ images cannot be read, more than .*away/"):
      run(path, out, max_error_rate=0.2)
    assert not list((out / "leases").iterdir())

  def test_skipped(self, images, out, tmp_path):
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
  def test_gives_what_an_undisturbed_job_does(self, images, out, tmp_path):
    whole = {name: (images / name).read_bytes() for name in ("002.png", "007.png")}
    assert run(images, tmp_path / "undisturbed")
    times = {name: (images / name).stat().st_mtime_ns for name in whole}
    for name in whole:
      (images / name).write_bytes(b"broken")
    assert run(images, out)
    failed = (out / "errors.jsonl").read_bytes()
    assert run(images, out, retry_failed=True)
    assert (out / "errors.jsonl").read_bytes() == failed
    before = batches.Engine.started
    for name, data in whole.items():
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
  def test_killed_while_a_part_is_opened_again(self, images, out, monkeypatch, step):
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
        part_files.reopen(out, 0)
    assert run(images, out)
    assert files(out) == before

  @pytest.mark.parametrize("again", [False, True])
  @pytest.mark.parametrize("paused", [False, True])
  def test_not_come_to_its_end(self, images, out, paused, again):
    """Images that failed may have changed, also where they are not done yet."""
    for name in ("001.png", "003.png"):
      (images / name).write_bytes(b"broken")
    assert run(images, out)
    for name in ("001.png", "003.png"):
      (images / name).write_bytes((images / "004.png").read_bytes())
    if paused:
      began = batches.Engine.started
      stopping = lambda: batches.Engine.started > began  # noqa: E731
      assert not runs.run(job(images, out, retry_failed=True), MODEL, QUIET, QUIET, stopping)
    else:
      part_files.reopen(out, 0)
    assert run(images, out, retry_failed=again)
    assert (out / "errors.jsonl").read_text() == ""
    (images / "005.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"1 file modified \(005.png\)"):
      run(images, out, retry_failed=True)


def test_the_status_is_that_of_the_directory(images, out, tmp_path):
  """A job with too many failures says so each time, until the rate is higher."""
  for i in range(5):
    (images / f"00{i}.png").write_bytes(b"broken")
  for _ in range(2):
    with pytest.raises(jobs.TooManyFailuresError, match="5 of 12 images failed"):
      run(images, out, max_error_rate=0.2)
  assert run(images, out, max_error_rate=0.5)


def test_errors_are_written_from_one_listing(out, monkeypatch):
  """However many parts other processes end meanwhile."""
  read, others = parts.read_json, iter(range(100, 200))

  def put(part):
    part_files.write_json(
      part_files.manifest_path(out, part), {"part": part, "failed": [], "sha256": ""}
    )

  def slow(path):
    put(next(others))
    return read(path)

  for part in range(10):
    put(part)
  monkeypatch.setattr(parts, "read_json", slow)
  assert parts.write_errors(out) == 0
  assert len(parts.done(out)) == 20


def test_failures_of_another_process_count(images, out):
  """It does the parts after this one has listed them."""
  for i in range(5):
    (images / f"00{i}.png").write_bytes(b"broken")
  late = job(images, out, max_error_rate=0.2)
  with pytest.raises(jobs.TooManyFailuresError, match="5 of 12"):
    runs.run(late, MODEL, QUIET, QUIET, at_deadline=lambda _: run(images, out))


def test_a_part_that_was_taken_over_is_left_alone(images, out):
  """The process was suspended until its lease was stale, and is told to stop then."""
  begun = job(images, out)
  described, _ = freeze.agree(out, begun.describe(MODEL), begun.inputs)
  share = Share(begun, 0, described)
  assert share.claim()
  share.add([b'{"input": 0}\n'], [], [0], {})
  lease = part_files.lease_path(out, 0)
  lease.write_text(json.dumps(json.loads(lease.read_text()) | {"token": "another"}))
  for path in (out / "parts").glob(".*"):
    path.unlink()  # as who takes over does
  share.close()
  assert share.held
  assert lease.exists()
  assert not list((out / "parts").iterdir())
