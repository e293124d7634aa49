"""Batch jobs of videos: records, resuming, failures, and merging."""

import json
import os
import shutil
import signal

import pytest
from batches import QUIET, files
from video_batches import PHRASES, SIZE, Model, job, write_clip, write_frames, write_videos

from sam3_jax.batch import job_files, part_files, pipeline, video_job, video_records
from sam3_jax.batch.merge_videos import merge_videos, write_tracks
from sam3_jax.batch.run import run
from sam3_jax.datasets import video_annotations
from sam3_jax.inputs.video import open_video
from sam3_jax.outputs.track_lines import TrackReader, line_of
from sam3_jax.utils.lease import Lease

NAMES = ["a/clip0.mp4", "a/clip2.mp4", "b/clip1.mp4", "b/clip3.mp4", "c/frames"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  monkeypatch.setattr(pipeline, "BACKOFF", (0.0, 0.0, 0.0))


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
  return write_videos(tmp_path_factory.mktemp("videos") / "videos")


@pytest.fixture(scope="module")
def undisturbed(videos, tmp_path_factory):
  """All files of a merged job that one process did without interruption."""
  out = tmp_path_factory.mktemp("undisturbed")
  assert run(job(videos, out), Model(), QUIET, QUIET)
  merge_videos(out)
  return files(out)


def lines(data: bytes) -> list:
  return [json.loads(line) for line in data.splitlines()]


def test_records(videos, undisturbed):
  assert [one["video"] for one in lines(inputs_of(undisturbed))] == NAMES
  assert undisturbed["errors.jsonl"] == b""
  for part, name in enumerate(NAMES):
    about, *rows = lines(undisturbed[f"parts/part-{part:06}.jsonl"])
    with open_video(videos / name) as source:
      tracked = list(Model().track(source, PHRASES))
    assert (about["input"], about["video"]) == (part, name)
    assert (about["height"], about["width"]) == SIZE
    assert about["phrases"] == list(PHRASES)
    assert about["frames"] == len(rows) == len(tracked)
    assert [one["phrase"] for one in about["objects"]] == list(PHRASES)
    assert about["objects"][0] == {"id": 1, "phrase": "player", "score": 0.9, "frames": len(rows)}
    assert len(about["file"]["sha256"]) == 64
    for row, frame in zip(rows, tracked, strict=True):
      assert row.pop("input") == part
      assert row == json.loads(line_of(frame))


def inputs_of(found: dict[str, bytes]) -> bytes:
  [name] = [name for name in found if name.startswith("inputs-")]
  return found[name]


def test_merged_annotations_are_a_dataset(undisturbed, tmp_path):
  path = tmp_path / "annotations.json"
  path.write_bytes(undisturbed["annotations.json"])
  read = video_annotations.read(path)
  assert [video.name for video in read] == ["a/clip0", "a/clip2", "b/clip1", "b/clip3", "c/frames"]
  assert [len(video) for video in read] == [4, 6, 5, 7, 4]
  for video in read:
    assert video.phrases == PHRASES
    assert [one.phrase for one in video.objects] == list(PHRASES)
    assert all(all(one.rles) for one in video.objects)
  data = json.loads(path.read_bytes())
  assert data["categories"] == [{"id": 1, "name": "player"}, {"id": 2, "name": "ball"}]
  assert data["videos"][1]["file"] == "a/clip2.mp4"
  assert data["videos"][1]["file_names"][5] == "a/clip2/00005.jpg"
  assert data["videos"][1]["times"][5] == 0.2
  assert [one["identity"] for one in data["annotations"]] == [1, 2] * 5
  assert data["annotations"][0]["score"] == 0.9


def test_tracks_of_each_video(videos, tmp_path):
  """The files are those that `sam3-jax track` would write."""
  (tmp_path / "list.txt").write_text(f"{videos}/a/clip0.mp4\n\n{videos}/a/../a/clip2.mp4\n")
  assert run(job(tmp_path / "list.txt", tmp_path / "out"), Model(), QUIET, QUIET)
  folder = write_tracks(tmp_path / "out")
  first, second = (next(folder.rglob(f"clip{i}.tracks.jsonl")) for i in (0, 2))
  with open_video(videos / "a" / "clip0.mp4") as source:
    assert first.read_bytes() == b"".join(map(line_of, Model().track(source, PHRASES)))
  assert len(TrackReader(second)) == 6


def test_phrases_that_find_nothing(videos, tmp_path):
  assert run(job(videos / "a" / "clip0.mp4", tmp_path, ["nothing"]), Model(), QUIET, QUIET)
  assert merge_videos(tmp_path) == {"videos": 1, "annotations": 0, "failed": 0, "categories": 1}
  [video] = video_annotations.read(tmp_path / "annotations.json")
  assert (video.phrases, video.objects) == (("nothing",), ())


@pytest.mark.parametrize("part_size", [1, 2])
def test_any_number_of_processes_gives_the_same_bytes(videos, undisturbed, tmp_path, part_size):
  for process in (2, 0, 1):
    settings = {"process": process, "processes": 3, "part_size": part_size}
    assert run(job(videos, tmp_path, **settings), Model(), QUIET, QUIET)
  merge_videos(tmp_path)
  found = files(tmp_path)
  assert found["annotations.json"] == undisturbed["annotations.json"]
  if part_size == 1:
    assert found == undisturbed


@pytest.mark.parametrize("part_size", [1, 3])
def test_stopped_at_every_frame(videos, undisturbed, tmp_path, part_size):
  """A video that was not done is tracked again from its start; those that were done are not."""
  model, stops = Model(), 0
  while True:
    stop_at = model.frames + 6 + stops
    done = run(
      job(videos, tmp_path, part_size=part_size), model, QUIET, QUIET,
      stopping=lambda stop_at=stop_at: model.frames >= stop_at,
    )  # fmt: skip
    assert not list(tmp_path.rglob("*.partial"))
    if done:
      break
    stops += 1
  assert stops > 3
  merge_videos(tmp_path)
  found = files(tmp_path)
  assert found["annotations.json"] == undisturbed["annotations.json"]
  assert part_size > 1 or found == undisturbed


def test_second_run_does_nothing(videos, undisturbed, tmp_path):
  assert run(job(videos, tmp_path), Model(), QUIET, QUIET)
  model = Model()
  assert run(job(videos, tmp_path), model, QUIET, QUIET)
  assert model.frames == 0


def test_killed_while_tracking(videos, undisturbed, tmp_path):
  """The temporary lines of a killed process are removed, and its video is checked first."""
  parts = tmp_path / "parts"
  parts.mkdir()
  left = parts / ".part-000001.tracks.jsonl.0-1-1-0.partial"
  left.write_bytes(b"{")
  journal = part_files.journal_path(tmp_path, 1)
  journal.parent.mkdir()
  journal.write_text("+1\n")
  assert run(job(videos, tmp_path), Model(), QUIET, QUIET)
  assert not left.exists()
  merge_videos(tmp_path)
  assert files(tmp_path) == undisturbed


def crash(path: str) -> None:
  os.kill(os.getpid(), signal.SIGSEGV)


@pytest.mark.parametrize("suspect", [True, False])
def test_a_video_that_crashes_the_decoder(videos, tmp_path, monkeypatch, suspect):
  monkeypatch.setattr("sam3_jax.batch.decode_check._decode", crash)
  if suspect:
    journal = part_files.journal_path(tmp_path, 1)
    journal.parent.mkdir()
    journal.write_text("+1\n")
  assert run(job(videos, tmp_path), Model(), QUIET, QUIET)
  failed = lines((tmp_path / "errors.jsonl").read_bytes())
  assert [one["video"] for one in failed] == (NAMES[1:2] if suspect else [])
  if suspect:
    assert failed[0]["reason"] == (
      "a/clip2.mp4 ends the process that decodes it (signal 11): convert it to H.264."
    )
    assert merge_videos(tmp_path)["failed"] == 1


def test_part_of_another_process_is_left_alone(videos, undisturbed, tmp_path):
  with Lease(part_files.lease_path(tmp_path, 2)):
    assert not run(job(videos, tmp_path), Model(), QUIET, QUIET)
    assert job_files.finished_parts(tmp_path) == {0, 1, 3, 4}
  assert run(job(videos, tmp_path), Model(), QUIET, QUIET)
  merge_videos(tmp_path)
  assert files(tmp_path) == undisturbed


class TestFailures:
  @pytest.fixture
  def broken(self, videos, tmp_path):
    """Videos of which three cannot be tracked, and one is missing."""
    folder = tmp_path / "videos"
    write_clip(folder / "b.mp4", 5)
    (folder / "a-text.mp4").write_text("no video")
    (folder / "c-empty.mp4").write_bytes(b"")
    write_frames(folder / "d")
    (folder / "d" / "00002.png").write_bytes(b"no image")
    write_clip(folder / "e.mp4", 4)
    (tmp_path / "list.txt").write_text(
      "".join(f"videos/{one}\n" for one in ("a-text.mp4", "b.mp4", "c-empty.mp4", "d", "e.mp4"))
    )
    (folder / "e.mp4").rename(tmp_path / "e.mp4")
    return tmp_path

  def test_are_recorded(self, broken):
    out = broken / "out"
    assert not run(job(broken / "list.txt", out), Model(), QUIET, QUIET)
    failed = {one["video"]: one["reason"] for one in lines((out / "errors.jsonl").read_bytes())}
    assert list(failed) == ["videos/a-text.mp4", "videos/c-empty.mp4", "videos/d"]
    assert "videos/a-text.mp4 is not a video" in failed["videos/a-text.mp4"]
    assert "empty" in failed["videos/c-empty.mp4"]
    assert "00002.png" in failed["videos/d"]
    assert job_files.finished_parts(out) == {0, 1, 2, 3}
    (broken / "e.mp4").rename(broken / "videos" / "e.mp4")
    assert run(job(broken / "list.txt", out), Model(), QUIET, QUIET)
    assert merge_videos(out) == {"videos": 2, "annotations": 4, "failed": 3, "categories": 2}

  def test_unreadable_videos_can_be_skipped_and_retried(self, broken):
    out = broken / "out"
    settings = {"skip_unreadable": True}
    assert run(job(broken / "list.txt", out, **settings), Model(), QUIET, QUIET)
    failed = lines((out / "errors.jsonl").read_bytes())
    assert failed[-1]["video"] == "videos/e.mp4"
    assert "there is no video" in failed[-1]["reason"]
    (broken / "e.mp4").rename(broken / "videos" / "e.mp4")
    write_clip(broken / "videos" / "c-empty.mp4", 3)
    with pytest.raises(
      ValueError, match=r"2 videos that failed .* changed since; add --retry-fail"
    ):
      run(job(broken / "list.txt", out), Model(), QUIET, QUIET)
    assert run(job(broken / "list.txt", out, retry_failed=True), Model(), QUIET, QUIET)
    failed = lines((out / "errors.jsonl").read_bytes())
    assert [one["video"] for one in failed] == ["videos/a-text.mp4", "videos/d"]
    clean = broken / "clean"
    assert run(job(broken / "list.txt", clean), Model(), QUIET, QUIET)
    for folder in (out, clean):
      merge_videos(folder)
    assert (out / "annotations.json").read_bytes() == (clean / "annotations.json").read_bytes()

  def test_too_many_stop_the_job(self, broken):
    (broken / "e.mp4").rename(broken / "videos" / "e.mp4")
    failing = job(broken / "list.txt", broken / "out", max_error_rate=0.5)
    with pytest.raises(ValueError, match=r"3 of 5 videos failed, more than --max-error-rate 0\.5"):
      run(failing, Model(), QUIET, QUIET)
    assert job_files.finished_parts(broken / "out") == set(range(5))

  def test_a_full_disk_is_no_failure_of_the_video(self, videos, tmp_path, monkeypatch):
    def full(record, frame):
      raise OSError(28, "No space left on device")

    monkeypatch.setattr(video_records.VideoRecord, "add", full)
    with pytest.raises(OSError, match="No space left"):
      run(job(videos, tmp_path), Model(), QUIET, QUIET)
    assert not (tmp_path / "errors.jsonl").read_bytes()
    assert not list(tmp_path.rglob("*.partial"))

  def test_a_video_that_changes_while_it_is_tracked(self, videos, undisturbed, tmp_path):
    shutil.copytree(videos, tmp_path / "videos")
    path, model = tmp_path / "videos" / "a" / "clip2.mp4", Model()
    track = model.track

    def changing(source, prompts):
      for frame in track(source, prompts):
        if model.frames == 6:
          os.utime(path, (0, 0))
        yield frame

    model.track = changing
    assert not run(job(tmp_path / "videos", tmp_path / "out"), model, QUIET, QUIET)
    assert job_files.finished_parts(tmp_path / "out") == {0, 2, 3, 4}


def test_other_jobs_are_refused(videos, tmp_path):
  assert run(job(videos, tmp_path), Model(), QUIET, QUIET)
  before = files(tmp_path)
  other = Model()
  other.identity = "1"
  for changed, model, match in (
    (job(videos, tmp_path, ["cat"]), Model(), r"prompts changed of 5 videos \(a/clip0.mp4, "),
    (job(videos, tmp_path, part_size=2), Model(), "--part-size: 1 then, 2 now"),
    (job(videos, tmp_path), other, "the checkpoint: 0 then, 1 now"),
    (job(videos / "a", tmp_path), Model(), "5 files removed"),
  ):
    with pytest.raises(ValueError, match=match) as error:
      run(changed, model, QUIET, QUIET)
    assert "\n" not in str(error.value)
  assert files(tmp_path) == before


def test_changed_videos(videos, undisturbed, tmp_path):
  """A touched video is the same; one with another content is refused; new ones need --add."""
  shutil.copytree(videos, tmp_path / "videos")
  out = tmp_path / "out"
  assert run(job(tmp_path / "videos", out), Model(), QUIET, QUIET)
  os.utime(tmp_path / "videos" / "a" / "clip0.mp4", (1, 1))
  os.utime(tmp_path / "videos" / "c" / "frames" / "00001.png", (1, 1))
  model = Model()
  assert run(job(tmp_path / "videos", out), model, QUIET, QUIET)
  assert model.frames == 0
  write_clip(tmp_path / "videos" / "d.mp4", 3, 50)
  with pytest.raises(ValueError, match=r"1 file added \(d.mp4\)\); add --add"):
    run(job(tmp_path / "videos", out), Model(), QUIET, QUIET)
  assert run(job(tmp_path / "videos", out, add=True), model, QUIET, QUIET)
  assert model.frames == 3
  assert merge_videos(out)["videos"] == 6
  write_frames(tmp_path / "other", shift=9)
  shutil.copy(tmp_path / "other" / "00001.png", tmp_path / "videos" / "c" / "frames")
  with pytest.raises(ValueError, match=r"1 file modified \(c/frames\)"):
    run(job(tmp_path / "videos", out, add=True), Model(), QUIET, QUIET)


def test_memory_does_not_grow_with_a_video(videos, tmp_path, monkeypatch):
  """Records are copied into the part in small pieces, and sorted in small pieces."""
  sizes: list[int] = []
  write = part_files.Draft.write

  def measured(draft, data):
    sizes.append(len(data))
    return write(draft, data)

  monkeypatch.setattr("sam3_jax.utils.atomic_files._PIECE", 500)
  monkeypatch.setattr(part_files.Draft, "write", measured)
  first = videos / "a" / "clip0.mp4"
  (tmp_path / "list.txt").write_text(f"{tmp_path}/missing.mp4\n{first}\n")
  settings = {"part_size": 2}
  assert not run(job(tmp_path / "list.txt", tmp_path / "o", **settings), Model(), QUIET, QUIET)
  shutil.copy(first, tmp_path / "missing.mp4")
  assert run(job(tmp_path / "list.txt", tmp_path / "o", **settings), Model(), QUIET, QUIET)
  assert merge_videos(tmp_path / "o")["videos"] == 2
  assert max(sizes) < 1000 < len((tmp_path / "o" / "parts" / "part-000000.jsonl").read_bytes())


def test_damaged_records(videos, tmp_path):
  assert run(job(videos / "a" / "clip0.mp4", tmp_path), Model(), QUIET, QUIET)
  rows = lines((tmp_path / "parts" / "part-000000.jsonl").read_bytes())
  with pytest.raises(ValueError, match=r"the record of .*clip0.mp4 has fewer frames than it says"):
    list(video_records.split_videos(iter(rows[:-1])))
  path = tmp_path / "parts" / "part-000000.jsonl"
  path.write_bytes(path.read_bytes()[:-100])
  with pytest.raises(ValueError, match="is damaged; remove"):
    merge_videos(tmp_path)


def test_a_missing_package_or_tracker_is_reported_before_any_work(videos, tmp_path, monkeypatch):
  def missing():
    raise ImportError("videos need PyAV")

  monkeypatch.setattr(video_job, "import_av", missing)
  with pytest.raises(ImportError, match="videos need PyAV"):
    run(job(videos, tmp_path / "out"), Model(), QUIET, QUIET)
  assert not (tmp_path / "out").exists()
  assert run(job(videos / "c", tmp_path / "frames"), Model(), QUIET, QUIET)

  class Untrained(Model):
    @property
    def video_programs(self):
      raise ValueError("this checkpoint has no tracker")

  with pytest.raises(ValueError, match="this checkpoint has no tracker"):
    run(job(videos / "c", tmp_path / "out"), Untrained(), QUIET, QUIET)
  assert not (tmp_path / "out").exists()


def test_unfinished_parts_are_not_merged(videos, tmp_path):
  model = Model()
  run(job(videos, tmp_path), model, QUIET, QUIET, stopping=lambda: model.frames > 5)
  with pytest.raises(ValueError, match=r"4 of 5 parts in .* are not done yet"):
    merge_videos(tmp_path)
