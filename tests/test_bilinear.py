"""Bilinear resize on the device against PyTorch's rule and Pillow's."""

import functools

import jax
import numpy as np
import pytest
from PIL import Image
from support import QUICK, assert_close

from sam3_jax.ops.bilinear import matrix, resize
from sam3_jax.outputs.masks import interpolate

SIZES = [((48, 48), (168, 168)), ((7, 9), (120, 161)), ((120, 160), (48, 48)), ((5, 1), (1, 5))]


@functools.partial(jax.jit, static_argnames=("size", "antialias"), compiler_options=QUICK)
def run(maps, size, antialias):
  return resize(maps, size, antialias=antialias)


@pytest.mark.parametrize(("source", "size"), SIZES)
def test_equals_pytorch(source, size):
  """`interpolate` equals PyTorch's bilinear resize without antialias; see test_masks.py."""
  maps = np.random.default_rng(0).standard_normal((2, *source)).astype(np.float32)
  want = np.stack([interpolate(one, size) for one in maps])
  assert_close(run(maps, size, False), want, rel=1.5e-6)  # measured 1.5e-7


@pytest.mark.parametrize(("source", "size"), SIZES)
def test_antialias_equals_pillow(source, size):
  one = np.random.default_rng(1).standard_normal(source).astype(np.float32)
  want = np.asarray(Image.fromarray(one).resize(size[::-1], Image.Resampling.BILINEAR))
  assert_close(run(one, size, True), want, rel=1e-5)  # measured 3.9e-6: its weights are float64


def test_antialias_matters_only_where_a_side_shrinks():
  np.testing.assert_allclose(matrix(48, 96, True), matrix(48, 96, False), atol=1e-6)
  assert (matrix(160, 48, True) != matrix(160, 48, False)).any()


def test_maps_of_the_right_size_are_returned():
  maps = np.ones((3, 4, 5), np.float32)
  assert resize(jax.numpy.asarray(maps), (4, 5)).shape == (3, 4, 5)
  np.testing.assert_array_equal(run(maps, (4, 5), True), maps)
