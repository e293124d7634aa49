"""The inputs of all packages: phrases, points, and masks to resize."""

import numpy as np

COLORS = ("red", "green", "blue", "yellow", "black", "white", "brown", "orange")
NOUNS = (
  "cat", "dog", "bus", "chair", "apple", "lion", "boat", "bird",
  "tree", "cup", "shoe", "kite", "book", "horse", "lamp", "clock",
)  # fmt: skip


def phrases(count: int) -> list[str]:
  """Returns `count` different phrases, at most 128."""
  every = [f"{color} {noun}" for noun in NOUNS for color in COLORS]
  return every[:count]


def points(count: int) -> np.ndarray:
  """Returns x and y as fractions of width and height, float64 [count, 2]."""
  return np.random.default_rng(1).uniform(0.02, 0.98, (count, 2))


def mask_logits(count: int, side: int) -> np.ndarray:
  """Ellipses of 4 to 40 % of the square's side, float32 [count, side, side]."""
  rng = np.random.default_rng(0)
  centers, radii = rng.uniform(0.1, 0.9, (count, 2)), rng.uniform(0.02, 0.2, (count, 2))
  cells = (np.arange(side) + 0.5) / side
  y, x = ((cells - centers[:, i, None]) / radii[:, i, None] for i in (0, 1))
  return (4 * (1 - y[:, :, None] ** 2 - x[:, None, :] ** 2)).astype(np.float32)
