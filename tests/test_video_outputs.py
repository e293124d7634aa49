"""What tracking writes: lines of tracks, overlay videos, and the formats of datasets."""

import errno
import json
import os

import av
import numpy as np
import pytest
from clips import frame_image
from pycocotools import mask as coco_mask
from tracked_frames import SIZE, mask, tracked, write_tracks

from sam3_jax.inputs.video import open_video
from sam3_jax.outputs import video_writer
from sam3_jax.outputs.colors import color
from sam3_jax.outputs.instances import Instances
from sam3_jax.outputs.masks import Masks
from sam3_jax.outputs.track_lines import TrackReader, TrackWriter, line_of
from sam3_jax.outputs.tracked_frame import TrackedFrame
from sam3_jax.outputs.video_overlay import OverlayWriter, draw_objects, write_overlay
from sam3_jax.outputs.video_writer import TICKS, VideoWriter, frames_written
from sam3_jax.utils.atomic_files import Draft

# pycocotools' decode with NumPy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ impl:DeprecationWarning")


def test_lines(tmp_path):
  path = tmp_path / "new" / "clip.tracks.jsonl"
  with TrackWriter(path) as tracks:
    tracks.write(tracked(0))
    assert path.read_bytes() == line_of(tracked(0))  # passed on as it is written
    tracks.write(tracked(1))
    tracks.sync()
    assert tracks.frames == 2
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  assert rows[1]["frame"] == 1
  assert rows[1]["time"] == 0.04
  assert rows[1]["size"] == [48, 80]
  first, _, last = rows[1]["objects"]
  assert first["id"] == 1
  assert first["score"] == 0.9
  assert first["bbox"] == [5, 3, 12, 10]
  assert first["area"] == 120
  assert (coco_mask.decode(first["segmentation"]) == mask(5, 3, 17, 13)).all()
  assert last["id"] == 7
  assert rows[0]["objects"][2]["area"] == 0


def test_lines_round_trip(tmp_path):
  path = write_tracks(tmp_path / "t.jsonl", [3, 0, 2, 1])  # as when tracking backwards too
  reader = TrackReader(path)
  assert len(reader) == 4
  assert reader.size == SIZE
  for index, frame in enumerate(reader):
    want = tracked(index)
    assert (frame.index, frame.time, frame.size) == (index, want.time, SIZE)
    assert (frame.instances.ids == want.instances.ids).all()
    assert (frame.instances.scores == want.instances.scores).all()
    assert (frame.instances.boxes == want.instances.boxes).all()
    assert (np.asarray(frame.instances.masks) == np.asarray(want.instances.masks)).all()
    assert line_of(frame) == line_of(want)


@pytest.mark.parametrize(
  "phrases", [("cat", "dog", "cat"), (None, "un \u00e9l\u00e9phant", None), ("", "x", "y"), ()]
)
def test_phrases_round_trip(tmp_path, phrases):
  path = write_tracks(tmp_path / "t.jsonl", range(2), phrases=phrases)
  for index, frame in enumerate(TrackReader(path)):
    assert frame.phrases == phrases
    assert line_of(frame) == line_of(tracked(index, phrases=phrases))
  objects = json.loads(path.read_text().splitlines()[0])["objects"]
  named = [one.get("phrase") for one in objects]
  assert named == list(phrases or (None,) * 3)
  assert [("phrase" in one) for one in objects] == [one is not None for one in named]


def test_all_phrases_none_are_no_phrases(tmp_path):
  path = write_tracks(tmp_path / "t.jsonl", [0], phrases=(None,) * 3)
  assert path.read_bytes() == line_of(tracked(0))
  assert [frame.phrases for frame in TrackReader(path)] == [()]


def test_objects_of_a_phrase():
  frame = tracked(1, phrases=("cat", None, "cat"))
  assert list(frame.of("cat").ids) == [1, 7]
  assert list(frame.of(None).ids) == [2]
  assert len(frame.of("dog")) == len(frame.of("")) == 0
  assert (frame.of("cat").masks[1] == frame.instances.masks[2]).all()
  assert frame.of("cat").scores.tolist() == frame.instances.scores[[0, 2]].tolist()
  frame = tracked(1)
  assert list(frame.of(None).ids) == [1, 2, 7]
  assert len(frame.of("cat")) == 0
  frame = tracked(1, ids=())
  assert len(frame.of(None)) == len(frame.of("cat")) == 0


