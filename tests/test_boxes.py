"""Conversions of box formats, and refinement of boxes in logit space."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit, logit
from support import assert_close, normal

from sam3_jax.ops.boxes import cxcywh_to_xyxy, inverse_sigmoid, refine, xyxy_to_cxcywh


@pytest.mark.parametrize("shape", [(4,), (0, 4), (1, 4), (3, 5, 4)])
def test_conversions_and_their_inverses(shape):
  boxes = normal(0, *shape)
  x0, y0, x1, y1 = np.moveaxis(np.float64(boxes), -1, 0)
  want = np.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], axis=-1)
  assert_close(xyxy_to_cxcywh(boxes), want, rel=4e-7)  # measured 5e-8
  assert_close(cxcywh_to_xyxy(xyxy_to_cxcywh(boxes)), boxes, rel=4e-7)  # measured 5e-8
  assert_close(xyxy_to_cxcywh(cxcywh_to_xyxy(boxes)), boxes, rel=4e-7)  # measured 5e-8


def test_corners_of_a_known_box():
  assert cxcywh_to_xyxy(jnp.array([5.0, 3.0, 2.0, 4.0])).tolist() == [4, 1, 6, 5]


def test_inverse_sigmoid():
  x = np.linspace(0.002, 0.998, 99, dtype=np.float32)
  assert_close(inverse_sigmoid(jnp.asarray(x)), logit(np.float64(x)), rel=2e-7)  # measured 2.7e-8
  limit = math.log(1 / 1e-3)
  # Numerator and denominator are clipped separately, so 5e-4 differs from 1e-3.
  ends = {-3: -limit, 0: -limit, 5e-4: math.log(1e-3 / (1 - 5e-4)), 1: limit, 7: limit}
  got = inverse_sigmoid(jnp.asarray([*ends], jnp.float32))
  assert_close(got, np.array([*ends.values()]), rel=1e-7)  # measured 1.4e-8


def test_refine():
  boxes, delta = jnp.asarray(expit(np.float32(normal(0, 6, 4)))), normal(1, 6, 4)
  assert_close(refine(boxes, 0 * delta), boxes, rel=7e-7)  # measured 7.5e-8
  want = expit(logit(np.float64(boxes)) + np.float64(delta))
  assert_close(refine(boxes, delta), want, rel=4e-7)  # measured 5e-8
