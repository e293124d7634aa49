"""Jobs with an engine without a model: no input is lost or done twice."""

import functools
import io
import json
import random
import threading
import types

import batch_runs
import batches
import pytest
from batches import MODEL, QUIET, files, job
from rich.console import Console

from sam3_jax.batch import job_files, part_files
from sam3_jax.batch.merge import ANNOTATIONS, merge
from sam3_jax.batch.run import run
from sam3_jax.inference.predictor import Sam3
from sam3_jax.utils.lease import Lease

stub = batch_runs.stub
images = batch_runs.images
undisturbed = batch_runs.undisturbed


pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


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


def test_merge_without_a_job(tmp_path):
  with pytest.raises(FileNotFoundError, match="there are no results in"):
    merge(tmp_path)


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
