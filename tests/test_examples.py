"""Rows of a batch, made of an image and its phrases."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from example_rows import (
  CONFIG,
  CONTEXT,
  HEIGHT,
  IMAGE,
  PAIRS,
  SIZES,
  WIDTH,
  box_object,
  check_invariants,
  pair,
  phrases_of,
  row,
  tokenize,
)
from pycocotools import mask as coco

from sam3_jax.datasets.annotations import AbsentPhrases, Object
from sam3_jax.inputs.prompts import BOXES_ALONE
from sam3_jax.inputs.resize import resize
from sam3_jax.training.examples import DataConfig, TrainingImage, example, usable

PLAIN = DataConfig(
  **SIZES,
  min_scale=1.0,
  flip_probability=0.0,
  box_only_probability=0.0,
  text_and_box_probability=0.0,
)


def test_absent_phrases_are_drawn_anew_and_fill_the_row():
  absent = AbsentPhrases(("cat", "a", "b", "c", "d", "e", "f"), frozenset({"cat"}))
  config, seen = dataclasses.replace(PLAIN, negatives=("never", "b")), set()
  for seed in range(30):
    image = TrainingImage(IMAGE, PAIRS, absent)
    got = example(image, 7, config, tokenize, np.random.default_rng(seed))
    first, second, *others = phrases_of(got)
    assert {first, second} == {"cat", "dog"}
    assert len(others) == len(set(others)) == 3
    seen |= set(others)
    check_invariants(got, config)
  assert seen == {"a", "b", "c", "d", "e", "f", "never"}


def test_shapes_and_types():
  for pairs in ((), PAIRS[:1], PAIRS, PAIRS * 5):
    got = row(pairs)
    want = {
      "images": ((64, 64, 3), np.uint8),
      "sizes": ((2,), np.int32),
      "ids": ((), np.int32),
      "tokens": ((5, CONTEXT), np.int32),
      "boxes": ((5, 3, 4), np.float32),
      "positive": ((5, 3), bool),
      "box_valid": ((5, 3), bool),
      "prompt_valid": ((5,), bool),
    }
    for name, (shape, dtype) in want.items():
      assert (getattr(got, name).shape, getattr(got, name).dtype) == (shape, dtype), name
    assert got.targets.boxes.shape == (5, 4, 4)
    assert got.targets.masks.shape == (5, 4, 16, 16)
    assert got.targets.masks.dtype == np.uint8
    assert got.targets.valid.shape == (5, 4)
    assert got.sizes.tolist() == [HEIGHT, WIDTH]
    assert got.ids == 7


@pytest.mark.parametrize("seed", range(30))
def test_invariants(seed):
  config = DataConfig(
    **(
      vars(CONFIG)
      | {"crop_probability": 0.8, "box_only_probability": 0.4, "text_and_box_probability": 0.4}
    )
  )
  many = [pair(f"thing {i}", box_object(5 * i, 4 * i, 7, 3 + i)) for i in range(8)]
  for pairs in (PAIRS, many, PAIRS[:1]):
    check_invariants(row(pairs, seed, config), config)


def test_row_without_augmentation():
  got = row(PAIRS, config=PLAIN)
  assert (got.images == resize(IMAGE, 64)).all()
  phrases = phrases_of(got)
  assert set(phrases[:2]) == {"cat", "dog"}
  assert set(phrases[2:4]) == {"nothing", "no one"}
  assert phrases[4] == ""
  assert got.prompt_valid.tolist() == [True] * 4 + [False]
  assert not got.box_valid.any()
  cat, dog = phrases.index("cat"), phrases.index("dog")
  assert got.targets.valid.sum(axis=1)[[cat, dog]].tolist() == [2, 1]
  x, y, w, h = np.array([[4, 6, 10, 12], [30, 20, 6, 8]]).T
  want = np.stack([(x + w / 2) / WIDTH, (y + h / 2) / HEIGHT, w / WIDTH, h / HEIGHT], axis=1)
  np.testing.assert_allclose(got.targets.boxes[cat, :2], want, atol=1e-7)  # measured 2e-8
  # 3 x 2.25 pixels a cell: the cat's 10 x 12 cover 120 pixels.
  assert abs(got.targets.masks[cat, 0].sum() / 255 * 3 * 2.25 - 120) < 1
  assert got.targets.masks[cat, 0, 4, 3] == 255


def test_masks_and_boxes_move_with_the_image():
  """Only the object is bright, so its target must be where the image is bright."""
  image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
  image[6:30, 4:24] = 255
  source_image = TrainingImage(image, [pair("cat", box_object(4, 6, 20, 24))])
  for seed in range(20):
    config = DataConfig(**(vars(CONFIG) | {"mask_size": 64, "crop_probability": 0.5}))
    got = example(source_image, 0, config, tokenize, np.random.default_rng(seed))
    if not got.targets.valid[0, 0]:
      continue
    bright = got.images[..., 0].astype(int)
    # The resize filter blurs edges where it magnifies, coverage does not: interiors must agree.
    mask = got.targets.masks[0, 0].astype(int)
    assert ((bright > 250) <= (mask > 100)).all()
    assert ((mask > 250) <= (bright > 100)).all()
    rows, columns = np.flatnonzero((mask > 127).any(1)), np.flatnonzero((mask > 127).any(0))
    cx, cy, w, h = got.targets.boxes[0, 0] * 64
    found = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    np.testing.assert_allclose([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], found, atol=0.6)


def test_the_same_generator_makes_the_same_row():
  def leaves(seed):
    got = row(PAIRS, seed, box_only_probability=0.5, crop_probability=0.5)
    return [*vars(got.targets).values(), *(v for k, v in vars(got).items() if k != "targets")]

  assert all((a == b).all() for a, b in zip(leaves(3), leaves(3), strict=True))
  assert any((a != b).any() for a, b in zip(leaves(3), leaves(4), strict=True))


def test_too_many_phrases():
  """At most `present_prompts` with objects, then absent ones; all of them in the long run."""
  present = [pair(f"p{i}", box_object(2 * i, 3, 4, 5)) for i in range(6)]
  absent = [pair(f"a{i}") for i in range(6)]
  seen: set[str] = set()
  for seed in range(40):
    phrases = phrases_of(row(absent + present, seed, box_only_probability=0.0))
    assert [phrase[0] for phrase in phrases] == ["p"] * 3 + ["a"] * 2
    assert len(set(phrases)) == 5
    seen |= set(phrases)
  assert len(seen) == 12


def test_largest_objects_are_kept():
  sizes = [3, 9, 2, 7, 5, 1, 8]
  objects = [box_object(6 * i, 10, 5, size) for i, size in enumerate(sizes)]
  got = row([pair("cat", *objects)], config=PLAIN)
  heights = np.rint(got.targets.boxes[0, :, 3] * HEIGHT).astype(int)
  assert heights.tolist() == [9, 7, 5, 8]
  assert got.targets.valid[0].all()


def test_crowds_and_non_exhaustive_pairs_are_left_out():
  pairs = [
    pair("crowd", box_object(1, 1, 5, 5), box_object(9, 9, 20, 20, crowd=True)),
    pair("unfinished", box_object(1, 1, 5, 5), exhaustive=False),
    pair("unfinished negative", exhaustive=False),
    pair("dog", box_object(20, 2, 8, 8)),
  ]
  assert [usable(one) for one in pairs] == [False, False, False, True]
  got = row(pairs, box_only_probability=0.0)
  assert phrases_of(got) == ["dog", "", "", "", ""]
  assert got.prompt_valid.sum() == 1
  assert row(pairs[:3]).prompt_valid.sum() == 0


def test_phrases_without_objects_after_cropping_are_absent():
  """They follow the phrases with objects, and remain valid prompts."""
  pairs = [pair("left", box_object(0, 0, 3, 36)), pair("right", box_object(45, 0, 3, 36))]
  pairs = [pair("west", *pairs[0].objects), pair("east", *pairs[1].objects)]
  lost = 0
  for seed in range(60):
    got = row(pairs, seed, crop_probability=1.0, min_crop_size=0.3, box_only_probability=0.5)
    check_invariants(got)
    assert got.prompt_valid.sum() == 2
    gone = 2 - int(got.targets.valid.any(axis=1).sum())
    phrases = phrases_of(got)[:2]
    assert phrases.count(BOXES_ALONE) <= 2 - gone
    lost += gone
  assert lost > 20


def test_box_of_a_cropped_object_is_that_of_its_visible_part():
  """Of an L: the box of its visible part, not its clipped box."""
  mask = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
  mask[0:2, 0:48] = 1  # an L: along the top and down the left
  mask[0:36, 0:2] = 1
  rle: Any = coco.encode(mask)
  pairs = [pair("corner", Object(rle, (0, 0, 48, 36)))]
  seen = 0
  for seed in range(60):
    got = row(pairs, seed, crop_probability=1.0, min_scale=1.0, flip_probability=0.0, mask_size=64)
    if got.targets.valid[0, 0]:
      grid = got.targets.masks[0, 0] > 0
      rows, columns = np.flatnonzero(grid.any(1)), np.flatnonzero(grid.any(0))
      cx, cy, w, h = got.targets.boxes[0, 0] * 64
      found = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
      # A cell with any coverage counts, so up to a cell wider.
      box = [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]
      np.testing.assert_allclose(box, found, atol=1.01)
      seen += 1
  assert seen > 10


@pytest.mark.parametrize(
  ("phrase", "flips"),
  [
    ("cat", True),
    ("leftover pizza", True),
    ("bright light", True),
    ("the left cat", False),
    ("RIGHT-hand glove", False),
    ("leftmost cat", False),
    ("cat on the right", False),
    ("righthand lane", False),
    ("counterclockwise arrow", False),
  ],
)
def test_no_flip_with_directional_phrases(phrase, flips):
  pairs = [pair("cat", box_object(4, 6, 10, 12)), pair(phrase)]
  config = DataConfig(**(vars(CONFIG) | {"min_scale": 1.0, "box_only_probability": 0.0}))
  turned = [
    (row(pairs, seed, config).images == resize(IMAGE, 64)[:, ::-1]).all() for seed in range(24)
  ]
  assert any(turned) == flips
  assert not all(turned)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"prompts_per_image": 0}, "data.prompts_per_image must be a whole number from 1; got 0"),
    ({"max_objects": 2.5}, "data.max_objects must be a whole number from 1; got 2.5"),
    ({"batch_size": True}, "data.batch_size must be a whole number from 1; got True"),
    ({"seed": -1}, "data.seed must be a whole number from 0; got -1"),
    ({"workers": -1}, "data.workers must be a whole number from 0; got -1"),
    ({"flip_probability": 1.5}, r"data.flip_probability must be in \[0, 1\]; got 1.5"),
    ({"crop_probability": float("nan")}, "data.crop_probability must be a finite number; got nan"),
    ({"present_prompts": 9}, "data.present_prompts is 9, but data.prompts_per_image only 8"),
    ({"box_only_probability": 0.6, "text_and_box_probability": 0.5}, "must add up to at most 1"),
    ({"min_scale": 0.0}, "must be greater than 0"),
    ({"min_crop_size": 0.0}, "must be greater than 0"),
  ],
  ids=str,
)
def test_invalid_settings_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    DataConfig(**options)
