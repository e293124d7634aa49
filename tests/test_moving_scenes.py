"""Moving scenes: masks match the frames, objects really move, hide and return, files are valid."""

import contextlib
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from sam3_jax.cli.main import main
from sam3_jax.datasets import video_annotations
from sam3_jax.datasets.synthetic import (
  drawings,
  motion,
  moving_layers,
  moving_scene_files,
  moving_scenes,
)
from sam3_jax.evaluation.concept_tracks import ConceptTrack
from sam3_jax.evaluation.score_concepts import ConceptScorer

# pycocotools' own, with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SIZE, FRAMES, COUNT = (96, 128), 24, 24


def scene(*seed: int, size=SIZE, **options) -> moving_scenes.MovingScene:
  return moving_scenes.compose(np.random.default_rng(seed), size=size, **options)


@pytest.fixture(scope="module")
def many():
  """Scenes, each with its owners [t, h, w]."""
  made = [scene(8, number, augment=number % 2 / 2) for number in range(COUNT)]
  return [(one, np.stack([frame.owners for frame in one])) for one in made]


def visible(owners, count):
  """Visible pixels of each object in each frame [n, t]."""
  return np.array([(owners == index).sum(axis=(1, 2)) for index in range(count)])


def recompose(made, t):
  """A frame and its masks, drawn with floats on a canvas so large that nothing is clipped."""
  edge, (height, width), camera = 400, made.size, made._camera[t]
  backdrop = made._backdrop[camera[1] : camera[1] + height, camera[0] : camera[0] + width]
  image = np.pad(backdrop.astype(float), ((edge, edge), (edge, edge), (0, 0)))
  owners, index = np.full(image.shape[:2], -1), 0
  for layer in made._layers:
    patch, (top, left) = layer.place(t, camera)
    rows, columns = patch.mask.shape
    here = np.s_[top + edge : top + edge + rows, left + edge : left + edge + columns]
    alpha = patch.pixels[..., 3:] / 255
    image[here] = np.minimum(patch.pixels[..., :3] + image[here] * (1 - alpha), 255)
    owners[here][patch.mask] = -1 if layer.concept is None else index
    index += layer.concept is not None
  inside = np.s_[edge : edge + height, edge : edge + width]
  return image[inside], owners[inside]


