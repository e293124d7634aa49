"""Scenes: masks match the image, scenes are hard enough and reproducible."""

import contextlib
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco
from pycocotools.coco import COCO

from sam3_jax.cli import scenes as command
from sam3_jax.cli.main import main
from sam3_jax.datasets import annotations
from sam3_jax.datasets.synthetic import drawings, scene_files, scenes
from sam3_jax.datasets.synthetic.phrase_sampling import lookalikes

# pycocotools' own, with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

FIXED = Path(__file__).parent / "scenes"
COUNT = 40


def scene(*seed: int, **options) -> scenes.Scene:
  return scenes.compose(np.random.default_rng(seed), **options)


@pytest.fixture(scope="module")
def many() -> list[scenes.Scene]:
  return [scene(number, mixed=0.2, augment=number % 3 / 2) for number in range(COUNT)]


@pytest.fixture(scope="module")
def plans() -> list[list[tuple[int, float]]]:
  return [
    scenes._plan(np.random.default_rng([11, number]), scenes.VARIETY) for number in range(300)
  ]


class Recorder(scenes._Canvas):
  """Records the background and the pasted patches."""

  def __init__(self, image):
    super().__init__(image)
    self.first, self.record = image.copy(), []
    Recorder.made = self

  def paste(self, patch, corner, concept):
    done = super().paste(patch, corner, concept)
    if done:
      self.record.append((patch, corner, concept))
    return done


def recompose(recorder: Recorder):
  """Image, masks and visible fractions, on a canvas so large that nothing is clipped."""
  edge = 300
  height, width = recorder.first.shape[:2]
  image = np.pad(recorder.first.astype(float), ((edge, edge), (edge, edge), (0, 0)))
  owners = np.full(image.shape[:2], -1)
  for number, (patch, (top, left), _) in enumerate(recorder.record):
    rows, columns = patch.mask.shape
    here = (
      slice(top + edge, top + edge + rows),
      slice(left + edge, left + edge + columns),
    )
    alpha = patch.pixels[..., 3:] / 255
    image[here] = np.minimum(patch.pixels[..., :3] + image[here] * (1 - alpha), 255)
    owners[here][patch.mask] = number
  inside = (slice(edge, edge + height), slice(edge, edge + width))
  masks = [owners[inside] == number for number in range(len(recorder.record))]
  seen = [
    mask.sum() / patch.mask.sum() for mask, (patch, *_) in zip(masks, recorder.record, strict=True)
  ]
  return image[inside], masks, seen


