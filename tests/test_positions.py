"""Sine encodings, rotary positions and windows against loops and complex numbers."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from support import assert_close, normal

from sam3_jax.model.positions import sine_code, sine_map
from sam3_jax.model.rope import rope_table, rotate
from sam3_jax.model.vit import from_windows, to_windows


@pytest.mark.parametrize("channels", [2, 8, 128])
def test_sine_code(channels):
  x = np.linspace(-0.2, 1.2, 9, dtype=np.float32)
  want = np.zeros((9, channels))
  for row, value in zip(want, x, strict=True):
    for i in range(channels):
      angle = 2 * math.pi * value / 10000 ** (2 * (i // 2) / channels)
      row[i] = math.cos(angle) if i % 2 else math.sin(angle)
  assert_close(sine_code(jnp.asarray(x), channels), want, rel=2e-6)  # measured 2.4e-7


def test_sine_map():
  height, width, channels = 3, 5, 16
  want = np.zeros((height, width, channels))
  for y, x, i in np.ndindex(want.shape):
    fraction = (y + 1) / (height + 1e-6) if i < channels // 2 else (x + 1) / (width + 1e-6)
    angle = 2 * math.pi * fraction / 10000 ** (2 * (i % 8 // 2) / (channels // 2))
    want[y, x, i] = math.cos(angle) if i % 2 else math.sin(angle)
  assert_close(sine_map(height, width, channels), want, rel=2e-6)  # measured 2.4e-7


@pytest.mark.parametrize(("side", "scale", "channels"), [(4, 1.0, 8), (12, 1 / 3, 16), (1, 1.0, 4)])
def test_rotary_positions(side, scale, channels):
  """Complex multiplication with the pairs in adjacent channels, as in Meta's code."""
  x = normal(0, 2, side**2, 3, channels)
  frequencies = 10000 ** (-4 * np.arange(channels // 4) / channels)
  row, column = divmod(np.arange(side**2), side)
  angles = [np.outer(scale * cell, frequencies) for cell in (column, row)]
  rotation = np.exp(1j * np.concatenate(angles, axis=1))[:, None]
  want = (np.float64(x[..., 0::2]) + 1j * np.float64(x[..., 1::2])) * rotation

  halves = jnp.concatenate([x[..., 0::2], x[..., 1::2]], axis=-1)
  got = np.asarray(rotate(halves, rope_table(side, scale, channels)))
  real, imaginary = np.split(got, 2, axis=-1)
  assert_close(real, want.real, rel=6e-7)  # measured 6.3e-8
  assert_close(imaginary, want.imag, rel=6e-7)  # measured 6.9e-8
  assert_close(
    np.linalg.norm(got, axis=-1), np.linalg.norm(x, axis=-1), rel=1e-6
  )  # measured 1.0e-7


def test_rotation_keeps_the_dtype():
  x = normal(0, 1, 4, 1, 8).astype(jnp.bfloat16)
  assert rotate(x, rope_table(2, 1.0, 8)).dtype == jnp.bfloat16


@pytest.mark.parametrize(("side", "window"), [(12, 4), (6, 2), (4, 4), (1, 1), (3, 1)])
def test_window_partition_and_its_inverse(side, window):
  x = np.arange(2 * side**2 * 3, dtype=np.float32).reshape(2, side**2, 3)
  grid = x.reshape(2, side, side, 3)
  want = [
    grid[:, y : y + window, x : x + window].reshape(2, -1, 3)
    for y in range(0, side, window)
    for x in range(0, side, window)
  ]
  windows = to_windows(jnp.asarray(x), side, window)
  np.testing.assert_array_equal(windows, np.concatenate(want, axis=1))
  np.testing.assert_array_equal(from_windows(windows, side, window), x)
