"""Label Studio's run-length encoding of brush masks.

Label Studio stores a brush region as an RGBA image, packed by the npm package `rle-pack`: a stream
of bits, the most significant bit of each byte first. It starts with the number of values (32 bits),
the bits of a value minus 1 (5 bits), and four widths minus 1 (4 bits each). Then follow runs: a 1,
the index of a width (2 bits), the length minus 1 in that width, and the value. (A 0 instead of the
1 starts values that are not repeated, which masks do not need.)
"""

import numpy as np
from jaxtyping import Bool, Int

VALUE_BITS = 8
WIDTHS = (4, 8, 12, 16)  # bits of a length
_CHANNELS = 4  # red, green, blue, alpha
_LONGEST = 2 ** WIDTHS[-1]
_CODE = 3  # bits: the flag of a run, and the index of its width


def encode_brush(mask: Bool[np.ndarray, "h w"]) -> list[int]:
  """Encodes a mask as bytes of `rle` in a region of type brushlabels.

  All four channels are 255 inside of the mask, and 0 outside, as in Label Studio's converter.

  Raises:
    ValueError: the mask has no pixel, or more than the format's 2^32 - 1 values.
  """
  mask = np.asarray(mask, bool)
  total = mask.size * _CHANNELS
  if mask.ndim != 2 or not 0 < total < 2**32:
    raise ValueError(f"a brush mask must be [h, w] with 1 to 2^30 - 1 pixels; got {mask.shape}.")
  lengths, values = _split(*_runs(mask.ravel()))
  index = np.searchsorted(2 ** np.array(WIDTHS), lengths)
  widths = np.array(WIDTHS)[index]
  codes = ((1 << 2) | index) << widths | (lengths - 1)
  codes = codes << VALUE_BITS | values
  sizes = _CODE + widths + VALUE_BITS
  header = [(total, 32), (VALUE_BITS - 1, 5), *((width - 1, 4) for width in WIDTHS)]
  first, first_sizes = np.array(header).T
  bits = _bits(np.concatenate([first, codes]), np.concatenate([first_sizes, sizes]))
  return np.packbits(bits).tolist()


def _runs(flat: Bool[np.ndarray, " n"]) -> tuple[Int[np.ndarray, " r"], Int[np.ndarray, " r"]]:
  """Lengths, in values of the RGBA image, and values of the runs of a mask."""
  starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
  lengths = np.diff(np.append(starts, len(flat)))
  return lengths * _CHANNELS, np.where(flat[starts], 255, 0)


def _split(lengths: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Splits runs that are longer than the largest width can express."""
  parts = -(-lengths // _LONGEST)
  result = np.full(parts.sum(), _LONGEST)
  result[np.cumsum(parts) - 1] = lengths - (parts - 1) * _LONGEST
  return result, np.repeat(values, parts)


def _bits(codes: Int[np.ndarray, " n"], sizes: Int[np.ndarray, " n"]) -> np.ndarray:
  """Writes each code with its number of bits, the most significant bit first."""
  ends = np.cumsum(sizes)
  shifts = np.repeat(ends, sizes) - 1 - np.arange(ends[-1])
  return (np.repeat(codes, sizes) >> shifts & 1).astype(np.uint8)
