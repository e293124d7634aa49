"""Region pooling and point sampling, against float64 loops over all samples."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import assert_close, normal

from sam3_jax.model.geometry import _sample
from sam3_jax.ops.roi_align import roi_align

jitted = jax.jit(roi_align, static_argnums=2)


def plain_roi_align(features, box, size):
  """torchvision's roi_align(aligned=False, sampling_ratio=-1), sample by sample; box in cells."""
  height, width, channels = features.shape
  x0, y0, x1, y1 = np.float32(box)
  bin_w, bin_h = max(x1 - x0, 1) / size, max(y1 - y0, 1) / size
  samples_x, samples_y = math.ceil(bin_w), math.ceil(bin_h)
  out = np.zeros((size, size, channels))
  for i, j in np.ndindex(size, size):
    for iy, ix in np.ndindex(samples_y, samples_x):
      y = y0 + i * bin_h + (iy + 0.5) * bin_h / samples_y
      x = x0 + j * bin_w + (ix + 0.5) * bin_w / samples_x
      if -1 <= y <= height and -1 <= x <= width:
        out[i, j] += plain_bilinear(features, max(y, 0), max(x, 0))
    out[i, j] /= samples_y * samples_x
  return out


def plain_bilinear(features, y, x):
  height, width = features.shape[:2]
  low_y, low_x = min(int(y), height - 1), min(int(x), width - 1)
  high_y, high_x = min(low_y + 1, height - 1), min(low_x + 1, width - 1)
  y, x = min(y, height - 1), min(x, width - 1)
  dy, dx = y - low_y, x - low_x
  top = features[low_y, low_x] * (1 - dx) + features[low_y, high_x] * dx
  bottom = features[high_y, low_x] * (1 - dx) + features[high_y, high_x] * dx
  return top * (1 - dy) + bottom * dy


BOXES = {
  "whole": (0, 0, 1, 1),
  "inside": (0.21, 0.33, 0.62, 0.88),
  "tiny": (0.401, 0.302, 0.402, 0.303),
  "point": (0.5, 0.5, 0.5, 0.5),
  "reversed": (0.6, 0.7, 0.3, 0.2),
  "left and above": (-0.4, -0.3, 0.3, 0.4),
  "right and below": (0.7, 0.8, 1.4, 1.3),
  "around": (-0.4, -0.4, 1.5, 1.4),
  "outside": (1.5, 1.5, 2, 2),
  "on cells": (0.25, 0.25, 0.75, 0.75),
}


@pytest.mark.parametrize(
  ("height", "width", "size"), [(16, 16, 7), (20, 9, 3), (3, 30, 7), (5, 5, 1), (1, 1, 7)]
)
def test_roi_align(height, width, size):
  features, boxes = normal(0, 2, height, width, 5), np.float32([[*BOXES.values()]] * 2)
  boxes[1] += 0.037
  got = jitted(features, boxes, size)
  scale = np.float32([width, height, width, height])
  want = [
    [plain_roi_align(np.float64(one), box * scale, size) for box in some]
    for one, some in zip(features, boxes, strict=True)
  ]
  assert_close(got, np.array(want), rel=1e-5)  # measured 1.9e-6


def test_roi_align_without_boxes_or_maps():
  assert jitted(jnp.ones((2, 4, 4, 3)), jnp.ones((2, 0, 4)), 7).shape == (2, 0, 7, 7, 3)
  assert jitted(jnp.ones((0, 4, 4, 3)), jnp.ones((0, 2, 4)), 7).shape == (0, 2, 7, 7, 3)


def test_roi_align_of_a_constant_map():
  boxes = jnp.asarray([[BOXES["whole"], BOXES["inside"], BOXES["tiny"]]], jnp.float32)
  got = jitted(jnp.full((1, 72, 72, 2), 3.0), boxes, 7)
  assert_close(got, np.full((1, 3, 7, 7, 2), 3.0), rel=1e-6)  # measured 1.6e-7


@pytest.mark.parametrize(("height", "width"), [(12, 12), (5, 9), (1, 1)])
def test_samples_at_points(height, width):
  """grid_sample with zeros outside, where the corners of the image are corners of cells."""
  image = np.random.default_rng(0).standard_normal((height, width, 3)).astype(np.float32)
  xy = np.random.default_rng(1).uniform(-0.3, 1.3, (40, 2)).astype(np.float32)
  xy = np.concatenate([xy, [[0, 0], [1, 1], [0.5, 0.5], [-1, 0.5], [3, 3]]]).astype(np.float32)
  want = np.zeros((len(xy), 3))
  for point, (x, y) in zip(want, xy * [width, height] - 0.5, strict=True):
    for row in (math.floor(y), math.floor(y) + 1):
      for column in (math.floor(x), math.floor(x) + 1):
        if 0 <= row < height and 0 <= column < width:
          point += (1 - abs(y - row)) * (1 - abs(x - column)) * image[row, column]
  assert_close(_sample(jnp.asarray(image), jnp.asarray(xy)), want, rel=5e-6)  # measured 5.4e-7


def test_no_points():
  assert _sample(jnp.ones((4, 4, 3)), jnp.zeros((0, 2))).shape == (0, 3)