class TestCompose:
  @pytest.mark.parametrize("seed", range(12))
  def test_masks_match_the_visible_pixels(self, seed, monkeypatch):
    monkeypatch.setattr(scenes, "_Canvas", Recorder)
    made = scene(seed, augment=seed % 2)
    image, masks, seen = recompose(Recorder.made)
    assert [one.concept for one in made.objects] == [row[2] for row in Recorder.made.record]
    assert all(np.array_equal(one.mask, m) for one, m in zip(made.objects, masks, strict=True))
    assert np.allclose(made.visible, seen, rtol=1e-12)
    # Rounded once for each object: an error of half a value per object at a pixel.
    assert np.abs(made.image - image).max() <= 2  # measured 1.17

  def test_masks_are_disjoint(self, many):
    for one in many:
      assert np.sum([item.mask for item in one.objects], axis=0).max() == 1
      assert all(item.mask.any() for item in one.objects)

  def test_shapes_and_types(self, many):
    for one in many:
      assert one.image.dtype == np.uint8
      assert one.image.shape[:2] in scenes.SIZES
      assert all(item.mask.shape == one.image.shape[:2] for item in one.objects)
      assert all(item.mask.dtype == bool for item in one.objects)
      assert all(0 <= item.concept < 78 for item in one.objects)

  def test_1_to_12_objects_at_least_half_visible(self, many):
    counts = [len(one.objects) for one in many]
    assert min(counts) >= 1
    assert max(counts) == scenes.MAX_OBJECTS == 12
    assert {1, 2, 3, 4} < set(counts)
    seen = [value for one in many for value in one.visible]
    assert min(seen) >= 0.5
    assert np.mean([value < 0.75 for value in seen]) > 0.08  # measured 0.2

  def test_sizes(self, many):
    """8 to 60 % of the shorter side, for objects that are not occluded."""
    shares = []
    for one in [scene(7, number, size=(128, 170)) for number in range(COUNT)]:
      for item, seen in zip(one.objects, one.visible, strict=True):
        box = [np.ptp(np.flatnonzero(item.mask.any(axis))) + 1 for axis in (0, 1)]
        if seen == 1:
          shares.append(max(box) / min(one.image.shape[:2]))
    # Thin ends of a small object may not be opaque.
    assert 0.06 < min(shares) < 0.12
    assert 0.5 < max(shares) <= 0.605

  def test_at_least_as_hard_as_the_fixed_scenes(self):
    made = [scene(9, number, size=(120, 160)) for number in range(100)]
    ours = np.array([len(one.objects) for one in made])
    record = json.loads((FIXED / "known" / "annotations.json").read_text())
    files = {pair["id"]: pair["file_name"] for pair in record["images"]}
    objects = [files[one["image_id"]] for one in record["annotations"]]
    fixed = np.unique(objects, return_counts=True)[1]
    assert ours.mean() > fixed.mean()  # measured 6.6 and 5.9
    areas = np.concatenate([[item.mask.mean() for item in one.objects] for one in made])
    known = [
      coco.area(one["segmentation"]) / np.prod(one["segmentation"]["size"])
      for one in record["annotations"]
    ]
    assert np.percentile(areas, 10) < 1.2 * np.percentile(known, 10)

  def test_similar_concepts_are_often_together(self, plans):
    present = [{concept for concept, _ in plan} for plan in plans]
    alike = [any(set(lookalikes(one)) & concepts for one in concepts) for concepts in present]
    assert np.mean(alike) > 0.25  # measured 0.43

  def test_crowds(self, plans):
    crowds = [np.bincount([concept for concept, _ in plan]).max() for plan in plans]
    assert max(crowds) == 12
    assert np.median(crowds) < 5
    assert {len(plan) for plan in plans} == set(range(1, 13))

  @pytest.mark.parametrize("options", [{}, {"mixed": 1.0, "augment": 1.0}])
  def test_same_generator_same_scene(self, options):
    first, second, other = (scene(seed, size=(120, 160), **options) for seed in (3, 3, 4))
    assert np.array_equal(first.image, second.image)
    assert first.visible == second.visible
    assert all(
      a.concept == b.concept and np.array_equal(a.mask, b.mask)
      for a, b in zip(first.objects, second.objects, strict=True)
    )
    assert not np.array_equal(first.image, other.image)

  def test_uses_only_its_generator(self):
    before = np.random.default_rng(3)
    scenes.compose(before, size=(120, 160))
    np.random.default_rng(8).random(5)
    after = np.random.default_rng(3)
    scenes.compose(after, size=(120, 160))
    assert before.random() == after.random()

  @pytest.mark.parametrize("size", [(64, 64), (64, 300), (500, 90), (128, 128)])
  def test_any_size_from_64(self, size):
    for number in range(5):
      made = scene(number, size=size)
      assert made.image.shape == (*size, 3)
      assert made.objects

  @pytest.mark.parametrize("size", [(63, 200), (200, 0)])
  def test_too_small(self, size):
    with pytest.raises(ValueError, match=r"must be at least 64 x 64 pixels; got"):
      scene(0, size=size)

  def test_unknown_style(self):
    with pytest.raises(ValueError, match="no style 'crayon'"):
      scene(0, styles=("crayon",))


