"""What tracking writes: lines of tracks, overlay videos, and the formats of datasets."""

import errno
import json
import os

import av
import numpy as np
import pytest
from clips import picture
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from sam3_jax.inputs.video import open_video
from sam3_jax.outputs import video_writer
from sam3_jax.outputs.colors import color
from sam3_jax.outputs.instances import Instances
from sam3_jax.outputs.masks import Masks, RleMasks
from sam3_jax.outputs.rle import encode
from sam3_jax.outputs.track_formats import DAVIS_PALETTE, FORMATS, convert_tracks
from sam3_jax.outputs.track_lines import TrackReader, TrackWriter, line_of
from sam3_jax.outputs.tracked_frame import TrackedFrame
from sam3_jax.outputs.video_overlay import OverlayWriter, draw_objects, write_overlay
from sam3_jax.outputs.video_writer import TICKS, VideoWriter, frames_written
from sam3_jax.utils.atomic_files import Draft

# pycocotools' decode with NumPy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ impl:DeprecationWarning")

SIZE = (48, 80)


def mask(x0, y0, x1, y1):
  found = np.zeros(SIZE, bool)
  found[y0:y1, x0:x1] = True
  return found


def tracked(index, ids=(1, 2, 7), rate=25) -> TrackedFrame:
  """A frame with squares that move; object 7 is hidden in even frames."""
  masks = []
  for one in ids:
    x, y = (4 * one + index) % 60, 3 * one % 30
    hidden = one == 7 and index % 2 == 0
    masks.append(mask(x, y, x + 12, y + 10) if not hidden else np.zeros(SIZE, bool))
  boxes = [[x.min(), y.min(), x.max() + 1, y.max() + 1] if len(x) else [0] * 4
           for y, x in map(np.nonzero, masks)]  # fmt: skip
  scores = np.array([0.9 - 0.1 * k for k in range(len(ids))], np.float32)
  rles = RleMasks([encode(one) for one in masks], SIZE)
  boxes = np.array(boxes, np.float32).reshape(-1, 4)
  return TrackedFrame(index, index / rate, SIZE, Instances(np.array(ids), scores, boxes, rles))


def write_tracks(path, indices=range(6), **options):
  with TrackWriter(path) as tracks:
    for i in indices:
      tracks.write(tracked(i, **options))
  return path


# Lines of tracks


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
      video.draw(picture(i, *SIZE), TrackedFrame(i, time, SIZE, frame.instances))
    assert not path.exists()
    video.finish()
  assert os.listdir(path.parent) == ["clip.sam3.mp4"]
  found = open_video(path)
  assert (found.size, found.length) == (SIZE, 30)
  assert found.fps == pytest.approx(30000 / 1001, rel=1e-6)
  assert stamps(path) == pytest.approx(times, abs=0.5 / TICKS)
  for frame in found:
    want = draw_objects(picture(frame.index, *SIZE), tracked(frame.index))
    off = np.abs(frame.image.astype(int) - want).mean()
    assert off < 10  # measured 6.9: colours are stored for 2 x 2 pixels


def test_variable_rate_and_pieces(tmp_path, monkeypatch):
  """Times vary, sizes are odd, pieces are joined, and the first frame is at 0 seconds."""
  monkeypatch.setattr(video_writer, "PIECE", 7)
  path, times = tmp_path / "v.mp4", [0.5 + 0.01 * i * i for i in range(30)]
  with VideoWriter(path, (33, 51)) as video:
    for i, time in enumerate(times):
      video.write(picture(i, 33, 51), time)
    assert len(os.listdir(tmp_path / "v.mp4.pieces")) == 5  # one of them a draft
    video.finish()
  assert stamps(path) == pytest.approx(np.array(times) - 0.5, abs=1 / TICKS)
  found = list(open_video(path))
  assert len(found) == 30
  assert found[0].image.shape == (34, 52, 3)
  for frame in found:
    off = np.abs(frame.image[:33, :51].astype(int) - picture(frame.index, 33, 51))
    assert off.mean() < 6  # measured 3.9
    assert np.abs(frame.image[33].astype(int) - frame.image[32]).mean() < 2  # measured 0.7


