"""A job and its faults, with an engine that needs no model: nothing lost, nothing done twice."""

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
from sam3_jax.batch import part_files, parts, pipeline
from sam3_jax.batch import run as runs
from sam3_jax.batch.merge import ANNOTATIONS, merge
from sam3_jax.inference.predictor import Sam3
from sam3_jax.utils.lease import Lease

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(autouse=True)
def stub(monkeypatch):
  monkeypatch.setattr(pipeline, "Engine", batches.Engine)
  monkeypatch.setattr(pipeline, "BACKOFF", (0.0, 0.0, 0.0))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
  """23 good ones, and three of which nothing can be made."""
  folder = write_images(tmp_path_factory.mktemp("images"), 23)
  (folder / "004-empty.png").write_bytes(b"")
  (folder / "011-text.jpg").write_text("no image")
  (folder / "022-cut.png").write_bytes((folder / "022.png").read_bytes()[:60])
  return folder


@pytest.fixture(scope="module")
def undisturbed(images, tmp_path_factory):
  """All files of a job that one process did at one go, merged."""
  out = tmp_path_factory.mktemp("undisturbed")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(pipeline, "Engine", batches.Engine)
    assert runs.run(job(images, out), MODEL, QUIET, QUIET)
  merge(out)
  return files(out)


def test_everything_is_done_once(images, undisturbed):
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


def test_manifests_say_which_inputs_a_part_holds(undisturbed):
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
def test_any_number_of_processes_in_any_order(images, undisturbed, tmp_path, processes):
  order = list(range(processes))
  random.Random(processes).shuffle(order)
  for process in order:
    one = job(images, tmp_path, process=process, processes=processes)
    assert runs.run(one, MODEL, QUIET, QUIET)
  merge(tmp_path)
  assert files(tmp_path) == undisturbed


def test_worker_processes_read_the_same(images, undisturbed, tmp_path):
  assert runs.run(job(images, tmp_path, workers=1), MODEL, QUIET, QUIET)
  merge(tmp_path)
  assert files(tmp_path) == undisturbed


def test_stopping_and_going_on_with_other_processes(images, undisturbed, tmp_path):
  """Stopped in the middle of a part after each batch; every second time, two processes go on."""
  for turn in range(40):
    processes = 1 + turn % 2
    whole = []
    for process in range(processes):
      started, stop = batches.Engine.started, lambda: batches.Engine.started > started  # noqa: B023
      one = job(images, tmp_path, process=process, processes=processes)
      whole.append(runs.run(one, MODEL, QUIET, QUIET, stop))
    if turn == 1:
      assert list((tmp_path / "parts").glob("*.begun.jsonl"))
    if all(whole):
      break
  assert turn > 5
  merge(tmp_path)
  assert files(tmp_path) == undisturbed


def test_a_second_run_does_nothing(images, undisturbed, tmp_path, monkeypatch):
  assert runs.run(job(images, tmp_path), MODEL, QUIET, QUIET)
  merge(tmp_path)
  monkeypatch.setattr(batches.Engine, "start", None)
  assert runs.run(job(images, tmp_path), MODEL, QUIET, QUIET)
  assert files(tmp_path) == undisturbed


def test_another_job_is_refused(images, tmp_path):
  runs.run(job(images, tmp_path), MODEL, QUIET, QUIET)
  before = files(tmp_path)
  for other, said in (
    (job(images, tmp_path, "cat"), r"prompts changed of 26 images \(000.png, .* and 23 more\)"),
    (job(images, tmp_path, part_size=6), "--part-size: 5 then, 6 now"),
    (job(images, tmp_path, threshold=0.4), "--threshold: 0.5 then, 0.4 now"),
  ):
    with pytest.raises(ValueError, match=said) as caught:
      runs.run(other, MODEL, QUIET, QUIET)
    assert "\n" not in str(caught.value)
  assert files(tmp_path) == before


def test_too_many_failures_stop_it(tmp_path, monkeypatch):
  """20 broken ones among 60, all at the front; what was done stays, and a higher rate goes on."""
  folder = write_images(tmp_path / "images", 40)
  for i in range(20):
    (folder / f"+{i:02}.png").write_bytes(b"")
  monkeypatch.setattr(jobs, "SEEN", 10)
  out = tmp_path / "out"
  with pytest.raises(jobs.TooManyFailuresError, match=r"of \d+ images failed.*--max-error-rate"):
    runs.run(job(folder, out, max_error_rate=0.2), MODEL, QUIET, QUIET)
  listed = (out / "errors.jsonl").read_text().splitlines()
  assert len(parts.done(out)) < 4
  assert len(listed) < 20
  with pytest.raises(ValueError, match=r"parts in .* are not done yet, the first is"):
    merge(out)
  assert runs.run(job(folder, out, max_error_rate=1.0), MODEL, QUIET, QUIET)
  assert len((out / "errors.jsonl").read_text().splitlines()) == 20
  assert merge(out) | {"annotations": 0} == {
    "images": 40, "annotations": 0, "failed": 20, "categories": 2
  }  # fmt: skip