class TestNew:
  def test_scenes_without_new_concepts_are_unchanged(self):
    """Compares with the digest of the scenes before new concepts were added."""
    digest = hashlib.sha256()
    for number in range(12):
      rng = np.random.default_rng([5, number])
      made = scenes.compose(rng, mixed=0.2, augment=0.5)
      digest.update(made.image.tobytes())
      sampled = [tuple(one)[:3] for one in scenes.phrases(rng, made, absent=1.5)]
      digest.update(repr(sampled).encode())
    assert digest.hexdigest() == "8f070f222cbf34b6d522ab40b897a82dee4c6e4c1a6e23f3280c28f7f37c1eb7"

  def test_half_of_the_scenes_show_the_new_concept(self):
    new = 79
    plans = []
    for number in range(300):
      rng = np.random.default_rng([3, number])
      plan = scenes._plan(rng, scenes.VARIETY)
      plans.append((plan, scenes._with_new(rng, plan, new)))
    shown = [any(concept == new for concept, _ in after) for _, after in plans]
    assert 0.4 < np.mean(shown) < 0.6
    assert all([share for _, share in a] == [share for _, share in b] for a, b in plans)
    alike = [not shows and a != b for shows, (a, b) in zip(shown, plans, strict=True)]
    assert 0.1 < np.mean(alike) < 0.3

  def test_new_concept_is_drawn_and_has_a_phrase(self):
    made = [scene(number, new=80) for number in range(16)]
    found = [scenes.phrases(np.random.default_rng(1), one, new=80) for one in made]
    present = [80 in [item.concept for item in one.objects] for one in made]
    assert 3 < sum(present) < 13
    for phrases, shows in zip(found, present, strict=True):
      [own] = [phrase for phrase in phrases if phrase.named == 80]
      assert bool(own.objects) == shows


class TestStyles:
  def test_twemoji_is_never_in_training(self, monkeypatch):
    used = []
    real = drawings.drawings
    monkeypatch.setattr(drawings, "drawings", lambda style: used.append(style) or real(style))
    named = {scene(number, mixed=0.3).style for number in range(40)}
    assert set(used) == set(drawings.TRAINING) == {"noto", "noto-v1", "fluent"}
    assert named == {*drawings.TRAINING, "mixed"}

  @pytest.mark.parametrize("style", drawings.STYLES)
  def test_one_artist_per_scene(self, style, monkeypatch):
    used = []
    real = drawings.drawings
    monkeypatch.setattr(drawings, "drawings", lambda style: used.append(style) or real(style))
    assert scene(0, styles=(style,)).style == style
    assert set(used) == {style}

  def test_mixed(self, monkeypatch):
    used = []
    real = drawings.drawings
    monkeypatch.setattr(drawings, "drawings", lambda style: used.append(style) or real(style))
    assert all(scene(number, mixed=1.0).style == "mixed" for number in range(5))
    assert set(used) == set(drawings.TRAINING)


def test_phrases_match_the_objects(many):
  for number, one in enumerate(many):
    phrases = scenes.phrases(np.random.default_rng(number), one)
    matched = sorted(index for phrase in phrases for index in phrase.objects)
    assert matched == list(range(len(one.objects)))
    for phrase in phrases:
      assert all(one.objects[index].concept == phrase.concept for index in phrase.objects)
      assert (phrase.concept is None) == (not phrase.objects)
    absent = [phrase for phrase in phrases if phrase.concept is None]
    assert len(absent) >= len(phrases) - len(absent)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
  out = tmp_path_factory.mktemp("scenes") / "new" / "folder"
  done = scene_files.write(out, 12, 5)
  record = json.loads((out / "annotations.json").read_text())
  assert done == {
    "images": 12,
    "pairs": len(record["images"]),
    "objects": len(record["annotations"]),
  }
  return out


def contents(folder: Path) -> dict[str, bytes]:
  return {
    file.relative_to(folder).as_posix(): file.read_bytes()
    for file in sorted(folder.rglob("*"))
    if file.is_file()
  }


