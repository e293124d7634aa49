"""Tracks as YouTube-VIS, CocoVID, MOTChallenge and DAVIS files."""

import json
import os

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from tracked_frames import SIZE, mask, tracked, write_tracks

from sam3_jax.outputs.track_formats import DAVIS_PALETTE, FORMATS, convert_tracks
from sam3_jax.outputs.track_lines import TrackWriter

# pycocotools' decode with NumPy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ impl:DeprecationWarning")


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


@pytest.mark.parametrize(
  ("phrases", "names", "of_object"),
  [
    (("dog", "cat", "dog"), ["dog", "cat"], {1: 1, 2: 2, 7: 1}),
    ((None, "a cat", None), ["object", "a cat"], {1: 1, 2: 2, 7: 1}),
    (("cat", None, "object"), ["cat", "object"], {1: 1, 2: 2, 7: 2}),
    (("", "x", None), ["", "x", "object"], {1: 1, 2: 2, 7: 3}),
  ],
)
def test_categories_are_phrases(tmp_path, phrases, names, of_object):
  for to, key in (("ytvis", "id"), ("coco-vid", "instance_id")):
    path = convert(tmp_path, to, phrases=phrases)
    data = json.loads(path.read_text())
    path.unlink()
    assert data["categories"] == [{"id": i, "name": one} for i, one in enumerate(names, start=1)]
    assert {one[key]: one["category_id"] for one in data["annotations"]} == of_object


def test_categories_of_objects_that_appear_later(tmp_path):
  """Categories are in order of first occurrence; `category` is for objects without a phrase."""
  path = tmp_path / "clip.tracks.jsonl"
  with TrackWriter(path) as tracks:
    tracks.write(tracked(0, ids=(2,), phrases=("ball",)))
    tracks.write(tracked(1, ids=(1, 2), phrases=("player", "ball")))
  convert_tracks(path, "ytvis", tmp_path / "y.json", name="clip", category="thing")
  data = json.loads((tmp_path / "y.json").read_text())
  assert data["categories"] == [{"id": 1, "name": "ball"}, {"id": 2, "name": "player"}]
  assert [(one["id"], one["category_id"]) for one in data["annotations"]] == [(1, 2), (2, 1)]
  write_tracks(path, [0])
  convert_tracks(path, "coco-vid", tmp_path / "c.json", name="clip", category="thing")
  data = json.loads((tmp_path / "c.json").read_text())
  assert data["categories"] == [{"id": 1, "name": "thing"}]


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
