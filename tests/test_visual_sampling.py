"""Prompts sampled for training the head for visual prompts: clicks, boxes, corrections."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import QUICK
from visual_targets import SIDE, sample, targets

from sam3_jax.training import visual
from sam3_jax.training.visual import VisualConfig

corrective_click = jax.jit(visual.corrective_click, compiler_options=QUICK)


def cells(xy):
  return np.floor(np.asarray(xy) * SIDE).astype(int)[..., ::-1]  # row, column


@pytest.mark.parametrize("scale", [1, 2])
def test_clicks_are_on_objects_or_background(scale):
  given = targets(np.random.default_rng(0), scale=scale)
  config = VisualConfig(
    prompts_per_image=200, rounds=3, box_probability=0.0, background_click_probability=0.5
  )
  sampled = jax.device_get(sample(jax.random.key(0), given, SIDE, config))
  assert sampled.xy.shape == (600, 5, 2)
  assert (sampled.labels == [-1, -1, 1, -1, -1]).all()
  assert sampled.valid.all()
  assert sampled.image.tolist() == np.repeat(np.arange(3), 200).tolist()
  pooled = given.masks.reshape(3, 4, SIDE, scale, SIDE, scale).mean((3, 5)) / 255
  drawn = np.zeros((3, 2), int)  # of each image's two objects
  for image, (row, column), covered in zip(
    sampled.image, cells(sampled.xy[:, 2]), sampled.covered, strict=True
  ):
    there = pooled[image][[0, 2]]  # the valid ones
    if covered.any():
      assert covered[row, column] == 1
      (which,) = {i for i in (0, 1) if np.array_equal(there[i], covered)} or {0}
      drawn[image, which] += 1
    else:
      assert there.max(0)[row, column] == 0
  assert drawn.min() > 30  # of some 50
  nothing = (~sampled.covered.any((1, 2))).mean()
  assert 0.4 < nothing < 0.6


def test_boxes_are_near_their_objects():
  given = targets(np.random.default_rng(1))
  config = VisualConfig(
    prompts_per_image=100,
    rounds=1,
    box_probability=1.0,
    background_click_probability=0.5,
    box_noise=0.1,
  )
  sampled = jax.device_get(sample(jax.random.key(0), given, SIDE, config))
  assert (sampled.labels == [2, 3, -1]).all()
  moves = []
  for (first, last, _), inside in zip(sampled.xy, sampled.inside, strict=True):
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    box = np.array([[columns[0], rows[0]], [columns[-1] + 1, rows[-1] + 1]]) / SIDE
    assert (last >= first).all()
    moves.append((np.array([first, last]) - box) / (box[1] - box[0]))
  assert np.abs(moves).max() <= 0.5
  assert 0.03 < np.std(moves) < 0.12  # 0.1, and less where the limit in pixels is lower


def test_boxes_without_noise_and_objects_smaller_than_a_cell():
  given = targets(np.random.default_rng(2), images=1, rows=1)
  masks = given.masks // 4  # no cell is half covered
  sampled = sample(
    jax.random.key(1),
    given.replace(masks=masks),
    SIDE,
    VisualConfig(box_probability=1.0, box_noise=0.0),
  )
  x, y, w, h = given.boxes[0, 0, 0]
  np.testing.assert_allclose(
    sampled.xy[0, :2], [[x - w / 2, y - h / 2], [x + w / 2, y + h / 2]], atol=1e-6
  )
  np.testing.assert_array_equal(sampled.inside[0], masks[0, 0, 0] > 0)


def test_images_without_objects_or_without_background():
  given = targets(np.random.default_rng(3))
  none = given.replace(valid=np.zeros_like(given.valid))
  assert not sample(jax.random.key(0), none, SIDE, VisualConfig()).valid.any()
  full = given.replace(masks=np.full_like(given.masks, 255))
  sampled = sample(
    jax.random.key(0),
    full,
    SIDE,
    VisualConfig(box_probability=0.0, background_click_probability=1.0),
  )
  assert not sampled.valid.any()


def test_corrective_clicks_are_where_the_mask_is_wrong():
  rng = np.random.default_rng(4)
  mask, inside = (rng.random((64, SIDE, SIDE)) < 0.3 for _ in range(2))
  mask[0] = inside[0]  # no fault
  mask[1] = inside[1] = False  # nor an object
  mask[2], inside[2] = True, False
  xy, labels = corrective_click(jax.random.key(0), jnp.asarray(mask), jnp.asarray(inside))
  for i, (row, column) in enumerate(cells(xy)):
    assert labels[i] == inside[i, row, column]
    assert (mask[i, row, column] != inside[i, row, column]) == (i > 1)
  assert (labels[0], labels[1], labels[2]) == (1, 0, 0)
  assert {0, 1} == set(np.asarray(labels[3:]).tolist())
