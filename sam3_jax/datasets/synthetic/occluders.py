"""Occluders: shapes in front of objects that no phrase names, such as posts and boards."""

import numpy as np
from PIL import Image, ImageDraw

from sam3_jax.datasets.synthetic.augment import Patch
from sam3_jax.datasets.synthetic.backgrounds import background

_FINER = 4  # shapes are drawn this much larger, for smooth edges


def occluder(rng: np.random.Generator, height: int, width: int) -> Patch:
  """Draws a random occluder for an image of this size, with the texture of a background."""
  shorter = min(height, width)
  if rng.random() < 0.5:  # a post, as long as the image
    thick = max(3, round(shorter * rng.uniform(0.06, 0.16)))
    rows, columns = (height, thick) if rng.random() < 0.7 else (thick, width)
    alpha = Image.new("L", (columns, rows), 255)
  else:
    rows, columns = (max(6, round(shorter * side)) for side in rng.uniform(0.15, 0.35, 2))
    alpha = _shape(rng, rows, columns)
  opacity = np.asarray(alpha)[..., None]
  texture = background(rng, rows, columns)
  colors = (texture.astype(np.uint16) * opacity + 127) // 255
  pixels = np.concatenate([colors.astype(np.uint8), opacity], axis=2)
  return Patch(pixels, opacity[..., 0] >= 128)


def _shape(rng: np.random.Generator, rows: int, columns: int) -> Image.Image:
  """The opacity of an ellipse, a rectangle or a polygon."""
  canvas = Image.new("L", (columns * _FINER, rows * _FINER))
  draw, kind = ImageDraw.Draw(canvas), rng.integers(3)
  corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], np.float64)
  if kind == 0:
    draw.ellipse((0, 0, canvas.width - 1, canvas.height - 1), 255)
  else:
    inset = rng.uniform(0, 0.3, (4, 2)) if kind == 1 else np.zeros((4, 2))
    points = np.rint((corners + inset * (1 - 2 * corners)) * (canvas.width - 1, canvas.height - 1))
    draw.polygon([(int(x), int(y)) for x, y in points], 255)
  return canvas.reduce(_FINER)
