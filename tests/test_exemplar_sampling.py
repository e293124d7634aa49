"""Exemplar boxes of training rows: how often, with which noise, and negative ones."""

from typing import Any

import numpy as np
import pytest
from example_rows import (
  CONFIG,
  PAIRS,
  box_object,
  check_invariants,
  pair,
  phrases_of,
  row,
  tokenize,
)
from pycocotools import mask as coco

from sam3_jax.datasets.annotations import Object, Pair
from sam3_jax.inputs.prompts import BOXES_ALONE
from sam3_jax.training.examples import DataConfig, TrainingImage, example


def test_probabilities_of_boxes_and_phrases():
  """Of phrases, boxes and both; absent phrases have no boxes."""
  kinds = {"text": 0, "box": 0, "both": 0}
  counts = []
  for seed in range(300):
    got = row(
      PAIRS,
      seed,
      box_only_probability=0.3,
      text_and_box_probability=0.2,
      negative_box_probability=0.0,
    )
    check_invariants(got)
    phrases = phrases_of(got)
    for i in np.flatnonzero(got.targets.valid.any(axis=1)):
      boxes = got.box_valid[i].sum()
      visual = phrases[i] == BOXES_ALONE
      assert boxes or not visual
      kinds["box" if visual else "both" if boxes else "text"] += 1
      if boxes:
        counts.append(int(boxes))
      assert boxes <= got.targets.valid[i].sum()
  shares = {kind: count / 600 for kind, count in kinds.items()}
  assert abs(shares["box"] - 0.3) < 0.06
  assert abs(shares["both"] - 0.2) < 0.06
  assert set(counts) == {1, 2}


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_box_only_probability_of_0_and_1(share):
  for seed in range(10):
    got = row(PAIRS, seed, box_only_probability=share, text_and_box_probability=0.0)
    assert got.box_valid.any(axis=1).sum() == 2 * share
    assert phrases_of(got).count(BOXES_ALONE) == 2 * share


def test_box_noise_is_bounded():
  """A tenth of the box's size per side, at most the limit, inside the image."""
  options = {
    "box_only_probability": 1.0,
    "text_and_box_probability": 0.0,
    "min_scale": 1.0,
    "flip_probability": 0.0,
  }
  options |= {"negative_box_probability": 0.0, "max_exemplars": 1, "box_noise_limit": 4 / 64}
  pairs = [pair("cat", box_object(8, 6, 32, 24))]
  moved = []
  for seed in range(200):
    got = row(pairs, seed, **options)
    cx, cy, w, h = got.boxes[0, 0].astype(float)
    want = [8 / 48, 6 / 36, 40 / 48, 30 / 36]
    moved.append(np.array([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]) - want)
  moved = np.array(moved)
  assert np.abs(moved).max() <= 4 / 64 + 1e-6
  # Normal with deviation 0.1 * 2 / 3, cut at 0.9375 of it: deviation about 0.0467.
  assert np.all((moved.std(axis=0) > 0.04) & (moved.std(axis=0) < 0.053))
  assert np.abs(moved.mean(axis=0)).max() < 0.01
  still = row(pairs, 0, **options, box_noise=0.0)
  np.testing.assert_allclose(still.boxes[0, 0], [0.5, 0.5, 2 / 3, 2 / 3], atol=1e-6)


def test_noisy_boxes_stay_inside_the_unpadded_image():
  pairs = [pair("cat", box_object(0, 0, 48, 36))]
  for seed in range(40):
    got = row(
      pairs,
      seed,
      box_only_probability=1.0,
      text_and_box_probability=0.0,
      min_scale=0.4,
      mask_size=64,
    )
    cells = np.argwhere(got.targets.masks[0, 0] > 0)
    cx, cy, w, h = got.boxes[0, 0] * 64
    assert cx - w / 2 >= cells[:, 1].min() - 1e-3
    assert cx + w / 2 <= cells[:, 1].max() + 1 + 1e-3
    assert cy - h / 2 >= cells[:, 0].min() - 1e-3
    assert cy + h / 2 <= cells[:, 0].max() + 1 + 1e-3


def test_negative_boxes_are_on_other_objects():
  """Not on objects that the phrase names too: "fruit" and "red fruit" share one."""
  shared, other = box_object(4, 6, 10, 12), box_object(30, 20, 6, 8)
  pairs = [pair("fruit", shared, other), pair("red fruit", shared)]
  options = {
    "box_only_probability": 0.0,
    "text_and_box_probability": 1.0,
    "negative_box_probability": 1.0,
    "box_noise": 0.0,
  }
  for seed in range(20):
    got = row(pairs, seed, min_scale=1.0, flip_probability=0.0, **options)
    phrases = phrases_of(got)
    fruit, red = phrases.index("fruit"), phrases.index("red fruit")
    negative = got.box_valid & ~got.positive
    assert negative[fruit].sum() == 0
    assert negative[red].sum() == 1
    np.testing.assert_allclose(
      got.boxes[red][negative[red]][0], [33 / 48, 24 / 36, 6 / 48, 8 / 36], atol=1e-6
    )


def test_no_negative_box_if_exemplars_are_full():
  pairs = [pair("cat", box_object(4, 6, 10, 12)), pair("dog", box_object(30, 20, 6, 8))]
  got = row(
    pairs,
    box_only_probability=0.0,
    text_and_box_probability=1.0,
    negative_box_probability=1.0,
    max_exemplars=1,
  )
  assert (got.positive == got.box_valid).all()


def test_image_of_one_pixel():
  mask: Any = coco.encode(np.ones((1, 1), np.uint8, order="F"))
  one = Pair(0, "a.png", 1, 1, "dot", True, (Object(mask, (0, 0, 1, 1)),))
  image = TrainingImage(np.full((1, 1, 3), 200, np.uint8), [one])
  for seed in range(5):
    config = DataConfig(
      **(
        vars(CONFIG)
        | {"crop_probability": 1.0, "box_only_probability": 1.0, "text_and_box_probability": 0.0}
      )
    )
    got = example(image, 0, config, tokenize, np.random.default_rng(seed))
    check_invariants(got, config)
    assert got.targets.valid.sum() == 1