class TestCompose:
  @pytest.mark.parametrize("seed", range(6))
  def test_masks_match_the_visible_pixels(self, seed):
    made = scene(seed, augment=seed % 2)
    for t in (0, 7, 23):
      image, owners = recompose(made, t)
      frame = made[t]
      assert np.array_equal(frame.owners, owners)
      # Rounded once for each layer.
      assert np.abs(frame.image - image).max() <= 2

  def test_pixels_change_where_an_object_is(self):
    """A frame without an object differs from the frame with it in the mask, and near its edges."""
    made = scene(3, objects=2)
    frame = made[5]
    top = len(made.concepts) - 1
    last = max(k for k, layer in enumerate(made._layers) if layer.concept is not None)
    layers = made._layers[:last] + made._layers[last + 1 :]
    without = dataclasses.replace(made, _layers=layers)[5]
    changed = (frame.image != without.image).any(axis=2)
    assert changed[frame.mask(top)].mean() > 0.9
    grown = np.pad(frame.mask(top), 3)
    near = np.any(
      [np.roll(grown, (y, x), (0, 1)) for y in range(-3, 4) for x in range(-3, 4)], axis=0
    )
    assert not (changed & ~near[3:-3, 3:-3]).any()

  def test_masks_are_disjoint_and_every_object_is_seen(self, many):
    for made, owners in many:
      masks = np.stack([made[4].mask(index) for index in range(len(made.concepts))])
      assert masks.sum(axis=0).max() <= 1
      assert visible(owners, len(made.concepts)).any(axis=1).all()
      assert owners.max() == len(made.concepts) - 1
      assert made[0].image.dtype == np.uint8
      assert made[0].image.shape == (*SIZE, 3)

  def test_objects_in_the_first_frame_are_well_visible(self, many):
    """So that a prompt on the first frame is for an object that can be recognized."""
    for made, owners in many:
      objects = [layer for layer in made._layers if layer.concept is not None]
      for index, layer in enumerate(objects):
        full = layer.place(0, made._camera[0])[0].mask.sum()
        seen = (owners[0] == index).sum()
        assert seen == 0 or seen >= moving_layers.VISIBLE * full

  def test_objects_leave_and_return(self, many):
    """Not covered, but outside of the image: its center is beyond the border."""
    returned = 0
    for made, owners in many:
      seen = visible(owners, len(made.concepts)) > 0
      for row, kind in zip(seen, made.kinds, strict=True):
        gone = np.flatnonzero(~row)
        if kind == "leaving" and len(gone) and row[: gone[0]].any() and row[gone[-1] :].any():
          returned += 1
    assert returned >= 3

  def test_objects_are_hidden_and_appear_again(self, many):
    """Objects inside the image lose most of their pixels for a while."""
    hidden = 0
    for made, owners in many:
      for row, kind in zip(visible(owners, len(made.concepts)), made.kinds, strict=True):
        if kind != "leaving" and row.argmin() not in (0, FRAMES - 1):
          hidden += row.min() < 0.3 * min(row[0], row[-1])
    assert hidden >= 3

  def test_objects_move_turn_and_scale(self, many):
    layers = [layer for made, _ in many for layer in made._layers if layer.concept is not None]
    steps = [np.hypot(*np.diff(one.motion.xy, axis=0).T).mean() / min(SIZE) for one in layers]
    assert 0.01 < np.median(steps) < 0.05
    assert max(steps) < 0.2
    assert 0.3 < np.mean([np.ptp(one.motion.angle) > 0.05 for one in layers]) < 0.9
    assert 0.3 < np.mean([np.ptp(one.motion.side) > 1 for one in layers]) < 0.8
    assert {one.motion.kind for one in layers} == set(motion.KINDS)

  def test_cameras_pan(self, many):
    moved = [np.ptp(made._camera, axis=0).max() for made, _ in many]
    assert 0.3 < np.mean([one > 0 for one in moved]) < 0.9
    for made, _ in many:
      height, width = made._backdrop.shape[:2]
      assert made._camera.min() >= 0
      assert (made._camera.max(axis=0) + SIZE[::-1] <= (width, height)).all()

  def test_occluders_have_no_object(self, many):
    occluders = [
      (made, layer) for made, _ in many for layer in made._layers if layer.concept is None
    ]
    assert len(occluders) >= COUNT / 4
    for made, layer in occluders:
      if made._layers[-1] is layer:  # nothing is in front of it
        place = layer.place(9, made._camera[9])
        target, inside = moving_layers.overlap(place, SIZE)
        assert (made[9].owners[target][place[0].mask[inside]] == -1).all()

  def test_same_generator_same_scene(self):
    first, second, other = (scene(seed, augment=1.0) for seed in (3, 3, 4))
    assert first.concepts == second.concepts
    for t in (0, 11, 23):
      assert np.array_equal(first[t].image, second[t].image)
      assert np.array_equal(first[t].owners, second[t].owners)
    assert not np.array_equal(first[0].image, other[0].image)

  def test_frames_can_be_rendered_in_any_order(self):
    made = scene(5)
    assert len(list(made)) == len(made) == FRAMES
    again = made[9]
    assert np.array_equal(list(made)[9].image, again.image)
    with pytest.raises(IndexError, match="frame 24 of 24"):
      made[24]

  def test_number_of_objects(self, many):
    counts = [len(made.concepts) for made, _ in many]
    assert min(counts) >= 1
    assert max(counts) <= moving_scenes.MAX_OBJECTS
    assert len(set(counts)) >= 3
    wanted = [len(scene(number, objects=3).concepts) for number in range(8)]
    assert max(wanted) == 3
    assert np.mean(wanted) > 2.3

  def test_long_and_short_videos(self):
    long = scene(1, frames=400, size=(64, 64))
    assert len(long) == 400
    seen = [(long[t].owners >= 0).any() for t in range(0, 400, 20)]
    assert np.mean(seen) > 0.7
    assert len(list(scene(2, frames=2))) == 2

  @pytest.mark.parametrize(
    ("options", "message"),
    [
      ({"size": (63, 200)}, "at least 64 x 64 pixels; got 63 x 200"),
      ({"frames": 1}, "at least 2 frames; got 1"),
      ({"styles": ("crayon",)}, "no style 'crayon'"),
    ],
  )
  def test_invalid_arguments(self, options, message):
    with pytest.raises(ValueError, match=message):
      scene(0, **options)