@pytest.mark.parametrize("phrases", [("cat",), ("cat",) * 4])
def test_phrases_of_another_number_are_refused(phrases):
  match = f"an entry for each of 3 objects; got {len(phrases)}"
  with pytest.raises(ValueError, match=match):
    tracked(0, phrases=phrases)


@pytest.mark.parametrize("phrase", [None, 7, ["cat"], {"text": "cat"}, True])
def test_wrong_phrases_of_lines(tmp_path, phrase):
  path = write_tracks(tmp_path / "t.jsonl", [0], phrases=("cat",) * 3)
  row = json.loads(path.read_text())
  row["objects"][1]["phrase"] = phrase
  path.write_text(json.dumps(row) + "\n")
  with pytest.raises(ValueError, match=r"line 1 of .*: the phrase of object 2 is ") as error:
    TrackReader(path)
  assert repr(phrase) in str(error.value)


def test_lines_of_logits():
  """Masks on the decoder's grid are written over the frame."""
  grid = np.where(mask(10, 10, 30, 30)[::2, ::2], 5.0, -5.0).astype(np.float32)[None]
  found = Instances(np.array([1]), np.ones(1, np.float32), np.zeros((1, 4), np.float32),
                    Masks(grid, SIZE))  # fmt: skip
  row = json.loads(line_of(TrackedFrame(0, 0.0, SIZE, found)))
  assert (coco_mask.decode(row["objects"][0]["segmentation"]) == found.masks[0]).all()


def test_lines_are_cut_for_a_resume(tmp_path):
  path = write_tracks(tmp_path / "t.jsonl", range(6))
  whole = path.read_bytes()
  path.write_bytes(whole[:-20])  # killed within a line
  assert len(TrackReader(path)) == 5
  with TrackWriter(path, keep=4) as tracks:
    assert tracks.frames == 4
    for i in (4, 5):
      tracks.write(tracked(i))
  assert path.read_bytes() == whole
  path.write_bytes(whole[:-20])
  with pytest.raises(ValueError, match="has only 5 of the 6 frames to continue after: remove it"):
    TrackWriter(path, keep=6)
  assert path.read_bytes() == whole[:-20]
  TrackWriter(path).close()
  assert path.read_bytes() == b""


@pytest.mark.parametrize(
  ("line", "match"),
  [
    (b"[1]", "it must have frame, time, size and objects"),
    (b"{", "is not valid JSON"),
    (b'{"frame": -1, "time": 0, "size": [2, 2], "objects": []}', "its frame is -1"),
    (b'{"frame": 1, "time": 0, "size": [2, 0], "objects": []}', r"its size is \[2, 0\]"),
    (b'{"frame": 1, "time": 0, "size": [2, 2], "objects": [1]}', "each object must have id"),
    (b'{"frame": 1, "time": 0, "size": [2, 2], "objects": [{"id": 1, "score": 1, "bbox": [],'
     b' "segmentation": {"size": [2, 2], "counts": "9"}}]}', "its mask's runs cover"),
    (b'{"frame": 1, "time": 0, "size": [2, 2], "objects": []}', "has another size than line 1"),
  ],
)  # fmt: skip
def test_wrong_lines(tmp_path, line, match):
  path = write_tracks(tmp_path / "t.jsonl", [0])
  path.write_bytes(path.read_bytes() + line + b"\n")
  with pytest.raises(ValueError, match=match) as error:
    TrackReader(path)
  assert "line 2 of" in str(error.value)
  assert str(path) in str(error.value)


class Full:
  """A file on a full disk."""

  def __init__(self, file):
    self._file = file

  def __getattr__(self, name):
    return getattr(self._file, name)

  def write(self, data):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_full_disk(tmp_path):
  with TrackWriter(tmp_path / "t.jsonl") as tracks:
    tracks._file = Full(tracks._file)
    with pytest.raises(OSError, match=r"No space left on device: '.*t.jsonl'"):
      tracks.write(tracked(0))