def test_thirty_broken_ones_among_a_thousand(tmp_path):
  """Of ten kinds, one of them a box that misses its image: 3 %, which the command lets pass."""
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
  assert runs.run(job(path, out, None, **settings), MODEL, QUIET, QUIET)
  assert merge(out)["images"] == 970
  failed = [json.loads(line) for line in (out / "errors.jsonl").read_text().splitlines()]
  assert [one["input"] for one in failed] == [33 * i for i in range(30)]
  assert [one["image"] for one in failed] == [lines[33 * i]["image"] for i in range(30)]
  assert all(one["reason"] for one in failed)


class TestFullDisk:
  @pytest.mark.parametrize("name", ["part-000002.jsonl", "part-000002.json", "job.json"])
  def test_is_one_line_and_the_rest_is_done_later(
    self, images, undisturbed, tmp_path, monkeypatch, name
  ):
    from sam3_jax.batch import files as disk

    write = disk.Draft.write

    def fail(self, data):
      if self.path.name == name:
        with self.naming():
          raise OSError(28, "No space left on device")
      write(self, data)

    def refuse(path, data):
      raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk.Draft, "write", fail)
    if name == "job.json":
      monkeypatch.setattr(disk, "create_exclusively", refuse)
    with pytest.raises(
      OSError, match=rf"cannot write .*{name}: No space left on device; "
    ) as caught:
      runs.run(job(images, tmp_path), MODEL, QUIET, QUIET)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*.partial"))
    monkeypatch.undo()
    monkeypatch.setattr(pipeline, "Engine", batches.Engine)
    assert runs.run(job(images, tmp_path), MODEL, QUIET, QUIET)
    merge(tmp_path)
    assert files(tmp_path) == undisturbed

  def test_half_a_batch_is_not_kept(self, images, undisturbed, tmp_path, monkeypatch):
    """There is no room for the fourth record, but there is for everything after."""
    from sam3_jax.batch.parts import PartWriter

    write, count = PartWriter._write, iter(range(1000))

    def fail(self, *record):
      if next(count) == 3:
        raise OSError(28, "No space left on device")
      write(self, *record)

    monkeypatch.setattr(PartWriter, "_write", fail)
    with pytest.raises(OSError, match="No space left"):
      runs.run(job(images, tmp_path), MODEL, QUIET, QUIET)
    assert runs.run(job(images, tmp_path), MODEL, QUIET, QUIET)
    merge(tmp_path)
    assert files(tmp_path) == undisturbed


def _start(images: Path, out: Path, pause: float) -> subprocess.Popen:
  command = [sys.executable, batches.__file__, images, out, json.dumps({}), str(pause)]
  return subprocess.Popen(
    [str(one) for one in command], stdout=subprocess.PIPE, env=os.environ | {"JAX_PLATFORMS": "cpu"}
  )


def test_killed_and_started_again(images, undisturbed, tmp_path):
  """By -9, at random moments; three times here, thirty in `benchmarks/batch_faults.py`."""
  rng = random.Random(1)
  for _ in range(3):
    process = _start(images, tmp_path, 0.05)
    process.stdout.readline()
    time.sleep(rng.uniform(0.1, 0.6))
    process.send_signal(signal.SIGKILL)
    process.communicate()
  assert runs.run(job(images, tmp_path), MODEL, QUIET, QUIET)
  merge(tmp_path)
  assert files(tmp_path) == undisturbed


def test_killed_between_renames(images, undisturbed, tmp_path):
  """What would be left at each of these moments."""
  runs.run(job(images, tmp_path), MODEL, QUIET, QUIET)
  folder = tmp_path / "parts"
  (folder / "part-000001.json").unlink()  # the records are there, their manifest is not
  (folder / "part-000003.json").rename(folder / ".part-000003.json.host.123.partial")
  (folder / "part-000003.jsonl").rename(folder / ".part-000003.jsonl.host.123.partial")
  shutil.copy(folder / "part-000002.jsonl", folder / "part-000002.begun.jsonl")  # done after all
  (folder / "part-000005.json").unlink()
  (folder / "part-000005.jsonl").unlink()
  # Of a beginning, the new records but the old manifest.
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
  assert runs.run(job(images, tmp_path), MODEL, QUIET, QUIET)
  merge(tmp_path)
  assert files(tmp_path) == undisturbed


