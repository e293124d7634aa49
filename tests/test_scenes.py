"""Composed scenes: masks match the image, scenes are hard enough and reproducible."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco

from sam3_jax.datasets.synthetic import drawings, scenes
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