# Videos


def stamps(path):
  with av.open(str(path)) as container:
    return [float(frame.pts * frame.time_base) for frame in container.decode(video=0)]


def test_overlay_video(tmp_path):
  path = tmp_path / "new" / "clip.sam3.mp4"
  times = [i * 1001 / 30000 for i in range(30)]
  with OverlayWriter(path, SIZE, fps=30000 / 1001) as video:
    for i, time in enumerate(times):
      frame = tracked(i)
      video.draw(frame_image(i, *SIZE), TrackedFrame(i, time, SIZE, frame.instances))
    assert not path.exists()
    video.finish()
  assert os.listdir(path.parent) == ["clip.sam3.mp4"]
  found = open_video(path)
  assert (found.size, found.length) == (SIZE, 30)
  assert found.fps == pytest.approx(30000 / 1001, rel=1e-6)
  assert stamps(path) == pytest.approx(times, abs=0.5 / TICKS)
  for frame in found:
    want = draw_objects(frame_image(frame.index, *SIZE), tracked(frame.index))
    off = np.abs(frame.image.astype(int) - want).mean()
    assert off < 10  # measured 6.9: colors are stored for 2 x 2 pixels


def test_variable_rate_and_pieces(tmp_path, monkeypatch):
  """Times vary, sizes are odd, pieces are joined, and the first frame is at 0 seconds."""
  monkeypatch.setattr(video_writer, "PIECE", 7)
  path, times = tmp_path / "v.mp4", [0.5 + 0.01 * i * i for i in range(30)]
  with VideoWriter(path, (33, 51)) as video:
    for i, time in enumerate(times):
      video.write(frame_image(i, 33, 51), time)
    assert len(os.listdir(tmp_path / "v.mp4.pieces")) == 5  # one of them a draft
    video.finish()
  assert stamps(path) == pytest.approx(np.array(times) - 0.5, abs=1 / TICKS)
  found = list(open_video(path))
  assert len(found) == 30
  assert found[0].image.shape == (34, 52, 3)
  for frame in found:
    off = np.abs(frame.image[:33, :51].astype(int) - frame_image(frame.index, 33, 51))
    assert off.mean() < 6  # measured 3.9
    assert np.abs(frame.image[33].astype(int) - frame.image[32]).mean() < 2  # measured 0.7


def test_video_resumes(tmp_path, monkeypatch):
  """Pieces are cut back to any frame, and the video is the same as without a stop."""
  monkeypatch.setattr(video_writer, "PIECE", 8)
  path = tmp_path / "v.mp4"
  with VideoWriter(path, SIZE) as video:  # interrupted in frame 20
    for i in range(20):
      video.write(frame_image(i, *SIZE), i / 25)
  assert frames_written(path) == 16
  assert not path.exists()
  with pytest.raises(ValueError, match="has only 16 of the 17 frames to continue after"):
    VideoWriter(path, SIZE, keep=17)
  (tmp_path / "v.mp4.pieces" / ".x.partial").write_bytes(b"left by a killed process")
  with VideoWriter(path, SIZE, keep=11) as video:
    assert frames_written(path) == 11
    for i in range(11, 14):
      video.write(frame_image(i, *SIZE), i / 25)
    assert video.checkpoint() == 14
  with VideoWriter(path, SIZE, keep=14) as video:
    for i in range(14, 30):
      video.write(frame_image(i, *SIZE), i / 25)
    video.finish()
  assert os.listdir(tmp_path) == ["v.mp4"]
  assert stamps(path) == pytest.approx(np.arange(30) / 25, abs=1e-9)
  for frame in open_video(path):
    assert np.abs(frame.image.astype(int) - frame_image(frame.index, *SIZE)).mean() < 4  # 2.3
  with VideoWriter(path, SIZE) as video:  # starts again; the old video stays until it is replaced
    video.write(frame_image(0, *SIZE), 0)
    assert len(stamps(path)) == 30
    video.finish()
  assert len(stamps(path)) == 1


