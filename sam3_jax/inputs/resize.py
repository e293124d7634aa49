"""Resizing of images, bit-equal to torchvision's uint8 resize."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

_BLOCK = 8  # maximal number of results of one matrix product along the filtered axis
_WINDOW = 128  # source pixels that a block of several results spans, about
_STRIP = 512  # source rows processed at a time, unless a block needs more
# OpenBLAS computes products of up to this many multiplications on one thread. For larger products,
# its threads spin while they wait: on a busy machine, a resize of 20 ms took up to 12 seconds.
_SINGLE_THREADED = 2**18


def resize(image: UInt8[np.ndarray, "h w 3"], size: int) -> UInt8[np.ndarray, "size size 3"]:
  """Resizes to a square, ignoring the aspect ratio, exactly as torchvision does on a CPU.

  PyTorch's uint8 kernel (`UpSampleKernel.cpp`, antialias) applies a triangle filter along rows,
  rounds to uint8, and filters along columns, with integer weights. Here both passes are matrix
  products of floats, in which every product and sum is an integer small enough to be exact (see
  `_Filter`). In addition to `image` and the result, it takes less than 80 MB of memory for an image
  of 20,000 x 15,000.

  Raises:
    ValueError: `image` is empty or not uint8 [h, w, 3], or `size` is below 1.
  """
  if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
    raise ValueError(
      f"resize takes uint8 [h, w, 3], not {image.dtype} {list(image.shape)}: see read_image."
    )
  if size < 1:
    raise ValueError(f"size is {size}, but an image must have at least 1 pixel on each side.")
  height, width, _ = image.shape
  across, down = _filter(width, size), _filter(height, size)
  dtype = np.float64 if max(across.total, down.total) >= 2**24 else np.float32
  # One product computes a block of pixels of a row; the channels do not mix.
  across_weights = np.stack([np.kron(weights, np.eye(3)) for weights in across.weights])
  across_weights = across_weights.astype(dtype)
  down_weights = down.weights.transpose(0, 2, 1).astype(dtype)

  blocks, length, window = down_weights.shape
  result = np.empty((blocks, length, len(across_weights), across_weights.shape[2]), np.uint8)
  stride = max(1, _STRIP * size // (length * height))
  for first in range(0, blocks, stride):
    starts = down.starts[first : first + stride]
    strip = image[starts[0] : starts[-1] + window].reshape(-1, width * 3)
    middle = _filter_rows(strip, across.starts * 3, across_weights)
    for i, start in enumerate(starts - starts[0]):
      block = down_weights[first + i] @ middle[:, start : start + window]
      block += 0.5
      result[first + i] = np.minimum(block, 255, out=block).transpose(1, 0, 2)
  return np.ascontiguousarray(result.reshape(blocks * length, -1, 3)[:size, :size])


def _filter_rows(
  strip: UInt8[np.ndarray, "rows width3"],
  starts: np.ndarray,
  weights: Float[np.ndarray, "blocks window3 block3"],
) -> Float[np.ndarray, "blocks rows block3"]:
  """The horizontal pass, rounded to integers. The result may have unused rows at the end."""
  blocks, window, width = weights.shape
  batch = min(64, max(1, _SINGLE_THREADED // (window * width)))
  rows = -(-len(strip) // batch) * batch
  source = np.zeros((rows, window), weights.dtype)
  result = np.empty((blocks, rows, width), weights.dtype)
  for start, weight, target in zip(starts, weights, result, strict=True):
    source[: len(strip)] = strip[:, start : start + window]
    np.matmul(source.reshape(-1, batch, window), weight, out=target.reshape(-1, batch, width))
    target += 0.5
    np.floor(target, out=target)
    np.minimum(target, 255, out=target)
  return result


class _Filter(NamedTuple):
  """A filter along one axis, in blocks of results that share a window of the source.

  Attributes:
    starts: start of each block's window.
    weights: PyTorch's int16 weights, divided by 2**precision.
    total: upper bound of all sums of weight * 255 before that division. Sums below 2**24 are exact
      in float32 in any order, sums below 2**53 in float64.
  """

  starts: np.ndarray
  weights: Float[np.ndarray, "blocks window block"]
  total: int


def _filter(source: int, size: int) -> _Filter:
  scale = source / size
  support = max(1.0, scale)
  center = scale * (np.arange(size) + 0.5)
  first = np.maximum((center - support + 0.5).astype(np.int64), 0)
  last = np.minimum((center + support + 0.5).astype(np.int64), source)
  taps = np.arange((last - first).max())
  index = first[:, None] + taps
  weights = np.maximum(0, 1 - np.abs((index - center[:, None] + 0.5) / support))
  weights[index >= last[:, None]] = 0
  weights /= weights.sum(axis=1, keepdims=True)
  precision = 0  # the largest number of bits, up to 22, at which all weights are int16
  while precision < 22 and int(0.5 + weights.max() * 2 ** (precision + 1)) < 2**15:
    precision += 1
  whole = np.floor(weights * 2**precision + 0.5)

  length = min(_BLOCK, max(1, _WINDOW * size // source))
  blocks = -(-size // length)
  begin, end = first[::length], last[np.minimum(np.arange(1, blocks + 1) * length, size) - 1]
  window = (end - begin).max()
  starts = np.minimum(begin, source - window)
  # The window is longer by `taps`, as taps of weight 0 may exceed it.
  table = np.zeros((blocks, window + len(taps), length))
  result = np.arange(size)
  block, column = np.divmod(result, length)
  rows = (first - starts[block])[:, None] + taps
  table[block[:, None], rows, column[:, None]] = whole / 2**precision
  total = int(255 * whole.sum(axis=1).max()) + 2**precision
  return _Filter(starts, table[:, :window], total)