def test_video_resumes(tmp_path, monkeypatch):
  """Pieces are cut back to any frame, and the video is the same as without a stop."""
  monkeypatch.setattr(video_writer, "PIECE", 8)
  path = tmp_path / "v.mp4"
  with VideoWriter(path, SIZE) as video:  # interrupted in frame 20
    for i in range(20):
      video.write(picture(i, *SIZE), i / 25)
  assert frames_written(path) == 16
  assert not path.exists()
  with pytest.raises(ValueError, match="has only 16 of the 17 frames to continue after"):
    VideoWriter(path, SIZE, keep=17)
  (tmp_path / "v.mp4.pieces" / ".x.partial").write_bytes(b"left by a killed process")
  with VideoWriter(path, SIZE, keep=11) as video:
    assert frames_written(path) == 11
    for i in range(11, 14):
      video.write(picture(i, *SIZE), i / 25)
    assert video.checkpoint() == 14
  with VideoWriter(path, SIZE, keep=14) as video:
    for i in range(14, 30):
      video.write(picture(i, *SIZE), i / 25)
    video.finish()
  assert os.listdir(tmp_path) == ["v.mp4"]
  assert stamps(path) == pytest.approx(np.arange(30) / 25, abs=1e-9)
  for frame in open_video(path):
    assert np.abs(frame.image.astype(int) - picture(frame.index, *SIZE)).mean() < 4  # 2.3
  with VideoWriter(path, SIZE) as video:  # starts again; the old video stays until it is replaced
    video.write(picture(0, *SIZE), 0)
    assert len(stamps(path)) == 30
    video.finish()
  assert len(stamps(path)) == 1


def test_wrong_frames(tmp_path):
  with VideoWriter(tmp_path / "v.mp4", SIZE) as video:
    video.write(picture(0, *SIZE), 1)
    with pytest.raises(ValueError, match="times of frames must increase; got 1 after 1 seconds"):
      video.write(picture(0, *SIZE), 1)
    with pytest.raises(ValueError, match=r"are uint8 \[48, 80, 3\]; got uint8 \[64, 96, 3\]"):
      video.write(picture(0), 2)
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
        video.write(picture(i, *SIZE), i)
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
        video.write(picture(i, *size), i)
      video.finish()
    assert open_video(tmp_path / "v.mp4").size == tuple(side + side % 2 for side in size)


def test_overlay_of_tracks(tmp_path, monkeypatch):
  """Written from the file of tracks, in any order of its lines, also after an interruption."""
  monkeypatch.setattr(video_writer, "PIECE", 4)
  source = open_video(np.stack([picture(i, *SIZE) for i in range(20)]), fps=25)
  tracks = TrackReader(write_tracks(tmp_path / "t.jsonl", [9, 10, 11, 12, 13, 14, 8, 6, 5, 4]))
  path = tmp_path / "v.mp4"
  with OverlayWriter(path, SIZE) as video:
    for i in (4, 5, 6, 8, 9):
      video.draw(picture(i, *SIZE), tracked(i))
  assert frames_written(path) == 4
  write_overlay(source, tracks, path)
  assert stamps(path) == pytest.approx((np.array(tracks.frames) - 4) / 25, abs=1e-9)
  for frame, index in zip(open_video(path), tracks.frames, strict=True):
    want = draw_objects(picture(index, *SIZE), tracked(index))
    assert np.abs(frame.image.astype(int) - want).mean() < 10
  with pytest.raises(ValueError, match="frame 4 is after the end"):
    write_overlay(open_video(np.stack([picture(0, *SIZE)] * 4)), tracks, path)


def test_colours_are_stable():
  """An id has the same colour in every frame, whatever else is in it."""
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
    draw_objects(picture(0), tracked(0))


# Formats


def convert(tmp_path, to, indices=range(6), **options):
  tracks = write_tracks(tmp_path / "clip.tracks.jsonl", indices, **options)
  path = tmp_path / f"clip{FORMATS[to].suffix}"
  convert_tracks(tracks, to, path, name="clip")
  assert sorted(os.listdir(tmp_path)) == sorted([path.name, tracks.name])
  return path


def visible(index, one):
  found = tracked(index).instances
  return found.masks[list(found.ids).index(one)]


