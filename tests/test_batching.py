"""Batches: each row once, few sizes; selecting and joining rows."""

import numpy as np
import pytest
from flax import struct

from sam3_jax.inference import batching
from sam3_jax.utils.pytrees import Sliceable


@struct.dataclass
class Pair(Sliceable):
  a: np.ndarray
  b: np.ndarray


def pair(count):
  return Pair(np.arange(count), np.arange(2 * count).reshape(count, 2))


@pytest.mark.parametrize("n_devices", [1, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 12, 13])
def test_batches(count, n_devices):
  numbers = 10 * np.arange(count)
  cut = list(batching.batches(numbers, (4, 1), n_devices))
  assert {len(batch) for batch in cut} <= {4 * n_devices, n_devices}
  whole = np.concatenate([*cut, numbers[:0]])
  np.testing.assert_array_equal(whole[:count], numbers)
  assert set(whole[count:]) <= {10 * (count - 1)}
  assert len(whole) - count < n_devices
  assert len(cut) <= count // (4 * n_devices) + 4
  assert batching.batch_sizes(iter(cut)) == sorted({len(batch) for batch in cut})


def test_batches_by_image():
  """Full batches have one image; each row once."""
  images = np.array([2, 0, 2, 2, 1, 2, 2, 0])
  cut = list(batching.batches_by_image(images, (4, 1)))
  assert [batch.tolist() for batch in cut] == [[0, 2, 3, 5], [1, 7, 4, 6]]
  assert list(batching.batches_by_image(images[:0], (4, 1))) == []
  assert [batch.tolist() for batch in batching.batches_by_image(images[:3], (1,))] == [
    [1],
    [0],
    [2],
  ]
  shared = list(batching.batches_by_image(images, (2, 1), n_devices=2))
  assert [batch.tolist() for batch in shared] == [[0, 2, 3, 5], [1, 7, 4, 6]]
  shared = list(batching.batches_by_image(images[:7], (1,), n_devices=4))
  assert [batch.tolist() for batch in shared] == [[0, 2, 3, 5], [1, 4, 6, 6]]


def test_ordinals():
  assert batching.ordinals(np.array([5, 1, 5, 5, 1])).tolist() == [0, 0, 1, 2, 1]
  assert batching.ordinals(np.zeros(0, int)).shape == (0,)


def test_take_and_join():
  whole = pair(4)
  assert batching.take(whole, np.arange(4)) is whole
  taken = batching.take(whole, np.array([2, 2, 0]))
  assert taken.a.tolist() == [2, 2, 0]
  assert taken.b.tolist() == [[4, 5], [4, 5], [0, 1]]
  assert batching.join([whole]) is whole
  joined = batching.join([taken, whole])
  assert joined.a.tolist() == [2, 2, 0, 0, 1, 2, 3]


def test_drop_repeats():
  whole = pair(4)
  same, numbers = batching.drop_repeats(whole, np.array([3, 5, 1, 0]))
  assert same is whole
  assert numbers.tolist() == [3, 5, 1, 0]
  fewer, numbers = batching.drop_repeats(whole, np.array([3, 5, 3, 5]))
  assert numbers.tolist() == [3, 5]
  assert fewer.a.tolist() == [0, 1]
