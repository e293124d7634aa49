"""`sam3-jax batch`: options and messages, signals, and several processes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import batch_scenes
import batches
import pytest
import training_model
from batches import files, write_images
from pycocotools.coco import COCO
from support import QUICK

from sam3_jax.batch import pipeline, prefetch, processes
from sam3_jax.cli.main import main
from sam3_jax.inference.predictor import Sam3

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """The working directory of the command, with seven images; the engine needs no model."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(pipeline, "Engine", batches.Engine)
  monkeypatch.setattr(Sam3, "from_checkpoint", lambda *_, **__: batches.MODEL)
  write_images(tmp_path / "images", 7)
  return tmp_path


TYPED = ["batch", "--images", "images", "--prompts", "cat, dog", "--out", "out"]


def test_segments_and_merges(folder, capsys):
  assert main(TYPED) == 0
  out, _ = capsys.readouterr()
  assert "7 images done, 0 failed, 14 prompts, " in out
  assert "devices busy" in out
  assert main(["batch", "--merge", "--out", "out"]) == 0
  out, _ = capsys.readouterr()
  assert out.startswith("out/annotations.json: 7 images, ")
  assert len(COCO("out/annotations.json").imgs) == 7


def test_skipped_files_are_counted_in_a_note(folder, capsys):
  (folder / "images" / "notes.txt").write_text("x")
  assert main([*TYPED, "--strict"]) == 2
  assert "error: --strict: skipped 1 file: 1 .txt. Remove" in capsys.readouterr().err
  assert not (folder / "out" / "job.json").exists()
  assert main(TYPED) == 0
  assert capsys.readouterr().err.splitlines()[-1] == "note: skipped 1 file: 1 .txt"
  (folder / "images" / "000.jpg").write_bytes((folder / "images" / "000.png").read_bytes())
  assert main([*TYPED[:-1], "other", "--quiet"]) == 0
  assert main(["batch", "--merge", "--out", "other", "--to", "yolo"]) == 0
  err = capsys.readouterr().err
  assert err.startswith("note: 1 image differs from another only in its suffix")
  assert err.count("\n") == 1


@pytest.mark.parametrize(("layout", "count"), [("labelme", 7), ("yolo", 8)])
def test_other_formats(folder, capsys, layout, count):
  assert main([*TYPED, "--quiet"]) == 0
  assert main(["batch", "--merge", "--out", "out", "--to", layout]) == 0
  assert capsys.readouterr().out.splitlines()[-1] == f"out/{layout}: 7 images"
  assert sum(path.is_file() for path in (folder / "out" / layout).rglob("*")) == count


def test_quiet(folder, capsys):
  assert main([*TYPED, "--quiet"]) == 0
  assert main(["batch", "--merge", "--out", "out", "--quiet"]) == 0
  assert capsys.readouterr() == ("", "")


def test_progress_lines_without_a_terminal(folder, capsys, monkeypatch):
  monkeypatch.setattr("sam3_jax.batch.run_stats.REPORT_INTERVAL", 0.0)
  assert main([*TYPED, "--processes", "2", "--process", "1", "--part-size", "2"]) == 0
  lines = capsys.readouterr().err.splitlines()
  assert len(lines) > 2
  for line in lines:
    assert line.startswith("process 1 of 2: ")
    for part in (" images/s, ", " prompts/s, ", " failed, ", " left"):
      assert part in line


def test_rerun_says_how_many_parts_are_done(folder, capsys):
  for process in (0, 1):
    typed = [*TYPED, "--processes", "2", "--process", str(process), "--part-size", "2"]
    assert main(typed) == 0
  capsys.readouterr()
  assert main([*TYPED, "--part-size", "2"]) == 0
  assert "4 of 4 parts are done already" in capsys.readouterr().err


def test_sigterm_stops_after_the_batch_and_a_rerun_resumes(folder, capsys, monkeypatch):
  start = batches.Engine.start

  def start_and_terminate(self, slots):
    os.kill(os.getpid(), signal.SIGTERM)
    return start(self, slots)

  with monkeypatch.context() as patch:
    patch.setattr(batches.Engine, "start", start_and_terminate)
    before = signal.getsignal(signal.SIGTERM)
    assert main([*TYPED, "--batch-images", "2"]) == 75
    assert signal.getsignal(signal.SIGTERM) is before
  assert "stopped; rerun the same command to resume" in capsys.readouterr().err
  assert "part-000000.begun.json" in {path.name for path in (folder / "out/parts").iterdir()}
  assert main([*TYPED, "--batch-images", "2"]) == 0
  assert "5 images done" in capsys.readouterr().out
  assert main(["batch", "--merge", "--out", "out"]) == 0
  assert len(COCO("out/annotations.json").imgs) == 7


