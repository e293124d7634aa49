"""IoU of boxes and masks, and the box around a mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam3_jax.ops.boxes import iou, iou_and_giou
from sam3_jax.ops.masks import mask_iou, mask_to_box


class TestIou:
  BOXES = np.array([[0, 0, 2, 2], [1, 1, 3, 3], [5, 5, 5, 9], [0, 0, 1, 4]], np.float32)

  @pytest.mark.parametrize("xp", [np, jnp])
  def test_by_counting_cells(self, xp):
    """Of whole numbers, against masks."""
    masks = np.zeros((4, 10, 10), bool)
    for mask, (x0, y0, x1, y1) in zip(masks, self.BOXES.astype(int), strict=True):
      mask[y0:y1, x0:x1] = True
    boxes = xp.asarray(self.BOXES)
    got = iou(boxes[:, None], boxes[None])
    assert isinstance(got, jax.Array) == (xp is jnp)
    want = [[mask_iou(mask, other) for other in masks] for mask in masks]
    np.testing.assert_allclose(got, want, rtol=1e-6)  # measured 6e-8

  def test_generalized(self):
    boxes, other = self.BOXES[:2], np.array([[2, 0, 4, 2]], np.float32)
    overlap, generalized = iou_and_giou(boxes, other)
    np.testing.assert_allclose(overlap, [0, 1 / 7], rtol=1e-6)
    np.testing.assert_allclose(generalized, [0, 1 / 7 - 2 / 9], rtol=1e-6)


def test_mask_to_box():
  mask = np.zeros((6, 8), bool)
  assert mask_to_box(mask) == (0, 0, 0, 0)
  mask[2:4, 3:7] = True
  assert mask_to_box(mask) == (3, 2, 7, 4)
