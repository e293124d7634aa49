"""`sam3-jax batch --videos`: options and messages, signals, kills, and buckets."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time

import object_servers
import pytest
import video_batch_faults
import video_batches
from batches import QUIET, files
from video_batches import Model, job, write_clip, write_videos

from sam3_jax.batch import local_video, pipeline
from sam3_jax.batch.merge_videos import merge_videos
from sam3_jax.batch.run import run
from sam3_jax.cli.main import main
from sam3_jax.datasets import video_annotations
from sam3_jax.inference.predictor import Sam3
from sam3_jax.outputs.track_lines import line_of
from sam3_jax.storage.objects import ObjectPath

TYPED = ["batch", "--videos", "videos", "--text", "player", "--text", "ball", "--out", "out"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """The working directory of the command, with five videos; no model is needed."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(pipeline, "BACKOFF", (0.0, 0.0, 0.0))
  write_videos(tmp_path / "videos")
  with video_batches.patched():
    yield tmp_path


def test_tracks_and_merges(folder, capsys):
  assert main(TYPED) == 0
  out, _ = capsys.readouterr()
  assert out.startswith("5 videos done, 0 failed, 26 frames, 10 objects in ")
  assert "frames/s" in out
  assert main(["batch", "--merge", "--out", "out", "--to", "tracks"]) == 0
  out, _ = capsys.readouterr()
  assert out.splitlines() == [
    "out/annotations.json: 5 videos, 10 annotations, 0 failed, 2 categories",
    "out/tracks: 5 videos",
  ]
  assert len(list((folder / "out" / "tracks").rglob("*.tracks.jsonl"))) == 5
  assert len(video_annotations.read(folder / "out" / "annotations.json")) == 5
  assert main(TYPED) == 0
  assert capsys.readouterr().out == "nothing to do: 5 videos were done before, and 0 failed\n"
  assert main([*TYPED, "--quiet"]) == 0
  assert capsys.readouterr() == ("", "")


def test_messages(folder, capsys):
  (folder / "videos" / "x.mp4").write_text("no video")
  (folder / "list.txt").write_text("videos/a/clip0.mp4\nmissing.mp4\nvideos/x.mp4\n")
  typed = [*TYPED[:2], "list.txt", *TYPED[3:], "--max-error-rate", "1"]
  assert main(typed) == 75
  err = capsys.readouterr().err.splitlines()
  assert err[-2:] == [
    "1 video could not be read (there is no video missing.mp4); rerun the same command to retry, "
    "or add --skip-unreadable to count unreadable videos as failed",
    "note: 1 video does not exist (missing.mp4)",
  ]
  assert main([*typed, "--skip-unreadable"]) == 0
  assert main(["batch", "--merge", "--out", "out"]) == 0
  assert "1 video, 2 annotations, 2 failed, 2 categories" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("typed", "match"),
  [
    (["--images", "videos"], "--images and --videos are two jobs: give one of them"),
    (["--threshold", "0.5"], "--threshold is for --images; leave it out for videos"),
    (["--tile", "512"], "--tile is for --images"),
    (["--concept", "c"], "--concept is for --images"),
    (["--to", "tracks"], "--to tracks needs --merge"),
    (["--strict"], "--strict: skipped 1 file: 1 .csv"),
  ],
)
def test_refused_options(folder, capsys, typed, match):
  (folder / "videos" / "x.csv").write_text("x")
  assert main([*TYPED, *typed]) == 2
  err = capsys.readouterr().err
  assert match in err
  assert err.count("\n") == 1
  assert not (folder / "out" / "job.json").exists()


def test_phrases_are_checked_before_any_work(folder, capsys):
  assert main([*TYPED, "--text", " ".join(["word"] * 40)]) == 2
  assert "has 40 tokens, and at most 30 are read" in capsys.readouterr().err
  assert main(["batch", "--videos", "videos", "--out", "out"]) == 2
  err = capsys.readouterr().err
  assert "5 videos have no prompts (a/clip0.mp4, a/clip2.mp4, b/clip1.mp4 and 2 more)" in err
  assert not (folder / "out").exists()


def test_jobs_of_images_and_of_videos_are_told_apart(folder, capsys):
  assert main([*TYPED, "--quiet"]) == 0
  assert main(["batch", "--merge", "--out", "out", "--to", "labelme"]) == 2
  assert "--to labelme is not for videos; choose one of ytvis, tracks" in capsys.readouterr().err
  before = files(folder / "out")
  assert main(["batch", "--images", "videos/c", "--text", "cat", "--out", "out"]) == 2
  assert "results of another job (it is a job of videos)" in capsys.readouterr().err
  assert files(folder / "out") == before


def test_progress_lines_without_a_terminal(folder, capsys, monkeypatch):
  monkeypatch.setattr("sam3_jax.batch.run_stats.REPORT_INTERVAL", 0.0)
  assert main([*TYPED, "--processes", "2", "--process", "1"]) == 0
  lines = capsys.readouterr().err.splitlines()
  assert lines[0].startswith("process 1 of 2: 0 of 2 videos, 1 frames, ")
  for part in (" frames/s, ", " failed, ", " left"):
    assert part in lines[0]


