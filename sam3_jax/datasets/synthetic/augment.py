"""Augments drawings by rotation, scaling, mirroring and colour changes.

Mirroring is safe, since no concept and no phrase distinguishes left and right.
"""

import dataclasses

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


def render(
  rng: np.random.Generator, drawing: Drawing, concept: int, side: float, augment: float
) -> Patch:
  """Renders an augmented drawing.

  Args:
    rng: random generator.
    drawing: of the concept.
    concept: index of the concept.
    side: longer side of the object's bounding box in pixels.
    augment: strength of changes of colour and shape, from 0 (slight changes) to 1, so that a model
      depends less on the artist's style.
  """
  shape = _shape(rng, augment)
  corners = (drawing.outline - drawing.center) @ shape.T
  scale = side / np.ptp(corners, axis=0).max()
  shape, corners = shape * scale, corners * scale
  half = np.ceil(np.abs(corners).max(0)).astype(int) + _EDGE
  coarser = np.log2(1 / np.sqrt(abs(np.linalg.det(shape))))
  level = int(np.clip(np.floor(coarser), 0, len(drawing.levels) - 1))
  source = _recolored(rng, drawing.levels[level], concept, augment)
  inverse = np.linalg.inv(shape)
  origin = drawing.center - inverse @ half
  coefficients = np.column_stack([inverse, origin]) / 2**level
  smooth = Image.Resampling.BICUBIC if coarser < 0 else Image.Resampling.BILINEAR
  turned = source.convert("RGBa").transform(
    tuple(2 * half), Image.Transform.AFFINE, tuple(coefficients.ravel()), smooth
  )
  if rng.random() < 0.25 * augment:
    turned = turned.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.2)))
  pixels = np.frombuffer(turned.tobytes(), np.uint8).reshape(turned.height, turned.width, 4)
  return _cropped(pixels)


def _shape(rng: np.random.Generator, augment: float) -> Float[np.ndarray, "2 2"]:
  """A random matrix of rotation, mirroring, shear and stretch; columns are x and y."""
  spread = rng.choice([12, 35, 180], p=[0.72, 0.22, 0.06])
  angle = np.deg2rad(np.clip(rng.normal(0, spread), -180, 180))
  rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
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
  """A random colour matrix, rows of three gains and an offset; hues still match the phrases."""
  if all_concepts()[concept].any_color and rng.random() < 0.6 * augment:
    hue = rng.uniform(-np.pi, np.pi)
  else:
    hue = np.deg2rad(rng.uniform(-1, 1) * (6 + 3 * augment))
  wide = 0.12 + 0.3 * augment
  # Much less saturation would turn red and green into brown. Much more brightness would turn orange
  # into yellow, as channels are clipped at 255.
  saturation = np.exp(rng.uniform(-wide, wide) / 2)
  brightness, contrast = np.exp(rng.uniform(-wide, [wide / 4, wide / 2]))
  # Rotation around the grey axis.
  skew = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)
  rotation = np.cos(hue) * np.eye(3) + np.sin(hue) * skew + (1 - np.cos(hue)) / 3
  grey = np.tile(_LUMINANCE, (3, 1))
  gains = contrast * brightness * (saturation * np.eye(3) + (1 - saturation) * grey) @ rotation
  offset = 128 * (1 - contrast)
  return tuple(float(one) for one in np.column_stack([gains, np.full(3, offset)]).ravel())


def _outlined(rng: np.random.Generator, drawn: Image.Image, alpha: Image.Image) -> Image.Image:
  """Adds a rim of one colour, like that of a sticker."""
  shade = int(rng.choice([0, 30, 255]))
  rim = Image.new("RGBA", drawn.size, (shade, shade, shade, 255))
  rim.putalpha(alpha.filter(ImageFilter.MaxFilter(3)))
  rim.alpha_composite(drawn)
  return rim


def _cropped(pixels: UInt8[np.ndarray, "h w 4"]) -> Patch:
  """Crops to the visible pixels."""
  seen = pixels[..., 3] > 0
  if seen.any():
    x0, y0, x1, y1 = mask_to_box(seen)
    pixels = pixels[y0:y1, x0:x1]
  return Patch(pixels, pixels[..., 3] >= OPAQUE)