class TestStyles:
  def test_twemoji_is_never_in_training(self, monkeypatch):
    used = []
    real = drawings.drawings
    monkeypatch.setattr(drawings, "drawings", lambda style: used.append(style) or real(style))
    named = {scene(number, frames=3, objects=1).style for number in range(30)}
    assert set(used) == named == set(drawings.TRAINING)

  def test_one_artist_per_scene(self, monkeypatch):
    used = []
    real = drawings.drawings
    monkeypatch.setattr(drawings, "drawings", lambda style: used.append(style) or real(style))
    assert scene(0, styles=("twemoji",), frames=3).style == "twemoji"
    assert set(used) == {"twemoji"}


def test_phrases_match_the_objects(many):
  for number, (made, _) in enumerate(many):
    phrases = made.phrases(np.random.default_rng(number))
    assert sorted(i for phrase in phrases for i in phrase.objects) == [*range(len(made.concepts))]
    for phrase in phrases:
      assert all(made.concepts[index] == phrase.concept for index in phrase.objects)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
  out = tmp_path_factory.mktemp("moving") / "new" / "folder"
  done = moving_scene_files.write(out, 3, 5, frames=12, size=SIZE)
  record = json.loads((out / "annotations.json").read_text())
  assert done == {
    "videos": 3,
    "frames": 36,
    "pairs": len(record["video_np_pairs"]),
    "objects": len(record["annotations"]),
  }
  return out


def contents(folder: Path) -> dict[str, bytes]:
  return {
    file.relative_to(folder).as_posix(): file.read_bytes()
    for file in sorted(folder.rglob("*"))
    if file.is_file()
  }


def hides(made, t):
  """Whether a layer covers the mask of an object behind it, by drawing each layer alone."""
  behind = np.zeros(made.size, bool)
  for layer in made._layers:
    patch, (top, left) = layer.place(t, made._camera[t])
    alone = np.zeros(made.size, bool)
    for y, x in np.argwhere(patch.mask) + np.array([top, left]):
      if 0 <= y < made.size[0] and 0 <= x < made.size[1]:
        alone[y, x] = True
    if (behind & alone).any():
      return True
    behind |= alone & (layer.concept is not None)
  return False


def composed(number):
  rng = np.random.default_rng([5, number])
  return moving_scenes.compose(rng, size=SIZE, frames=12)


