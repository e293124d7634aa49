"""Annotation files of videos: what is read, and faults with the names of video and annotation."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from sam3_jax.datasets import video_annotations
from sam3_jax.outputs.rle import encode
from sam3_jax.utils.notes import Notes

HEIGHT, WIDTH, FRAMES = 20, 30, 3


def rectangle(x0, y0, x1, y1):
  mask = np.zeros((HEIGHT, WIDTH), bool)
  mask[y0:y1, x0:x1] = True
  return mask


SQUARE = rectangle(5, 5, 10, 10)
POLYGON = [[5, 5, 10, 5, 10, 10, 5, 10]]
COUNTS = {"size": [HEIGHT, WIDTH], "counts": [0, 1, HEIGHT * WIDTH - 1]}


def video(number=1, name="a", **values):
  names = [f"{name}/{t:05d}.jpg" for t in range(FRAMES)]
  base = {"id": number, "file_names": names, "width": WIDTH, "height": HEIGHT, "length": FRAMES}
  return base | values


def one(number=1, video_id=1, masks=None, **values):
  masks = [encode(SQUARE), None, encode(SQUARE)] if masks is None else masks
  base = {"id": number, "video_id": video_id, "category_id": 1, "segmentations": masks}
  return base | {"iscrowd": 0} | values


def content(*objects, videos=None, **values):
  base = {"videos": videos or [video()], "annotations": list(objects)}
  return base | {"categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]} | values


@pytest.fixture
def read(tmp_path):
  def to_videos(values, **options):
    path = tmp_path / "a.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return video_annotations.read(path, **options)

  return to_videos


def test_masks_and_names(read):
  [found] = read(content(one(), one(7, category_id=2, masks=[None, POLYGON, COUNTS])))
  assert (found.id, found.name, len(found)) == (1, "a", 3)
  assert (found.width, found.height) == (WIDTH, HEIGHT)
  first, second = found.objects
  assert (first.id, first.phrase, first.first) == (1, "cat", 0)
  assert (second.id, second.phrase, second.first, second.crowd) == (7, "dog", 1, False)
  assert [np.array_equal(found.mask(first, t), SQUARE) for t in range(3)] == [True, False, True]
  assert not found.mask(first, 1).any()
  assert found.mask(first, 1).dtype == bool
  assert np.array_equal(found.mask(second, 1), SQUARE)
  assert found.mask(second, 2).sum() == 1
  assert found.phrases == ("cat", "dog")


def test_phrases_of_pairs_and_annotations(read):
  """SA-Co's fields come before the categories."""
  pairs = [
    {"id": 1, "video_id": 1, "category_id": 2, "noun_phrase": "the dog", "num_masklets": 0},
    {"id": 2, "video_id": 1, "category_id": 1, "noun_phrase": "a cat", "num_masklets": 1},
  ]
  [found] = read(content(one(noun_phrase="a cat"), video_np_pairs=pairs))
  assert found.phrases == ("the dog", "a cat")
  assert found.objects[0].phrase == "a cat"
  del (values := one())["category_id"]
  [found] = read(content(values))
  assert found.objects[0].phrase == ""
  assert found.phrases == ()


def test_empty_masks_are_absence(read):
  empty = encode(np.zeros((HEIGHT, WIDTH), bool))
  notes = Notes()
  [found] = read(
    content(one(masks=[None, empty, encode(SQUARE)]), one(2, masks=[None, empty, None])),
    notes=notes,
  )
  assert [target.id for target in found.objects] == [1]
  assert found.objects[0].first == 2
  assert notes.lines() == [
    "note: annotations without a mask in any frame, left out: 1 (annotation 2 of video 1 (a))"
  ]
  with pytest.warns(UserWarning, match="without a mask in any frame"):
    read(content(one(2, masks=[None] * 3)))


def test_several_videos_in_the_order_of_the_file(read):
  found = read(content(one(1, 9), one(2, 1), videos=[video(9, "b"), video(1, "a/deep", width=30)]))
  assert [(each.id, each.name, len(each.objects)) for each in found] == [
    (9, "b", 1),
    (1, "a/deep", 1),
  ]


