"""Augments drawings by rotation, scaling, mirroring and color changes.

Mirroring is safe, since no concept and no phrase distinguishes left and right.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageFilter

from sam3_jax.datasets.synthetic.drawings import OPAQUE, Drawing, all_concepts
from sam3_jax.ops.masks import mask_to_box

_LUMINANCE = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
_EDGE = 3  # pixels around a patch, for soft edges and outlines


@dataclasses.dataclass(frozen=True)
class Patch:
  """An object to be pasted into an image.

  Attributes:
    pixels: RGB premultiplied by alpha, and alpha.
    mask: where the object is opaque and occludes others.
  """

  pixels: UInt8[np.ndarray, "h w 4"]
  mask: Bool[np.ndarray, "h w"]


@dataclasses.dataclass(frozen=True)
class Sprite:
  """An augmented drawing that can be rendered at any size and rotation, for moving scenes.

  Attributes:
    levels: RGBA images as in `Drawing`, recolored.
    outline: xy of points relative to the center; their convex hull contains all opaque pixels.
    center: xy of the center on the first level.
    shape: matrix of rotation, mirroring, shear and stretch, scaled so that the longer side of the
      bounding box is 1 pixel; columns are x and y.
  """

  levels: tuple[Image.Image, ...]
  outline: Float[np.ndarray, "N 2"]
  center: Float[np.ndarray, " 2"]
  shape: Float[np.ndarray, "2 2"]


def sprite(rng: np.random.Generator, drawing: Drawing, concept: int, augment: float) -> Sprite:
  """Samples the appearance of an object that stays the same while it moves; see `render`."""
  shape = _shape(rng, augment)
  outline = drawing.outline - drawing.center
  first = _recolored(rng, drawing.levels[0], concept, augment)
  levels = tuple(first.reduce(2**k) if k else first for k in range(len(drawing.levels)))
  extent = np.ptp(outline @ shape.T, axis=0).max()
  return Sprite(levels, outline, drawing.center, shape / extent)


def pose(
  one: Sprite, side: float, angle: float, xy: Sequence[float]
) -> tuple[Patch, tuple[int, int]]:
  """Renders a sprite, to a fraction of a pixel.

  Args:
    one: the sprite.
    side: longer side in pixels of its bounding box before it is turned.
    angle: in radians, clockwise.
    xy: where its center is in the image, in pixels.

  Returns:
    The patch, and its top and left in the image.
  """
  shape = _rotation(angle) @ one.shape * side
  corners = one.outline @ shape.T + xy
  low = np.floor(corners.min(0)).astype(int) - _EDGE
  size = np.ceil(corners.max(0)).astype(int) + _EDGE - low
  level = _level(shape, len(one.levels))
  pixels = _warped(one.levels[level], level, shape, one.center, np.asarray(xy) - low, size)
  patch, (x0, y0) = _cropped(np.asarray(pixels))
  return patch, (int(low[1]) + y0, int(low[0]) + x0)


def render(
  rng: np.random.Generator, drawing: Drawing, concept: int, side: float, augment: float
) -> Patch:
  """Renders an augmented drawing.

  Args:
    rng: random generator.
    drawing: of the concept.
    concept: index of the concept.
    side: longer side of the object's bounding box in pixels.
    augment: strength of changes of color and shape, from 0 (slight changes) to 1, so that a model
      depends less on the artist's style.
  """
  shape = _shape(rng, augment)
  corners = (drawing.outline - drawing.center) @ shape.T
  scale = side / np.ptp(corners, axis=0).max()
  shape, corners = shape * scale, corners * scale
  half = np.ceil(np.abs(corners).max(0)).astype(int) + _EDGE
  level = _level(shape, len(drawing.levels))
  source = _recolored(rng, drawing.levels[level], concept, augment)
  turned = _warped(source, level, shape, drawing.center, half, 2 * half)
  if rng.random() < 0.25 * augment:
    turned = turned.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.2)))
  return _cropped(np.asarray(turned))[0]


def _level(shape: Float[np.ndarray, "2 2"], count: int) -> int:
  """The level of a drawing that has about the resolution of the result."""
  return int(np.clip(np.floor(_coarser(shape)), 0, count - 1))


def _coarser(shape: Float[np.ndarray, "2 2"]) -> float:
  """How often the first level must be halved to have the size of the result."""
  return np.log2(1 / np.sqrt(abs(np.linalg.det(shape))))


def _warped(
  source: Image.Image,
  level: int,
  shape: Float[np.ndarray, "2 2"],
  center: Float[np.ndarray, " 2"],
  at: np.ndarray,
  size: np.ndarray,
) -> Image.Image:
  """Draws a level of a drawing, with its center `at` xy, in an image of a width and height.

  The pixels are premultiplied by alpha (mode RGBa).
  """
  inverse = np.linalg.inv(shape)
  origin = center - inverse @ at
  coefficients = np.column_stack([inverse, origin]) / 2**level
  smooth = Image.Resampling.BICUBIC if _coarser(shape) < 0 else Image.Resampling.BILINEAR
  return source.convert("RGBa").transform(
    tuple(size), Image.Transform.AFFINE, tuple(coefficients.ravel()), smooth
  )


def _rotation(angle: float) -> Float[np.ndarray, "2 2"]:
  return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def _shape(rng: np.random.Generator, augment: float) -> Float[np.ndarray, "2 2"]:
  """A random matrix of rotation, mirroring, shear and stretch; columns are x and y."""
  spread = rng.choice([12, 35, 180], p=[0.72, 0.22, 0.06])
  angle = np.deg2rad(np.clip(rng.normal(0, spread), -180, 180))
  rotation = _rotation(angle)
  stretch = np.exp(rng.uniform(-1, 1) * (0.05 + 0.25 * augment))
  shear = rng.uniform(-1, 1) * 0.25 * augment
  mirror = rng.choice([-1, 1])
  return rotation @ np.array([[stretch * mirror, shear], [0, 1 / stretch]])


def _recolored(
  rng: np.random.Generator, drawn: Image.Image, concept: int, augment: float
) -> Image.Image:
  alpha = drawn.getchannel("A")
  colors = drawn.convert("RGB").convert("RGB", _color_matrix(rng, concept, augment))
  if rng.random() < 0.5 * augment:
    gamma = np.exp(rng.uniform(-0.3, 0.5))
    curve = np.rint(255 * np.linspace(0, 1, 256) ** gamma).astype(int).tolist()
    colors = colors.point(curve * 3)
  if rng.random() < 0.25 * augment:
    few = colors.quantize(int(rng.integers(12, 32)), Image.Quantize.FASTOCTREE)
    colors = few.convert("RGB")
  colors.putalpha(alpha)
  if rng.random() < 0.2 * augment:
    return _outlined(rng, colors, alpha)
  return colors


def _color_matrix(rng: np.random.Generator, concept: int, augment: float) -> tuple[float, ...]:
  """A random color matrix, rows of three gains and an offset; hues still match the phrases."""
  if all_concepts()[concept].any_color and rng.random() < 0.6 * augment:
    hue = rng.uniform(-np.pi, np.pi)
  else:
    hue = np.deg2rad(rng.uniform(-1, 1) * (6 + 3 * augment))
  wide = 0.12 + 0.3 * augment
  # Much less saturation would turn red and green into brown. Much more brightness would turn orange
  # into yellow, as channels are clipped at 255.
  saturation = np.exp(rng.uniform(-wide, wide) / 2)
  brightness, contrast = np.exp(rng.uniform(-wide, [wide / 4, wide / 2]))
  # Rotation around the gray axis.
  skew = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)
  rotation = np.cos(hue) * np.eye(3) + np.sin(hue) * skew + (1 - np.cos(hue)) / 3
  gray = np.tile(_LUMINANCE, (3, 1))
  gains = contrast * brightness * (saturation * np.eye(3) + (1 - saturation) * gray) @ rotation
  offset = 128 * (1 - contrast)
  return tuple(float(one) for one in np.column_stack([gains, np.full(3, offset)]).ravel())


def _outlined(rng: np.random.Generator, drawn: Image.Image, alpha: Image.Image) -> Image.Image:
  """Adds a rim of one color, like that of a sticker."""
  shade = int(rng.choice([0, 30, 255]))
  rim = Image.new("RGBA", drawn.size, (shade, shade, shade, 255))
  rim.putalpha(alpha.filter(ImageFilter.MaxFilter(3)))
  rim.alpha_composite(drawn)
  return rim


def _cropped(pixels: UInt8[np.ndarray, "h w 4"]) -> tuple[Patch, tuple[int, int]]:
  """Crops to the visible pixels; also returns the first column and row that are kept."""
  seen, x0, y0 = pixels[..., 3] > 0, 0, 0
  if seen.any():
    x0, y0, x1, y1 = mask_to_box(seen)
    pixels = pixels[y0:y1, x0:x1]
  return Patch(pixels, pixels[..., 3] >= OPAQUE), (x0, y0)