class TestWrite:
  def test_pycocotools_reads_the_masks(self, written, capsys):
    dataset = COCO(written / "annotations.json")
    capsys.readouterr()
    made = [scenes.compose(np.random.default_rng([5, number])) for number in range(12)]
    for annotation in dataset.dataset["annotations"]:
      pair = dataset.imgs[annotation["image_id"]]
      mask = dataset.annToMask(annotation).astype(bool)
      number = int(Path(pair["file_name"]).name[:6])
      assert any(np.array_equal(mask, item.mask) for item in made[number].objects)
      assert annotation["area"] == mask.sum()
      scale = np.array([pair["width"], pair["height"]] * 2)
      box = coco.toBbox(annotation["segmentation"])
      assert np.allclose(np.array(annotation["bbox"]) * scale, box, atol=1e-9)

  def test_layout_equals_that_of_the_fixed_scenes(self, written):
    ours, fixed = (
      json.loads((folder / "annotations.json").read_text()) for folder in (written, FIXED / "known")
    )
    assert set(ours) == set(fixed)
    assert ours["categories"] == fixed["categories"]
    for part in ("images", "annotations"):
      assert {key: type(value) for key, value in ours[part][0].items()} == {
        key: type(value) for key, value in fixed[part][0].items()
      }

  def test_annotations_have_no_faults(self, written):
    pairs = annotations.read(written / "annotations.json")
    assert len(annotations.check(pairs, written)) == 0
    assert np.mean([not pair.objects for pair in pairs]) > 0.5
    images = {pair.file_name for pair in pairs}
    assert images == {name for name in contents(written) if name.endswith(".jpg")}

  def test_images_equal_the_scenes(self, written):
    made = scenes.compose(np.random.default_rng([5, 0]))
    with Image.open(written / "images" / f"000000_{made.style}.jpg") as image:
      stored = np.asarray(image).astype(int)
    assert stored.shape == made.image.shape
    assert np.abs(stored - made.image).mean() < 6  # loss of JPEG

  def test_same_seed_gives_the_same_files(self, written, tmp_path):
    scene_files.write(tmp_path / "again", 12, 5)
    assert contents(tmp_path / "again") == contents(written)
    scene_files.write(tmp_path / "fewer", 3, 5)
    fewer, written_files = contents(tmp_path / "fewer"), contents(written)
    assert {name: fewer[name] for name in fewer if name.startswith("images/")}.items() <= (
      written_files.items()
    )
    scene_files.write(tmp_path / "other", 3, 6)
    assert not set(contents(tmp_path / "other").values()) & set(written_files.values())

  def test_new_concept_has_its_own_annotation_file(self, tmp_path):
    scene_files.write(tmp_path / "out", 10, 5, ("noto", "fluent", "noto"), new="crown")
    pairs = annotations.read(tmp_path / "out" / "annotations.json")
    own = annotations.read(tmp_path / "out" / "crown.json")
    assert len(own) == len({pair.file_name for pair in pairs}) == 10
    assert {pair.id: pair for pair in own}.items() <= {pair.id: pair for pair in pairs}.items()
    assert all("crown" in pair.phrase for pair in own)
    assert sum("crown" in pair.phrase for pair in pairs) == 10
    assert 1 < sum(bool(pair.objects) for pair in own) < 9
    styles = {name[14:-4] for name in contents(tmp_path / "out") if name.endswith(".jpg")}
    assert styles == {"noto", "fluent"}

  def test_augment_changes_images(self, written, tmp_path):
    scene_files.write(tmp_path / "out", 2, 5, augment=1.0)
    assert set(contents(tmp_path / "out").values()).isdisjoint(contents(written).values())
    with pytest.raises(ValueError, match=r"augment must be between 0 and 1; got 1\.5"):
      scene_files.write(tmp_path / "more", 2, 5, augment=1.5)

  def test_unknown_new_concept(self, tmp_path):
    with pytest.raises(ValueError, match=r"no new concept 'cat'; choose from avocado, crown, owl"):
      scene_files.write(tmp_path / "out", 1, 0, new="cat")
    assert not list(tmp_path.iterdir())

  def test_unseen_phrases(self, tmp_path):
    scene_files.write(tmp_path / "out", 8, 5, unseen=True)
    phrases = {pair.phrase for pair in annotations.read(tmp_path / "out" / "annotations.json")}
    trained = {text for one in drawings.concepts() for text in (*one.phrases, *one.synonyms)}
    assert phrases
    assert not phrases & trained

  def test_interrupted_run_is_repeated(self, written, tmp_path):
    out = tmp_path / "out"

    def stop(what: str, fraction: float) -> None:
      if fraction > 0.5:
        raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
      scene_files.write(out, 20, 9, progress=stop)
    assert not (out / "annotations.json").exists()
    assert len(list(out.glob("images/*.jpg"))) > 10
    scene_files.write(out, 12, 5)
    assert contents(out) == contents(written)

  def test_progress(self, tmp_path):
    fractions = []
    scene_files.write(tmp_path / "out", 4, 0, progress=lambda what, done: fractions.append(done))
    assert fractions == [0, 0.25, 0.5, 0.75]

  def test_full_disk(self, tmp_path, monkeypatch):
    def full(*_, **__):
      raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(ValueError, match=r"cannot write to .*out: No space left on device; free"):
      scene_files.write(tmp_path / "out", 1, 0)

  def test_full_disk_at_the_end(self, tmp_path, monkeypatch):
    """Every JSON file is complete or missing, and the directory can be written again."""

    def full(*_):
      raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
      patch.setattr("os.replace", full)
      with pytest.raises(ValueError, match="No space left on device"):
        scene_files.write(tmp_path / "out", 2, 0, new="crown")
    assert not {"annotations.json", "crown.json"} & set(contents(tmp_path / "out"))
    scene_files.write(tmp_path / "out", 2, 0, new="crown")
    scene_files.write(tmp_path / "same", 2, 0, new="crown")
    assert contents(tmp_path / "out") == contents(tmp_path / "same")

  @pytest.mark.parametrize(("count", "seed"), [(0, 0), (-3, 0), (1, -1)])
  def test_invalid_count_or_seed(self, count, seed, tmp_path):
    with pytest.raises(ValueError, match=f"got {count} scenes of seed {seed}"):
      scene_files.write(tmp_path / "out", count, seed)
    assert not list(tmp_path.iterdir())

  def test_unknown_style(self, tmp_path):
    with pytest.raises(ValueError, match=r"no style 'crayon'; choose from noto, .*, train"):
      scene_files.write(tmp_path / "out", 1, 0, "crayon")
    assert not list(tmp_path.iterdir())