def test_ytvis(tmp_path):
  data = json.loads(convert(tmp_path, "ytvis").read_text())
  (video,) = data["videos"]
  assert (video["height"], video["width"], video["length"]) == (48, 80, 6)
  assert video["file_names"][5] == "clip/00005.jpg"
  assert data["categories"] == [{"id": 1, "name": "object"}]
  assert [one["id"] for one in data["annotations"]] == [1, 2, 7]
  for one in data["annotations"]:
    assert len(one["segmentations"]) == len(one["bboxes"]) == len(one["areas"]) == 6
    assert one["score"] == pytest.approx({1: 0.9, 2: 0.8, 7: 0.7}[one["id"]])
    for i in range(6):
      want = visible(i, one["id"])
      if not want.any():
        assert one["segmentations"][i] is one["bboxes"][i] is one["areas"][i] is None
        continue
      assert (coco_mask.decode(one["segmentations"][i]) == want).all()
      assert one["areas"][i] == want.sum()
      assert one["bboxes"][i] == coco_mask.toBbox(one["segmentations"][i]).tolist()


def test_coco_vid(tmp_path, capsys):
  coco = COCO(str(convert(tmp_path, "coco-vid", [4, 2, 0, 3])))
  data = coco.dataset
  assert [image["frame_id"] for image in data["images"]] == [0, 2, 3, 4]
  assert data["images"][1]["file_name"] == "clip/00002.jpg"
  assert data["images"][1]["time"] == 0.08
  assert data["videos"] == [{"id": 1, "name": "clip", "width": 80, "height": 48}]
  assert len(coco.anns) == 9  # object 7 is hidden three times
  for one in coco.anns.values():
    image = coco.imgs[one["image_id"]]
    assert one["video_id"] == image["video_id"] == 1
    assert (coco.annToMask(one) == visible(image["frame_id"], one["instance_id"])).all()


def test_mot(tmp_path):
  rows = np.loadtxt(convert(tmp_path, "mot"), delimiter=",")
  assert rows.shape == (15, 10)
  assert rows[0].tolist() == [1, 1, 5, 4, 12, 10, 0.9, -1, -1, -1]  # x 4, y 3 of frame 0, from 1
  for frame, one, left, top, width, height, *_ in rows.astype(int).tolist():
    box = mask(left - 1, top - 1, left - 1 + width, top - 1 + height)
    assert (box == visible(frame - 1, one)).all()


def test_davis(tmp_path):
  path = convert(tmp_path, "davis-png", [0, 1, 12])
  assert sorted(os.listdir(path)) == ["00000.png", "00001.png", "00012.png"]
  for index in (0, 1, 12):
    image = Image.open(path / f"{index:05d}.png")
    assert image.mode == "P"
    assert bytes(image.getpalette()) == DAVIS_PALETTE
    want = np.zeros(SIZE, np.uint8)
    for one in (7, 2, 1):  # scores decrease with ids
      want[visible(index, one)] = one
    assert (np.asarray(image) == want).all()
  assert DAVIS_PALETTE[3 * 9 : 3 * 10] == bytes([191, 0, 0])
  assert DAVIS_PALETTE[-3:] == bytes([255] * 3)
  convert_tracks(tmp_path / "clip.tracks.jsonl", "davis-png", path, name="clip")  # replaces it
  assert len(os.listdir(path)) == 3
  assert len(os.listdir(tmp_path)) == 2


@pytest.mark.parametrize("to", FORMATS)
def test_no_objects_and_no_frames(tmp_path, to):
  for indices in ([], [0, 1]):
    convert(tmp_path, to, indices, ids=())


def test_formats_refuse(tmp_path):
  tracks = write_tracks(tmp_path / "t.jsonl", ids=(0, 300))
  with pytest.raises(ValueError, match=r"davis-png has ids from 1 to 255, but .* has the id 300"):
    convert_tracks(tracks, "davis-png", tmp_path / "d", name="clip")
  with pytest.raises(ValueError, match=r"mot has ids from 1, but .* has the id 0"):
    convert_tracks(tracks, "mot", tmp_path / "m", name="clip")
  with pytest.raises(ValueError, match="the format 'yolo' is unknown; choose one of ytvis, coco-"):
    convert_tracks(tracks, "yolo", tmp_path / "y", name="clip")
  assert os.listdir(tmp_path) == ["t.jsonl"]