class TestBuckets:
  @pytest.fixture(autouse=True)
  def server(self, folder, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    with object_servers.cloud_storage(monkeypatch) as server:
      for path in (folder / "videos").rglob("*.mp4"):
        name = path.relative_to(folder).as_posix()
        server.put(name, path.read_bytes(), {})
      server.put("videos/notes.txt", b"x", {})
      yield server

  @pytest.fixture
  def local(self, folder):
    """The merged file of a local job of the same videos."""
    (folder / "list.txt").write_text(
      "".join(f"{one}\n" for one in ("a/clip0.mp4", "a/clip2.mp4", "b/clip1.mp4", "b/clip3.mp4"))
    )
    (folder / "list.txt").rename(folder / "videos" / "list.txt")
    assert run(job("videos/list.txt", "local"), Model(), QUIET, QUIET)
    merge_videos(folder / "local")
    return (folder / "local" / "annotations.json").read_bytes()

  def temporary(self, folder):
    return list((folder / f"sam3-jax-{os.getuid()}").rglob("*.partial"))

  def test_videos_and_results_in_a_bucket(self, folder, server, local, monkeypatch):
    monkeypatch.setattr("sam3_jax.batch.local_video.PIECE", 1000)
    out = "gs://bucket/out"
    assert run(job("gs://bucket/videos", out), Model(), QUIET, QUIET)
    merge_videos(ObjectPath(out))
    assert server.objects["out/annotations.json"][1] == local
    assert not self.temporary(folder)
    model = Model()
    assert run(job("gs://bucket/videos", out), model, QUIET, QUIET)
    assert model.frames == 0

  def test_stopped_and_resumed_with_local_results(self, folder, server, local):
    model = Model()
    settings = {"videos": "gs://bucket/videos/*/*.mp4", "out": folder / "out"}
    assert not run(
      job(**settings), model, QUIET, QUIET, stopping=lambda: model.frames >= 6
    )  # fmt: skip
    assert not self.temporary(folder)
    assert run(job(**settings), model, QUIET, QUIET)
    assert merge_videos(folder / "out")["videos"] == 4

  def test_changed_and_missing_objects(self, folder, server, local):
    (folder / "urls.txt").write_text("gs://bucket/videos/a/clip0.mp4\ngs://bucket/no.mp4\n")
    wanted = job("urls.txt", folder / "out")
    server.put("videos/a/clip0.mp4", write_clip(folder / "x.mp4", 3).read_bytes(), {})
    assert not run(wanted, Model(), QUIET, QUIET)
    assert not list((folder / "out" / "parts").glob("part-??????.json"))
    with pytest.raises(ValueError, match="1 file modified"):
      run(job("urls.txt", folder / "out"), Model(), QUIET, QUIET)

  def test_no_room_for_a_temporary_file(self, folder, server, local, monkeypatch):
    class Full(local_video.Draft):
      def write(self, data):
        raise OSError(28, "No space left on device", "name")

    monkeypatch.setattr(local_video, "Draft", Full)
    with pytest.raises(OSError, match="TMPDIR names another directory"):
      run(job("gs://bucket/videos", folder / "out"), Model(), QUIET, QUIET)


def start(folder, *typed, pause=0.05):
  environment = os.environ | {"JAX_PLATFORMS": "cpu", video_batches.PAUSE: str(pause)}
  return subprocess.Popen(
    [sys.executable, video_batches.__file__, *typed], cwd=folder, env=environment,
    stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
  )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_stopped_while_tracking(folder, number):
  process = start(folder, *TYPED, "--quiet", pause=0.3)
  while not list((folder / "out").glob("parts/*.tracks.jsonl*")) and process.poll() is None:
    if list((folder / "out").glob("parts/.*tracks*")):
      break
    time.sleep(0.02)
  process.send_signal(number)
  _, err = process.communicate(timeout=30)
  assert process.returncode == (75 if number == signal.SIGTERM else -9)
  if number == signal.SIGTERM:
    assert "stopped; rerun the same command to resume" in err
  assert main([*TYPED, "--quiet"]) == 0
  assert main([*TYPED[:-1], "clean", "--quiet"]) == 0
  for out in ("out", "clean"):
    merge_videos(folder / out)
  assert files(folder / "out") == files(folder / "clean")
  assert json.loads((folder / "out" / "annotations.json").read_bytes())["videos"][0]["length"] == 4


@pytest.mark.slow
def test_killed_at_random_moments():
  """Three times with a stub here, thirty times with it in the recorded benchmark."""
  faults, moments = video_batch_faults.campaign(3, 1, stub=True)
  assert faults == []
  assert sum(moments.values()) == 3


@pytest.mark.slow
def test_sam3_tiny(tmp_path, monkeypatch):
  """The tracks of a job are those of `Sam3.track`."""
  monkeypatch.chdir(tmp_path)
  scenes = ["--count", "1", "--frames", "6", "--size", "160x120", "--out", "scenes", "--quiet"]
  assert main(["scenes", "--video", *scenes]) == 0
  typed = ["--videos", "scenes/JPEGImages", "--text", "horse", "--text", "pig", "--out", "out"]
  assert main(["batch", *typed, "--quiet", "--device", "cpu"]) == 0
  assert main(["batch", "--merge", "--out", "out", "--to", "tracks", "--quiet"]) == 0
  [video] = video_annotations.read("out/annotations.json")
  assert video.phrases == ("horse", "pig")
  assert "horse" in {one.phrase for one in video.objects}
  model = Sam3.from_checkpoint("sam3-tiny", device="cpu")
  frames = model.track(f"scenes/JPEGImages/{video.name}", ["horse", "pig"])
  [path] = (tmp_path / "out" / "tracks").iterdir()
  assert path.read_bytes() == b"".join(map(line_of, frames))