class TestCommand:
  def test_writes_files_and_prints_counts(self, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    typed = ["scenes", "--out", "out", "--count", "3", "--seed", "2", "--style", "noto-v1"]
    assert main(typed) == 0
    out, err = capsys.readouterr()
    assert err == ""
    pairs = annotations.read("out/annotations.json")
    assert out.startswith(f"out/annotations.json: 3 images, {len(pairs)} pairs, ")
    assert out.count("\n") == 1
    assert len(list(Path("out/images").glob("*_noto-v1.jpg"))) == 3
    scene_files.write(Path("same"), 3, 2, "noto-v1")
    assert contents(Path("same")) == contents(Path("out"))

  def test_quiet(self, tmp_path, capsys):
    assert main(["scenes", f"--out={tmp_path}", "--count=1", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")

  def test_every_style_and_new_concept_is_offered(self):
    assert {style.value for style in command.Style} == {*drawings.STYLES, scene_files.TRAIN}
    assert [new.value for new in command.NewConcept] == [
      one.name for one in drawings.new_concepts()
    ]

  def test_several_styles_and_a_new_concept(self, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    typed = ["--count=4", "--style=noto", "--style=twemoji", "--new=owl", "--augment=0.5"]
    assert main(["scenes", "--out=out", *typed]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("out/annotations.json: 4 images, ")
    assert second.startswith("out/owl.json: ")
    scene_files.write(Path("same"), 4, 0, ["noto", "twemoji"], new="owl", augment=0.5)
    assert contents(Path("same")) == contents(Path("out"))

  @pytest.mark.parametrize(
    ("typed", "message"),
    [
      (["--out", "out", "--count", "0"], "--count"),
      (["--out", "out", "--count", "many"], "--count"),
      (["--out", "out", "--seed", "-1"], "--seed"),
      (["--out", "out", "--style", "crayon"], "crayon"),
      (["--out", "out", "--style", "noto", "--style", "crayon"], "crayon"),
      (["--out", "out", "--new", "cat"], "cat"),
      (["--out", "out", "--augment", "nan"], "got nan"),
      (["--count", "3"], "--out"),
      (["--out", "there"], "there is not empty; give another directory, or remove it first."),
      (["--out", "there/file"], "cannot write to there/file"),
      (["--out", "there/file/below"], "cannot write to there/file/below"),
    ],
  )
  def test_errors_are_one_line(self, typed, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("there").mkdir()
    Path("there/file").write_text("mine")
    assert main(["scenes", *typed]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("sam3-jax: error: ")
    assert err.count("\n") == 1
    assert message in err
    assert contents(tmp_path) == {"there/file": b"mine"}
    assert not Path("out").exists()
