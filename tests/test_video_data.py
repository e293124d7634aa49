"""Clips for training: shapes, masks that match the frames, prompts on the objects, resuming."""

import dataclasses

import jax
import numpy as np
import pytest

from sam3_jax.datasets.synthetic import drawings, moving_scenes
from sam3_jax.training.video_data import ClipBatches
from sam3_jax.training.video_examples import BOX, CLICK, MASK, ClipConfig, clip_example

CONFIG = ClipConfig(
  batch_size=2, count=6, frames=4, size=(80, 112), image_size=56, mask_size=28, prefetch=0
)


def clip(*seed, **changes):
  config = dataclasses.replace(CONFIG, **changes)
  return clip_example(3, config, np.random.default_rng(seed))


@pytest.fixture(scope="module")
def many():
  return [clip(4, number) for number in range(24)]


def test_shapes(many):
  one = many[0]
  assert one.frames.shape == (4, 56, 56, 3)
  assert one.masks.shape == (4, 3, 28, 28)
  assert one.masks.dtype == one.frames.dtype == np.uint8
  assert one.visible.shape == (4, 3)
  assert one.xy.shape == (3, 2, 2)
  assert one.labels.shape == (3, 2)
  assert one.ids == 3
  assert one.sizes.tolist() == [80, 112]
  assert {jax.tree.structure(each) for each in many} == {jax.tree.structure(one)}


def test_objects_are_visible_in_the_first_frame(many):
  for one in many:
    assert one.valid.any()
    assert one.visible[0].tolist() == one.valid.tolist()
    assert (one.masks[0].any(axis=(1, 2)) == one.valid).all()
    assert (one.masks.sum(axis=1, dtype=int) <= 257).all()  # disjoint, but rounded
    assert not one.masks[~one.visible].any()
  assert {int(one.valid.sum()) for one in many} == {1, 2, 3}
  assert not np.all([one.visible[:, one.valid].all() for one in many])


def test_masks_lie_where_the_objects_are(many):
  """Frames without flips, noise or backward clips are those of the scene."""
  generator = np.random.default_rng(9)
  one = clip(9, flip_probability=0, reverse_probability=0, max_objects=6)
  stride = int(generator.integers(1, CONFIG.max_stride + 1))
  scene = moving_scenes.compose(
    generator, drawings.TRAINING, CONFIG.size, 3 * stride + 1, augment=0.0
  )
  for t in range(4):
    frame = scene[stride * t]
    objects = frame.owners >= 0
    covered = one.masks[t].sum(axis=0) / 255
    assert covered.mean() == pytest.approx(objects.mean(), abs=0.02)
    row, column = np.unravel_index(covered.argmax(), covered.shape)
    assert objects[round((row + 0.5) * 80 / 28 - 0.5), round((column + 0.5) * 4 - 0.5)]


def test_prompts(many):
  kinds = {MASK: 0, BOX: 0, CLICK: 0}
  for one in many:
    kinds[int(one.kind)] += 1
    for slot in np.flatnonzero(one.valid):
      cells = one.masks[0, slot]
      if one.kind == MASK:
        assert (one.labels[slot] == -1).all()
      elif one.kind == CLICK:
        assert one.labels[slot].tolist() == [1, -1]
        column, row = (one.xy[slot, 0] * 28).astype(int)
        assert cells[row, column] > 0
      else:
        assert one.labels[slot].tolist() == [2, 3]
        rows, columns = np.nonzero(cells > 127)
        if len(rows) > 20:
          center = np.array([np.median(columns), np.median(rows)]) / 28
          assert (one.xy[slot, 0] - 0.05 < center).all()
          assert (center < one.xy[slot, 1] + 0.05).all()
    assert (one.labels[~one.valid] == -1).all()
  assert min(kinds.values()) >= 2
  assert kinds[MASK] > kinds[BOX]


def test_corrected_frames(many):
  counts = [int(one.corrected.sum()) for one in many]
  assert set(counts) == {0, 1, 2}
  assert not any(one.corrected[0] for one in many)
  assert not clip(1, correction_probability=0).corrected.any()
  assert not clip(1, max_corrected=0).corrected.any()


def test_flips_and_backward_clips():
  """Flips mirror frames, masks and clicks together."""
  plain, flipped = (
    clip(7, flip_probability=p, mask_probability=0, box_probability=0, reverse_probability=0)
    for p in (0, 1)
  )
  assert np.array_equal(plain.frames[:, :, ::-1], flipped.frames)
  difference = plain.masks[..., ::-1].astype(int) - flipped.masks
  assert np.abs(difference).max() <= 1  # rounding
  valid = plain.valid
  assert np.allclose(plain.xy[valid, 0, 0], 1 - flipped.xy[valid, 0, 0], atol=1e-6)
  assert np.array_equal(plain.xy[valid, 0, 1], flipped.xy[valid, 0, 1])


def test_batches_resume(monkeypatch):
  batches = ClipBatches(CONFIG)
  first = [next(batches) for _ in range(2)]
  state = batches.get_state()
  third = next(batches)
  assert first[0].frames.shape == (2, 4, 56, 56, 3)
  assert first[1].ids.tolist() == [2, 3]
  again = ClipBatches(CONFIG)
  again.set_state(state)
  for a, b in zip(jax.tree.leaves(next(again)), jax.tree.leaves(third), strict=True):
    assert np.array_equal(a, b)
  with pytest.raises(ValueError, match=r"saved with seed 0, but seed is now 5"):
    ClipBatches(dataclasses.replace(CONFIG, seed=5)).set_state(state)
  assert batches.name(4) == "moving scene 4 of seed 0"


def test_processes_share_a_batch():
  whole = next(ClipBatches(CONFIG))
  parts = [next(ClipBatches(CONFIG, process=k, processes=2)) for k in range(2)]
  assert np.array_equal(np.concatenate([part.frames for part in parts]), whole.frames)


def test_scenes_of_the_next_epoch_differ():
  batches = ClipBatches(dataclasses.replace(CONFIG, count=2))
  first, second = next(batches), next(batches)
  assert first.ids.tolist() == second.ids.tolist() == [0, 1]
  assert not np.array_equal(first.frames, second.frames)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"frames": 1}, "clips.frames must be"),
    ({"styles": ("twemoji",)}, "clips.styles must be of the training styles noto"),
    ({"mask_probability": 0.9}, "0.9 and clips.box_probability 0.25 must add up to at most 1"),
    ({"max_corrected": 4}, "clips.max_corrected 4 must be less than clips.frames 4"),
    ({"size": (20, 80)}, r"at least 64; got \[20, 80\]"),
    ({"min_scale": 0.0}, "clips.min_scale must be greater than 0"),
  ],
)
def test_invalid_configurations(changes, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(CONFIG, **changes)


def test_invalid_batches():
  with pytest.raises(ValueError, match="batches need the sizes of images and masks"):
    ClipBatches(ClipConfig())
  with pytest.raises(ValueError, match="batch_size 2 must be a multiple of the 3 processes"):
    ClipBatches(CONFIG, processes=3)


def test_drawings_of_evaluation_are_never_used(monkeypatch):
  used = []
  real = drawings.drawings
  monkeypatch.setattr(drawings, "drawings", lambda style: used.append(style) or real(style))
  for number in range(12):
    clip(number, styles=())
  assert set(used) == set(drawings.TRAINING)
