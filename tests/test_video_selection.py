"""Frame selection, groups and masks of the video tracker against Meta's functions
(goldens/video/functions.npz) and their rules."""

import numpy as np
import pytest
from golden_model import GOLDENS

from sam3_jax.inference.video import selection
from sam3_jax.inference.video.components import clean_mask
from sam3_jax.inference.video.functions import (
  ABSENT_LOGIT,
  TrackedObjects,
  separate_objects,
  without_overlap,
)


@pytest.fixture(scope="module")
def functions():
  return dict(np.load(GOLDENS / "video" / "functions.npz"))


def test_closest_conditioning(functions):
  frames = [0, 3, 16, 17, 32, 48, 64]
  for frame, *chosen in functions["closest"].tolist():
    assert selection.closest_conditioning(frames, frame, 4) == chosen
  assert selection.closest_conditioning([8, 2, 5], 3, 4) == [8, 2, 5]


def test_previous_frames(functions):
  scores = {t: x for t, x in enumerate(functions["filter.scores"].tolist()) if x == x}
  for name in ("filter.1", "filter.2", "filter.9", "filter.12", "filter.30"):
    frame = int(name.partition(".")[2])
    chosen = selection.previous_frames(scores, frame, length=30, min_score=0.01)
    assert chosen == functions[name].tolist(), name
  for frame in (12, 20):
    chosen = selection.previous_frames(scores, frame, length=30, min_score=0.01, reverse=True)
    assert chosen == functions[f"filter_reverse.{frame}"].tolist()


def test_frame_score(functions):
  got = selection.frame_score(functions["score.object"][:, 0], functions["score.iou"])
  want = float(functions["score.selection"])
  assert abs(got - want) <= 1e-6 * want  # measured 1e-7


@pytest.mark.parametrize("area", [4, 16])
def test_holes_and_islands(functions, area):
  for mask, want in zip(functions["holes.masks"], functions[f"holes.{area}"], strict=True):
    np.testing.assert_array_equal(clean_mask(mask[0], area), want[0])


def test_holes_on_odd_grid(functions):
  for mask, want in zip(functions["holes.odd_in"], functions["holes.odd"], strict=True):
    np.testing.assert_array_equal(clean_mask(mask[0], 16), want[0])


def test_overlap_within_groups(functions):
  masks = functions["overlap.masks"][:, 0]
  one = np.zeros(6, np.int32)
  order = np.arange(6, dtype=np.int32)
  np.testing.assert_array_equal(
    without_overlap(masks, one, order), functions["overlap.pixel"][:, 0]
  )
  np.testing.assert_array_equal(without_overlap(masks, order, one), masks)
  mixed = np.asarray(without_overlap(masks, np.int32([0, 1, 0, 1, 0, 5]), order))
  alone = np.asarray(without_overlap(masks[:5:2], one[:3], order[:3]))
  np.testing.assert_array_equal(mixed[:5:2], alone)


def test_first_of_equal_objects_keeps_cells():
  masks = np.ones((3, 2, 2), np.float32)
  got = np.asarray(without_overlap(masks, np.zeros(3, np.int32), np.int32([2, 0, 1])))
  np.testing.assert_array_equal(got[:, 0, 0], [-10, 1, -10])


def test_separate_objects(functions):
  """Cells as without overlap; objects that lose most of their cells are those that Meta's video
  model clamps."""
  masks = functions["overlap.masks"][:, 0]
  found = TrackedObjects(masks, np.ones(6), np.full(6, 3, np.float32), np.zeros((6, 8)))
  got = separate_objects(found, 0.3)
  lost = functions["overlap.shrinkage"][:, 0].max(axis=(1, 2)) <= -10
  assert 0 < lost.sum() < 6
  np.testing.assert_array_equal(got.object_logit, np.where(lost, -10, 3))
  kept = np.where(lost[:, None, None], ABSENT_LOGIT, functions["overlap.pixel"][:, 0])
  np.testing.assert_array_equal(got.mask_logits, kept)


def test_separate_objects_leave_absent_objects_absent():
  masks = np.full((3, 4, 4), ABSENT_LOGIT, np.float32)
  masks[1, :2] = 1
  logits = np.float32([-3, 2, -20])
  got = separate_objects(TrackedObjects(masks, np.ones(3), logits, np.zeros((3, 8))), 0.3)
  np.testing.assert_array_equal(got.object_logit, logits)
  np.testing.assert_array_equal(np.asarray(got.mask_logits) > 0, masks > 0)


def test_oldest_selected_frame_gives_no_pointer():
  reading = selection.plan_reading([0], [1, 2, 3], {1, 2, 3}, 4, memories=7, length=12)
  assert reading.memories == [(0, 6), (1, 2), (2, 1), (3, 0)]
  assert reading.pointers == [(0, 4 / 11), (3, 1 / 11), (2, 2 / 11)]


def test_missing_neighbor_leaves_its_place_empty():
  reading = selection.plan_reading([6], [2, 4, 6], {2, 4}, 7, memories=7, length=None)
  assert reading.memories == [(6, 6), (2, 2), (4, 1)]
  assert reading.pointers == [(6, 1 / 15), (4, 2 / 15)]


def test_backward_reads_no_pointer_of_future_prompts():
  reading = selection.plan_reading([0], [], (), 11, memories=7, length=12, reverse=True)
  assert reading.memories == [(0, 6)]
  assert reading.pointers == []
