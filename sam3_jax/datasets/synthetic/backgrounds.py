"""Backgrounds of scenes: patterns and photographs that show none of the concepts."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw

from sam3_jax.datasets.synthetic.drawings import photographs

Pixels = UInt8[np.ndarray, "h w 3"]


def background(rng: np.random.Generator, height: int, width: int) -> Pixels:
  """Draws a random background."""
  kinds, weights = zip(*_KINDS, strict=True)
  kind = kinds[rng.choice(len(kinds), p=np.array(weights) / sum(weights))]
  return kind(rng, height, width)


def _plain(rng: np.random.Generator, height: int, width: int) -> Pixels:
  return np.full((height, width, 3), _colors(rng, 1)[0], np.uint8)


def _gradient(rng: np.random.Generator, height: int, width: int) -> Pixels:
  corners = _colors(rng, 4).reshape(2, 2, 3)
  return _enlarged(corners, height, width)


def _noise(rng: np.random.Generator, height: int, width: int) -> Pixels:
  """A gradient with smooth spots."""
  corners = _colors(rng, 4).reshape(2, 2, 3)
  rows, columns = _grid(rng, height, width, 6, 40)
  base = _enlarged(corners, rows, columns).astype(np.int16)
  spots = rng.integers(-50, 51, base.shape) * rng.uniform(0.2, 1)
  return _enlarged(np.clip(base + spots, 0, 255).astype(np.uint8), height, width)


def _blobs(rng: np.random.Generator, height: int, width: int) -> Pixels:
  """Islands of a few colors."""
  rows, columns = _grid(rng, height, width, 20, 80)
  heights = _enlarged(rng.integers(0, 256, (rows, columns), np.uint8), height, width)
  palette = np.repeat(_colors(rng, 8), 32, 0)
  return palette[heights]


def _stripes(rng: np.random.Generator, height: int, width: int) -> Pixels:
  angle, period = rng.uniform(0, np.pi), rng.uniform(8, 80)
  wave = np.sin(_slope(height, width, angle) * (2 * np.pi / period)) * rng.choice([0.7, 6])
  return _mixed(rng, np.clip(wave, -1, 1) / 2 + 0.5)


def _checks(rng: np.random.Generator, height: int, width: int) -> Pixels:
  angle, size = rng.uniform(0, np.pi / 2), rng.uniform(10, 60)
  steps = [
    np.floor(_slope(height, width, turned) / size).astype(np.int32)
    for turned in (angle, angle + np.pi / 2)
  ]
  return _mixed(rng, ((steps[0] + steps[1]) % 2).astype(np.float32))


def _clutter(rng: np.random.Generator, height: int, width: int) -> Pixels:
  """Abstract shapes: ellipses, triangles, quadrangles, lines."""
  canvas = Image.fromarray(_gradient(rng, height, width))
  draw = ImageDraw.Draw(canvas)
  for color in _colors(rng, int(rng.integers(5, 30))):
    fill = tuple(int(value) for value in color)
    size = rng.uniform(0.05, 0.3) * min(height, width)
    center = rng.uniform(0, (width, height))
    points = [tuple(point) for point in center + rng.uniform(-size, size, (4, 2))]
    kind = rng.integers(4)
    if kind == 0:
      radii = rng.uniform(0.2, 1, 2) * size
      draw.ellipse([*(center - radii), *(center + radii)], fill)
    elif kind == 1:
      draw.line(points[:2], fill, width=int(rng.integers(1, 8)))
    else:
      draw.polygon(points[kind - 2 :], fill)
  return np.array(canvas)


def _photograph(rng: np.random.Generator, height: int, width: int) -> Pixels:
  """A rotated, mirrored and tinted crop of a photograph."""
  image = photographs()[rng.integers(len(photographs()))]
  turns = [None, *Image.Transpose]
  turned = turns[rng.integers(len(turns))]
  image = image if turned is None else image.transpose(turned)
  most = min(image.width / width, image.height / height)
  scale = most * rng.uniform(0.5, 1)
  left = rng.uniform(0, image.width - scale * width)
  top = rng.uniform(0, image.height - scale * height)
  box = (left, top, left + scale * width, top + scale * height)
  cut = image.resize((width, height), Image.Resampling.BILINEAR, box)
  gains, offset = rng.uniform(0.6, 1.3, 3), rng.uniform(-30, 40)
  matrix = np.column_stack([np.diag(gains), np.full(3, offset)])
  return np.array(cut.convert("RGB", tuple(matrix.ravel())))


_KINDS: tuple[tuple[Callable[[np.random.Generator, int, int], Pixels], float], ...] = (
  (_noise, 0.35),
  (_photograph, 0.2),
  (_clutter, 0.12),
  (_blobs, 0.1),
  (_gradient, 0.08),
  (_stripes, 0.06),
  (_checks, 0.05),
  (_plain, 0.04),
)


def _colors(rng: np.random.Generator, count: int) -> UInt8[np.ndarray, "n 3"]:
  """Random colors, often similar to each other."""
  mean = rng.uniform(30, 225, 3)
  spread = rng.choice([25, 60, 120])
  return np.clip(mean + rng.uniform(-spread, spread, (count, 3)), 0, 255).astype(np.uint8)


def _grid(
  rng: np.random.Generator, height: int, width: int, smallest: float, largest: float
) -> tuple[int, int]:
  """Rows and columns of a grid with a random size of cells, given by bounds in pixels."""
  cell = rng.uniform(smallest, largest)
  return max(2, round(height / cell)), max(2, round(width / cell))


def _enlarged(values: np.ndarray, height: int, width: int) -> np.ndarray:
  return np.array(Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC))


def _slope(height: int, width: int, angle: float) -> Float[np.ndarray, "h w"]:
  """The position of each pixel along a direction."""
  y = np.arange(height, dtype=np.float32)[:, None] * np.float32(np.sin(angle))
  return y + np.arange(width, dtype=np.float32) * np.float32(np.cos(angle))


def _mixed(rng: np.random.Generator, share: Float[np.ndarray, "h w"]) -> Pixels:
  """Mixes two random colors; `share` is that of the second."""
  first, second = _colors(rng, 2).astype(np.float32)
  ramp = first + np.linspace(0, 1, 256, dtype=np.float32)[:, None] * (second - first)
  return ramp.astype(np.uint8)[(share * 255).astype(np.uint8)]