@pytest.mark.parametrize(
  ("typed", "message"),
  [
    (["--prompts", "cat"], "--images is required"),
    (["--images", "none", "--prompts", "cat"], "there is no directory, file or pattern none"),
    (
      ["--images", "images"],
      "7 images have no prompts (000.png, 001.png, 002.png and 4 more)",
    ),
    (["--images", "images", "--prompts", ""], "there is no phrase"),
    (["--images", "images", "--prompts", "cat", "--threshold", "2"], "--threshold must be"),
    (
      ["--images", "images", "--prompts", "cat", "--max-error-rate", "nan"],
      "max-error-rate must",
    ),
    (["--images", "images", "--prompts", "cat", "--process", "1"], "--process go together"),
    (
      ["--images", "images", "--prompts", "a", "--process", "2", "--processes", "2"],
      "--process must be from 0 to 1; got 2",
    ),
    (["--images", "images", "--prompts", "a", "--coordinator", "a:1"], "--coordinator needs"),
    (["--images", "images", "--prompts", "a", "--checkpoint", "none"], "no checkpoint 'none'"),
    (["--images", "images", "--prompts", "a " * 40], "has 40 tokens, and at most 30"),
    (["--images", "images", "--prompts", "a", "--to", "yolo"], "--to yolo needs --merge"),
    (["--merge"], "there are no results in out; run batch"),
    (["--merge", "--out", "images/000.png"], "there are no results in images/000.png"),
    (["--images", "images", "--prompts", "a", "--out", "images/000.png"], "(Not a directory)"),
  ],
)
def test_errors_are_one_line(folder, capsys, typed, message):
  assert main(["batch", "--out", "out", *typed]) == 2
  out, err = capsys.readouterr()
  assert out == ""
  assert err.startswith("sam3-jax: error: ")
  assert message in err
  assert err.count("\n") == 1
  assert not (folder / "out").exists()


def test_too_many_failures(folder, capsys):
  for i in range(3):
    (folder / "images" / f"broken{i}.jpg").write_bytes(b"")
  assert main(TYPED) == 2
  out, err = capsys.readouterr()
  assert "7 images done, 3 failed" in out
  assert "error: 3 of 10 images failed, more than --max-error-rate 0.05 allows" in err
  assert len((folder / "out/errors.jsonl").read_text().splitlines()) == 3


@pytest.mark.slow
def test_killed_worker_loses_no_image(folder, monkeypatch):
  """An image whose reader is killed is read again, alone. Only `--workers` are killed here: an
  image that ends the lone process too has failed, whatever ended it."""
  typed, start = (
    [*TYPED, "--part-size", "2", "--batch-images", "2", "--quiet"],
    batches.Engine.start,
  )
  write_images(folder / "images", 16)
  assert main([*typed, "--out", "undisturbed"]) == 0

  workers, killed = [], []

  class Recorded(prefetch.ReaderProcess):
    def __init__(self, side, max_pixels, memory=None):
      super().__init__(side, max_pixels, memory)
      if memory is None:
        workers.append(self)

  def start_and_kill(self, slots):
    if len(killed) < 3 and workers[-1] not in killed:
      workers[-1].kill()
      killed.append(workers[-1])
    return start(self, slots)

  with monkeypatch.context() as patch:
    patch.setattr(prefetch, "ReaderProcess", Recorded)
    patch.setattr(batches.Engine, "start", start_and_kill)
    assert main([*typed, "--workers", "1"]) == 0
  assert killed
  assert files(folder / "out") == files(folder / "undisturbed")


@pytest.mark.parametrize(
  ("environment", "expected"),
  [
    ({}, (0, 1)),
    ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3"}, (3, 4)),
    ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, (0, 1)),  # in a batch script, outside srun
    ({"SLURM_STEP_NUM_TASKS": "x", "SLURM_PROCID": "0"}, (0, 1)),
    ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, (1, 2)),
    ({"TPU_WORKER_HOSTNAMES": "localhost"}, (0, 1)),
    ({"TPU_WORKER_HOSTNAMES": "a,b,c,d"}, "jax"),
  ],
)
def test_process_index_from_the_environment(monkeypatch, environment, expected):
  for name in list(os.environ):
    if name.startswith(("SLURM_", "OMPI_", "TPU_")):
      monkeypatch.delenv(name)
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  monkeypatch.setattr(processes, "_from_jax", lambda *_: "jax")
  assert processes.initialize() == expected
  assert processes.initialize(distributed=False) == (0, 1)
  assert processes.initialize(distributed=True) == "jax"
  assert processes.initialize(processes=5, process=2) == (2, 5)
  assert processes.initialize(processes=5, process=2, coordinator="a:1") == "jax"


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
  """A directory with twelve scenes, their phrases and some clicks, ten images that cannot be used,
  the checkpoint of a small model, and a compilation cache."""
  folder = tmp_path_factory.mktemp("together")
  training_model.save(folder / "toy", visual=True)
  listed = batch_scenes.write(folder / "scenes", 12)
  lines = listed.read_text().splitlines()
  for i in range(1, 12, 2):
    line = json.loads(lines[i])
    line["prompts"].insert(i % 3, {"points": [[20 * i, 100]]})
    lines[i] = json.dumps(line)
  for i, (name, data) in enumerate(batches.broken().items()):
    (folder / "scenes" / name).write_bytes(data)
    lines.insert(2 * i + 1, json.dumps({"image": name, "prompts": ["cat"]}))
  os.link(folder / "scenes" / json.loads(lines[0])["image"], folder / "scenes" / "outside.jpg")
  outside = {"boxes": [[900, 900, 950, 950]]}
  lines.insert(5, json.dumps({"image": "outside.jpg", "prompts": [outside]}))
  listed.write_text("\n".join(lines))
  return folder