class TestWrite:
  def test_masks_are_those_of_the_scenes(self, written):
    """Read back by our reader, and by pycocotools."""
    videos = video_annotations.read(written / "annotations.json")
    record = json.loads((written / "annotations.json").read_text())
    entries = {one["id"]: one for one in record["annotations"]}
    for number, video in enumerate(videos):
      made = composed(number)
      frames = list(made)
      assert len(video) == 12
      wanted = {
        tuple(frame.mask(index).tobytes() for frame in frames)
        for index in range(len(made.concepts))
      }
      found = [tuple(video.mask(one, t).tobytes() for t in range(12)) for one in video.objects]
      assert set(found) == wanted
      assert len(found) == len(wanted)
      for one in video.objects:
        entry = entries[one.id]
        for t, rle in enumerate(entry["segmentations"]):
          mask = video.mask(one, t)
          assert (rle is None) == (not mask.any())
          if rle is None:
            assert entry["bboxes"][t] is None
            assert entry["areas"][t] is None
          else:
            assert np.array_equal(coco.decode(rle), mask)
            assert entry["areas"][t] == mask.sum()
            assert entry["bboxes"][t] == coco.toBbox(rle).tolist()

  def test_frames_equal_the_scenes(self, written):
    videos = video_annotations.read(written / "annotations.json")
    folder = video_annotations.frame_folder(written / "annotations.json")
    assert folder == written / "JPEGImages"
    assert video_annotations.check(videos, folder) == []
    stored = list(videos[1].frames(folder))
    made = composed(1)
    assert len(stored) == 12
    assert np.abs(stored[3].astype(int) - made[3].image).mean() < 8  # loss of JPEG
    files = set(contents(folder))
    assert files == {name for video in videos for name in video.file_names}

  def test_phrases_of_present_and_absent_objects(self, written):
    record = json.loads((written / "annotations.json").read_text())
    names = {one["id"]: one["name"] for one in record["categories"]}
    assert len(set(names.values())) == len(names)
    counts: dict = {}
    for one in record["annotations"]:
      assert names[one["category_id"]] == one["noun_phrase"]
      key = one["video_id"], one["noun_phrase"]
      counts[key] = counts.get(key, 0) + 1
    for pair in record["video_np_pairs"]:
      assert names[pair["category_id"]] == pair["noun_phrase"]
      assert pair["num_masklets"] == counts.get((pair["video_id"], pair["noun_phrase"]), 0)
    assert np.mean([pair["num_masklets"] == 0 for pair in record["video_np_pairs"]]) > 0.4
    videos = video_annotations.read(written / "annotations.json")
    assert sum(len(video.phrases) for video in videos) == len(record["video_np_pairs"])

  def test_occlusion(self, written):
    """A video has occlusion if the masks of an object and of all in front of it overlap."""
    videos = video_annotations.read(written / "annotations.json")
    assert [video.occluded for video in videos] == [
      any(hides(made, t) for t in range(len(made))) for made in map(composed, range(3))
    ]

  def test_pairs_for_the_evaluation_of_concepts(self, written):
    """The true tracks as predictions are perfect."""
    data = video_annotations.read_concepts(written / "annotations.json")
    scorer = ConceptScorer(data)
    for video in data.videos:
      tracks = [ConceptTrack(one.category, 0.9, one.rles, one.boxes) for one in video.objects]
      scorer.add(video, tracks)
    metrics = scorer.metrics()
    assert metrics["il_mcc"] == pytest.approx(1, abs=1e-5)
    for name in ("phota", "box_phota", "phrase_ap", "teta"):
      assert metrics[name] == pytest.approx(100), name
    assert metrics["identity_switches"] == metrics["identity_switches_without_occlusion"] == 0

  def test_same_seed_gives_the_same_files(self, written, tmp_path):
    moving_scene_files.write(tmp_path / "again", 3, 5, frames=12, size=SIZE)
    assert contents(tmp_path / "again") == contents(written)
    moving_scene_files.write(tmp_path / "fewer", 1, 5, frames=12, size=SIZE)
    fewer = contents(tmp_path / "fewer")
    fewer.pop("annotations.json")
    assert fewer.items() <= contents(written).items()

  def test_interrupted_run_is_repeated(self, written, tmp_path):
    out = tmp_path / "out"

    def stop(what: str, fraction: float) -> None:
      if fraction > 0.3:
        raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
      moving_scene_files.write(out, 5, 9, frames=12, size=SIZE, progress=stop)
    assert not (out / "annotations.json").exists()
    assert list(out.glob("JPEGImages/*/*.jpg"))
    moving_scene_files.write(out, 3, 5, frames=12, size=SIZE)
    assert contents(out) == contents(written)
    assert len(list((out / "JPEGImages").iterdir())) == 3

  def test_full_disk(self, tmp_path, monkeypatch):
    def full(*_, **__):
      raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(ValueError, match=r"cannot write to .*out: No space left on device; free"):
      moving_scene_files.write(tmp_path / "out", 1, 0, frames=2, size=SIZE)


class TestCommand:
  def test_writes_files_and_prints_counts(self, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    typed = ["--count=2", "--seed=3", "--frames=4", "--size=128x96", "--style=twemoji"]
    assert main(["scenes", "--video", "--out=out", *typed]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith("out/annotations.json: 2 videos, 8 frames, ")
    moving_scene_files.write(Path("same"), 2, 3, "twemoji", frames=4, size=SIZE)
    assert contents(Path("same")) == contents(Path("out"))
    assert [path.name for path in sorted(Path("out/JPEGImages").iterdir())] == [
      "000000_twemoji",
      "000001_twemoji",
    ]

  def test_size_of_images(self, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["scenes", "--out=out", "--count=1", "--size=128x96"]) == 0
    [path] = Path("out/images").glob("*.jpg")
    with Image.open(path) as image:
      assert image.size == (128, 96)

  @pytest.mark.parametrize(
    ("typed", "message"),
    [
      (["--frames", "3"], "--frames 3 needs --video"),
      (["--video", "--frames", "1"], "a moving scene has 2 to 99,999 frames; got 1"),
      (["--video", "--new", "owl"], "--new owl is for images only"),
      (["--video", "--size", "320"], "--size '320' must be width and height"),
      (["--video", "--size", "32x320"], "64 to 8192 pixels wide and high; got 32 x 320"),
      (["--size", "9999x320"], "64 to 8192 pixels wide and high; got 9999 x 320"),
    ],
  )
  def test_errors_are_one_line(self, typed, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["scenes", "--out", "out", *typed]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert message in err
    assert not Path("out").exists()
