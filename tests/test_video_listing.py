"""The list of videos of a job: directories, patterns and lists, and their faults."""

import json
import os

import pytest
from video_batches import write_frames

from sam3_jax.batch.inputs import common_phrases
from sam3_jax.batch.local_video import identify_video, read_identity
from sam3_jax.batch.video_inputs import list_videos
from sam3_jax.inputs.prompts import Prompt
from sam3_jax.inputs.video_listing import find_videos
from sam3_jax.utils.notes import ListingNotes

CAT = (Prompt(text="cat"),)


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """The working directory, with videos by their names only."""
  monkeypatch.chdir(tmp_path)
  for name in ("v/b.mp4", "v/a.MKV", "v/sub/c.webm", "v/notes.txt", "v/.hidden.mp4", "v/poster.jpg",
               "v/b.sam3.mp4"):  # fmt: skip
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
  write_frames(tmp_path / "v" / "frames.1")
  (tmp_path / "v" / "frames.1" / "groundtruth.txt").write_text("x")
  (tmp_path / "v" / "empty").mkdir()
  return tmp_path


def names(given, notes=None):
  return [found.name for found in find_videos(str(given), notes or ListingNotes())]


def test_directory(folder):
  notes = ListingNotes()
  assert names("v", notes) == ["a.MKV", "b.mp4", "frames.1", "sub/c.webm"]
  assert notes.line() == (
    "skipped 5 files: 1 .jpg, 1 .txt, 1 beside frames, 1 hidden, 1 result of track"
  )


def test_directory_of_frames(folder):
  assert [tuple(one) for one in find_videos("v/frames.1", ListingNotes())] == [
    ("frames.1", "v/frames.1")
  ]
  os.chdir("v/frames.1")
  assert names(".") == ["frames.1"]


def test_files_and_patterns(folder):
  assert names("v/b.mp4") == ["v/b.mp4"]
  assert names("v/notes.txt") == ["v/notes.txt"]  # a file given by name has any suffix
  assert names("v/*.m*") == ["v/b.mp4"]
  with pytest.raises(FileNotFoundError, match=r"there is no directory, file or pattern v/x.mp4"):
    names("v/x.mp4")


def test_lists(folder):
  lines = ["v/b.mp4", "", "  v/frames.1 ", "v/./b.mp4", "v/missing.mp4"]
  (folder / "list.txt").write_text("\ufeff" + "\n".join(lines))
  notes = ListingNotes()
  inputs = list_videos("list.txt", CAT, notes)
  assert [one.name for one in inputs] == ["v/b.mp4", "v/frames.1", "v/missing.mp4"]
  assert all(one.prompts == CAT for one in inputs)
  assert inputs[0].identity.size == 1
  assert inputs[2].identity is None
  assert notes.line() == "1 video does not exist (v/missing.mp4)"


def test_lists_with_prompts(folder):
  lines = [{"video": "v/b.mp4", "prompts": ["dog", {"text": "a cat"}]}, {"video": "v/a.MKV"},
           {"video": "v/b.mp4", "prompts": ["dog", "ball"]}]  # fmt: skip
  (folder / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
  first, second = list_videos("list.jsonl", CAT)
  assert [one.text for one in first.prompts] == ["dog", "a cat", "ball"]
  assert second.prompts == CAT
  with pytest.raises(ValueError, match=r"1 video has no prompts \(v/a.MKV\), and neither --text"):
    list_videos("list.jsonl", ())


@pytest.mark.parametrize(
  ("line", "match"),
  [
    ({"image": "a.mp4"}, r'a line must be \{"video": "a.mp4", "prompts": \["player"'),
    ({"video": 1}, "a line must be"),
    ({"video": "a.mp4", "frames": 2}, r"unknown \['frames'\]; a line has only video and prompts"),
    ({"video": "a.mp4", "prompts": []}, "prompts must be a list"),
    ({"video": "a\0.mp4"}, "cannot be the name of a file"),
    ({"video": "a.mp4", "prompts": [{"boxes": [[1, 1, 2, 2]]}]}, "videos have phrases only"),
    ({"video": "a.mp4", "prompts": [{"points": [[1, 1]]}]}, "videos have phrases only"),
    ({"video": "https://host/a.mp4"}, "is on a web server; add --allow-https"),
  ],
)
def test_faulty_lines(folder, line, match):
  (folder / "list.jsonl").write_text(json.dumps(line))
  with pytest.raises(ValueError, match=match) as error:
    list_videos("list.jsonl", CAT)
  assert "\n" not in str(error.value)


def test_no_videos(folder):
  with pytest.raises(ValueError, match=r"there is no video in v/empty; check --videos"):
    list_videos("v/empty", CAT)
  with pytest.raises(FileNotFoundError, match=r"there is no list other.txt; check --videos"):
    list_videos("other.txt", CAT)
  (folder / "list.txt").write_bytes(b"\xff\xfe\xff")
  with pytest.raises(ValueError, match=r"list.txt is not UTF-8 text"):
    list_videos("list.txt", CAT)


def test_common_phrases(folder):
  (folder / "phrases.txt").write_text("cat\nred ball\n")
  found = common_phrases("phrases.txt", ["dog", " cat "])
  assert [one.text for one in found] == ["cat", "red ball", "dog"]
  assert common_phrases(None) == ()
  with pytest.raises(ValueError, match="--text is empty; give a phrase"):
    common_phrases(None, [" "])


def test_identities_of_frames(folder):
  """They tell all versions of a directory apart, and read its content only when asked."""
  frames = folder / "v" / "frames.1"
  before = identify_video(frames)
  [item] = list_videos("v/frames.1", CAT)
  assert item.identity == before
  content = read_identity(item)
  assert content.same_stat(before)
  os.utime(frames / "00001.png", (1, 1))
  assert not identify_video(frames).same_stat(before)
  assert read_identity(item).sha256 == content.sha256
  os.rename(frames / "00001.png", frames / "00009.png")
  assert read_identity(item).sha256 != content.sha256
  (frames / "groundtruth.txt").write_text("other")
  assert identify_video(folder / "missing") is None