def start(folder: Path, out: str, *typed: str) -> subprocess.Popen:
  flags = "--xla_force_host_platform_device_count=2"
  flags = " ".join([flags, *(f"--{name}={json.dumps(value)}" for name, value in QUICK.items())])
  program = "from sam3_jax.cli.main import entry; entry()"
  command = [sys.executable, "-c", program, "batch", "--out", out, "--images", "scenes/list.jsonl"]
  command += ["--checkpoint", "toy", "--threshold", "0.1", "--max-detections", "3"]
  command += ["--part-size", "4", "--batch-images", "1", "--max-pixels", "1000000"]
  command += ["--max-error-rate", "0.5", *typed]
  cache = {
    "JAX_ENABLE_COMPILATION_CACHE": "1",
    "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  }
  return subprocess.Popen(
    command, cwd=folder, env=os.environ | cache | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
    stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
  )  # fmt: skip


def free_port() -> int:
  with socket.socket() as free:
    free.bind(("localhost", 0))
    return free.getsockname()[1]


def start_two(folder: Path, out: str) -> list[subprocess.Popen]:
  """Starts two processes that are connected by `jax.distributed`."""
  typed = ["--coordinator", f"localhost:{free_port()}", "--processes", "2", "--process"]
  return [start(folder, out, *typed, str(i)) for i in range(2)]


@pytest.fixture(scope="module")
def alone(shared):
  process = start(shared, "alone")
  _, err = process.communicate()
  assert process.returncode == 0, err
  assert main(["batch", "--merge", "--out", str(shared / "alone"), "--quiet"]) == 0
  return files(shared / "alone")


@pytest.mark.slow
class TestProcesses:
  """The program itself, with a small model and two devices per process."""

  def test_two_connected_processes_equal_one(self, shared, alone):
    for i, process in enumerate(start_two(shared, "two")):
      out, err = process.communicate()
      assert process.returncode == 0, err
      assert f"process {i} of 2: " in out
    assert main(["batch", "--merge", "--out", str(shared / "two"), "--quiet"]) == 0
    assert files(shared / "two") == alone

  def test_killed_process_loses_only_its_own_parts(self, shared, alone):
    """The other process continues, and a rerun does the rest."""
    left, lost = start_two(shared, "peer")
    while lost.poll() is None and not list((shared / "peer").glob("parts/*")):
      time.sleep(0.01)
    lost.kill()
    lost.communicate(timeout=300)
    assert lost.returncode == -signal.SIGKILL
    _, err = left.communicate(timeout=300)
    assert left.returncode == 0, err
    assert {f"part-{i:06}.json" for i in range(0, 6, 2)} <= set(os.listdir(shared / "peer/parts"))
    again = start(shared, "peer")
    _, err = again.communicate(timeout=300)
    assert again.returncode == 0, err
    assert main(["batch", "--merge", "--out", str(shared / "peer"), "--quiet"]) == 0
    assert files(shared / "peer") == alone

  def test_merged_results(self, alone):
    found = json.loads(alone["annotations.json"])
    assert len(found["images"]) == 12
    assert 12 < len(found["annotations"]) <= 12 * 2 * 3 + 6
    names = {one["id"]: one["name"] for one in found["categories"]}
    assert {"frog", "bunch of grapes", "visual"} <= set(names.values())
    clicked = [one for one in found["annotations"] if names[one["category_id"]] == "visual"]
    assert 0 < len(clicked) <= 6

  def test_every_unusable_image_is_named(self, alone):
    failed = [json.loads(line) for line in alone["errors.jsonl"].splitlines()]
    assert {one["image"] for one in failed} == {*batches.broken(), "outside.jpg"}
    assert len(failed) == 10
    assert all(one["reason"] for one in failed)

  def test_missing_process(self, shared):
    typed = ["--coordinator", f"localhost:{free_port()}", "--processes", "2", "--process", "0"]
    process = start(shared, "lonely", *typed, "--start-timeout", "2")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2
    assert err.count("\n") == 1
    assert "error: the processes did not find each other within 2 seconds; start all" in err
    assert not (shared / "lonely").exists()