def test_a_part_that_another_process_does(images, undisturbed, tmp_path):
  """It is left to that one, and its files stay; not so once it is gone."""
  draft = tmp_path / "parts" / ".part-000002.jsonl.host.1.partial"
  draft.parent.mkdir()
  draft.write_bytes(b"some")
  console = Console(file=io.StringIO())
  with Lease(part_files.lease_path(tmp_path, 2)):
    assert not runs.run(job(images, tmp_path), MODEL, QUIET, console)
    assert parts.done(tmp_path) == {0, 1, 3, 4, 5}
    assert draft.exists()
  assert "1 part is being done by another process; rerun" in console.file.getvalue()
  assert runs.run(job(images, tmp_path), MODEL, QUIET, QUIET)
  merge(tmp_path)
  assert files(tmp_path) == undisturbed


def test_the_same_process_started_twice_shares_the_work(images, undisturbed, tmp_path, monkeypatch):
  monkeypatch.setattr(batches.Engine, "pause", 0.02)
  before, results = batches.Engine.started, []

  def work():
    results.append(runs.run(job(images, tmp_path), MODEL, QUIET, QUIET))

  threads = [threading.Thread(target=work) for _ in range(3)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert batches.Engine.started - before == 16  # five parts of three batches, and one of one
  assert any(results)
  merge(tmp_path)
  assert files(tmp_path) == undisturbed


def test_a_damaged_part_is_noticed(images, tmp_path):
  runs.run(job(images, tmp_path), MODEL, QUIET, QUIET)
  path = tmp_path / "parts" / "part-000002.jsonl"
  whole = path.read_bytes()
  for data in (whole[:-30], whole.replace(b"score", b"scare", 1), b""):
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"part-000002.jsonl is damaged; remove .*000002.json and"):
      merge(tmp_path)
  assert not (tmp_path / ANNOTATIONS).exists()
  path.unlink()
  with pytest.raises(ValueError, match="is damaged"):
    merge(tmp_path)
  path.with_suffix(".json").unlink()
  assert runs.run(job(images, tmp_path), MODEL, QUIET, QUIET)
  assert path.read_bytes() == whole
  assert merge(tmp_path)["images"] == 23


def test_nothing_to_merge(tmp_path):
  with pytest.raises(FileNotFoundError, match="there are no results in"):
    merge(tmp_path)


def test_boxes_that_miss_their_image_are_a_failure_of_it(images, tmp_path):
  lines = [
    {"image": str(images / "000.png"), "prompts": [{"boxes": [[900, 900, 950, 950]]}]},
    {"image": str(images / "001.png"), "prompts": ["cat"]},
    {"image": str(images / "none.png"), "prompts": ["cat"]},
  ]
  path = tmp_path / "list.jsonl"
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  assert runs.run(job(path, tmp_path / "out", None, skip_unreadable=True), MODEL, QUIET, QUIET)
  failed = [
    json.loads(line) for line in (tmp_path / "out" / "errors.jsonl").read_text().splitlines()
  ]
  assert [one["input"] for one in failed] == [0, 2]
  assert "completely outside" in failed[0]["reason"]
  assert "there is no image" in failed[1]["reason"]


class TestVisualPrompts:
  @pytest.fixture
  def listed(self, images, tmp_path):
    """Three images with phrases and visual prompts, one of which misses its image."""
    click, box = {"points": [[2, 2]]}, {"box": [1, 1, 4, 4], "visual": True}
    prompts = [["cat", click, box], [click, {"points": [[900, 2]]}], [{"boxes": [[1, 1, 4, 4]]}]]
    lines = [{"image": f"{images}/{i:03}.png", "prompts": asked} for i, asked in enumerate(prompts)]
    path = tmp_path / "list.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path

  def test_beside_others(self, listed, tmp_path):
    results = []
    for processes in (1, 2):
      out = tmp_path / str(processes)
      for process in range(processes)[::-1]:
        share = {"process": process, "processes": processes, "part_size": 1}
        assert runs.run(job(listed, out, None, **share), MODEL, QUIET, QUIET)
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

  def test_without_a_head(self, listed, tmp_path):
    without = functools.partial(Sam3.visual_params, types.SimpleNamespace(params={}))
    model = types.SimpleNamespace(**vars(MODEL) | {"visual_params": without})
    with pytest.raises(ValueError, match="this checkpoint has no head for visual prompts") as e:
      runs.run(job(listed, tmp_path / "out", None), model, QUIET, QUIET)
    assert "\n" not in str(e.value)
    assert not (tmp_path / "out").exists()


def test_a_single_image(images, tmp_path):
  assert runs.run(job(images / "000.png", tmp_path, "cat"), MODEL, QUIET, QUIET)
  assert merge(tmp_path)["images"] == 1