@pytest.mark.parametrize(
  ("values", "message"),
  [
    (
      content(one(masks=[None] * 2)),
      r"annotation 1 of video 1 \(a\): segmentations must be a list",
    ),
    (content(one(masks="x")), r"for each of 3 frames; got 'x'"),
    (
      content(one(masks=[None, {"size": [5, 5], "counts": "0"}, None])),
      r"annotation 1 of video 1 \(a\), frame 1: its mask's size is \[5, 5\], but",
    ),
    (content(one(masks=[3, None, None])), r"video 1 \(a\), frame 0: it has no segmentation"),
    (
      content(one(masks=[None, None, {"size": [HEIGHT, WIDTH], "counts": "!!"}])),
      r"annotation 1 of video 1 \(a\), frame 2: its mask's run lengths are damaged",
    ),
    (content(one(video_id=4)), "annotation 1: there is no video 4"),
    (content(one(video_id="1")), "annotation 1: video_id is the string '1'; write the number 1"),
    (content(one(), one()), "annotation 1: this id occurs twice"),
    (content(one(category_id=5)), r"annotation 1 of video 1 \(a\): there is no category 5"),
    (content(one(noun_phrase=5)), "noun_phrase must be a string; got 5"),
    (content(one(iscrowd="0")), "iscrowd is the string '0'"),
    (content({"video_id": 1}), "annotation number 1: id must be a whole number; got None"),
    (content(videos=[video(), video()]), "video 1: this id occurs twice"),
    (
      content(videos=[video(file_names=[])]),
      r"video 1: file_names must be a list of frames; got \[\]",
    ),
    (content(videos=[video(file_names=[1])]), "video 1: file_names must be a list"),
    (content(videos=[video(length=4)]), "video 1: length is 4, but file_names has 3 frames"),
    (content(videos=[video(width=0)]), "width and height must be positive; got 0 x 20"),
    (content(videos=[video(height=None)]), "video 1: height must be a whole number; got None"),
    (content(videos=[video(video_name=3)]), "video 1: video_name must be a string; got 3"),
    (content(one(), categories=[{"id": 1}]), "it must have an id and a name"),
    (content(one(), categories=3), "categories must be a list; got 3"),
    (content(one(), video_np_pairs=3), "video_np_pairs must be a list; got 3"),
    (content(one(), video_np_pairs=[{"video_id": 1}]), "must have a video_id and a noun_phrase"),
    (content(one(), video_np_pairs=[{"video_id": 7, "noun_phrase": "x"}]), "there is no video 7"),
    ({"images": [], "annotations": []}, "is not an annotation file of videos; give a YouTube-VIS"),
    ({"videos": [], "annotations": []}, "it has no videos"),
    ({"videos": [3], "annotations": []}, "is not an annotation file of videos"),
    ("[", "is not valid JSON"),
  ],
)
def test_faults_are_one_line(read, values, message, tmp_path):
  with pytest.raises(ValueError, match=message) as error:
    read(values)
  assert "\n" not in str(error.value)
  assert str(tmp_path / "a.json") in str(error.value)


def test_faults_are_reported_together(read):
  with pytest.raises(ValueError, match="3 faults: ") as error:
    read(content(one(masks=[]), one(2, video_id=5), one(3, category_id=7)))
  for name in ("annotation 1", "annotation 2", "annotation 3"):
    assert name in str(error.value)


def test_missing_file(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"no annotation file .*none.json: check the path"):
    video_annotations.read(tmp_path / "none.json")


@pytest.fixture
def stored(tmp_path, read):
  """A video with its frames."""
  folder = tmp_path / "JPEGImages" / "a"
  folder.mkdir(parents=True)
  for t in range(FRAMES):
    Image.fromarray(np.full((HEIGHT, WIDTH, 3), 60 * t, np.uint8)).save(folder / f"{t:05d}.jpg")
  return read(content(one())), tmp_path


def test_frames(stored):
  videos, folder = stored
  frames = video_annotations.frame_folder(folder / "a.json")
  assert frames == folder / "JPEGImages"
  assert video_annotations.check(videos, frames) == []
  images = list(videos[0].frames(frames))
  assert [image.shape for image in images] == [(HEIGHT, WIDTH, 3)] * 3
  assert [int(image[0, 0, 0]) for image in images] == [0, 60, 120]
  shutil.move(folder / "JPEGImages", folder / "other")
  assert video_annotations.frame_folder(folder / "a.json") == folder


def test_faults_of_frames(stored):
  videos, folder = stored
  frames = folder / "JPEGImages"
  (frames / "a/00000.jpg").unlink()
  (frames / "a/00001.jpg").write_bytes(b"no image")
  Image.fromarray(np.zeros((9, 8, 3), np.uint8)).save(frames / "a/00002.jpg")
  missing, damaged, size = video_annotations.check(videos, frames)
  assert missing == f"{frames}/a/00000.jpg: there is no such frame of video 1 (a)"
  assert str(frames / "a/00001.jpg") in damaged
  assert size == (
    f"{frames}/a/00002.jpg is displayed as 8 x 9, but video 1 (a) is {WIDTH} x {HEIGHT} "
    "(width x height)"
  )
  (frames / "a/00000.jpg").write_bytes((frames / "a/00002.jpg").read_bytes())
  with pytest.raises(ValueError, match=r"00000.jpg is displayed as 8 x 9, but video 1"):
    list(videos[0].frames(frames))
