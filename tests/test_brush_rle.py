"""Label Studio's run-length encoding, decoded bit by bit."""

import numpy as np
import pytest

from sam3_jax.server.brush_rle import encode_brush


def decoded(data: list[int]) -> np.ndarray:
  """The values of a stream, read as the format says."""
  bits = "".join(f"{byte:08b}" for byte in data)
  position = 0

  def read(count: int) -> int:
    nonlocal position
    position += count
    return int(bits[position - count : position], 2)

  total, value_bits = read(32), read(5) + 1
  widths = [read(4) + 1 for _ in range(4)]
  values: list[int] = []
  while len(values) < total:
    repeated, length = read(1), read(widths[read(2)]) + 1
    values += [read(value_bits)] * length if repeated else [read(value_bits) for _ in range(length)]
  assert len(values) == total
  assert set(bits[position:]) <= {"0"}
  assert len(bits) - position < 8
  return np.array(values)


@pytest.mark.parametrize(
  "mask",
  [
    np.zeros((1, 1), bool),
    np.ones((1, 1), bool),
    np.ones((400, 500), bool),  # a run longer than 2^16
    np.ones((128, 128), bool),  # a run of exactly 2^16
    np.indices((9, 9)).sum(axis=0) % 2 == 1,
    np.arange(70 * 90).reshape(70, 90) % 251 < 17,
    np.random.default_rng(0).random((33, 47)) < 0.5,
  ],
)
def test_round_trip(mask):
  expected = np.repeat(np.where(mask.ravel(), 255, 0), 4)
  data = encode_brush(mask)
  assert all(isinstance(byte, int) and 0 <= byte < 256 for byte in data)
  np.testing.assert_array_equal(decoded(data), expected)


def test_size_of_a_large_mask():
  y, x = np.indices((1080, 1920))
  assert len(encode_brush((x - 900) ** 2 + (y - 500) ** 2 < 400**2)) < 6000


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (4,), (1, 2, 3)])
def test_shapes_that_are_no_mask(shape):
  with pytest.raises(ValueError, match=r"a brush mask must be \[h, w\]"):
    encode_brush(np.zeros(shape, bool))