def test_wrong_frames(tmp_path):
  with VideoWriter(tmp_path / "v.mp4", SIZE) as video:
    video.write(frame_image(0, *SIZE), 1)
    with pytest.raises(ValueError, match="times of frames must increase; got 1 after 1 seconds"):
      video.write(frame_image(0, *SIZE), 1)
    with pytest.raises(ValueError, match=r"are uint8 \[48, 80, 3\]; got uint8 \[64, 96, 3\]"):
      video.write(frame_image(0), 2)
  with VideoWriter(tmp_path / "none.mp4", SIZE) as video:
    video.finish()
  assert not (tmp_path / "none.mp4").exists()


def test_video_on_a_full_disk(tmp_path, monkeypatch):
  opened = Draft.__init__

  def open_full(draft, path):
    opened(draft, path)
    draft.file = Full(draft.file)

  def write():
    with VideoWriter(tmp_path / "v.mp4", SIZE) as video:
      for i in range(3):
        video.write(frame_image(i, *SIZE), i)
      video.checkpoint()

  with monkeypatch.context() as patch:
    patch.setattr(Draft, "__init__", open_full)
    with pytest.raises(OSError, match=r"No space left on device: '.*v.mp4.pieces/.*mp4'"):
      write()
  assert os.listdir(tmp_path / "v.mp4.pieces") == []
  write()
  with VideoWriter(tmp_path / "v.mp4", SIZE, keep=3) as video:
    monkeypatch.setattr(Draft, "__init__", open_full)
    with pytest.raises(OSError, match=r"No space left on device: '.*v.mp4'"):
      video.finish()
  assert os.listdir(tmp_path) == ["v.mp4.pieces"]
  assert frames_written(tmp_path / "v.mp4") == 3


def test_small_videos(tmp_path):
  for size in ((1, 1), (2, 3), (16, 5)):
    with VideoWriter(tmp_path / "v.mp4", size) as video:
      for i in range(3):
        video.write(frame_image(i, *size), i)
      video.finish()
    assert open_video(tmp_path / "v.mp4").size == tuple(side + side % 2 for side in size)


def test_overlay_of_tracks(tmp_path, monkeypatch):
  """Written from the file of tracks, in any order of its lines, also after an interruption."""
  monkeypatch.setattr(video_writer, "PIECE", 4)
  source = open_video(np.stack([frame_image(i, *SIZE) for i in range(20)]), fps=25)
  tracks = TrackReader(write_tracks(tmp_path / "t.jsonl", [9, 10, 11, 12, 13, 14, 8, 6, 5, 4]))
  path = tmp_path / "v.mp4"
  with OverlayWriter(path, SIZE) as video:
    for i in (4, 5, 6, 8, 9):
      video.draw(frame_image(i, *SIZE), tracked(i))
  assert frames_written(path) == 4
  write_overlay(source, tracks, path)
  assert stamps(path) == pytest.approx((np.array(tracks.frames) - 4) / 25, abs=1e-9)
  for frame, index in zip(open_video(path), tracks.frames, strict=True):
    want = draw_objects(frame_image(index, *SIZE), tracked(index))
    assert np.abs(frame.image.astype(int) - want).mean() < 10
  with pytest.raises(ValueError, match="frame 4 is after the end"):
    write_overlay(open_video(np.stack([frame_image(0, *SIZE)] * 4)), tracks, path)


def test_colors_are_stable():
  """An id has the same color in every frame, whatever else is in it."""
  image = np.full((*SIZE, 3), 128, np.uint8)
  for ids in ((1, 2, 7), (7,), (2, 7)):
    drawn = draw_objects(image, tracked(1, ids))
    x, y = (4 * 7 + 1) % 60, 21
    inside = drawn[y + 5, x + 6].astype(int)
    want = 0.55 * 128 + 0.45 * np.array(color(6))
    assert np.abs(inside - want).max() < 12
  assert (draw_objects(image, tracked(0, ())) == 128).all()
  assert (image == 128).all()
  with pytest.raises(ValueError, match="frame 0 has objects of a frame of 80 x 48, but the image"):
    draw_objects(frame_image(0), tracked(0))
