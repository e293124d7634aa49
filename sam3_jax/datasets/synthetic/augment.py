"""A drawing, turned, sized, mirrored and tinted: no two objects of a scene look the same.

Mirroring is safe as no concept and no phrase tells left from right.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageFilter

from sam3_jax.datasets.synthetic.drawings import OPAQUE, Drawing, everything
from sam3_jax.ops.masks import mask_to_box

_LUMINANCE = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
_EDGE = 3  # pixels around a patch, for soft edges and outlines


@dataclasses.dataclass(frozen=True)
class Patch:
  """What is put into an image.

  Attributes:
    pixels: RGB times alpha, and alpha.
    mask: where the object is opaque, which decides what it hides.
  """

  pixels: UInt8[np.ndarray, "h w 4"]
  mask: Bool[np.ndarray, "h w"]


def render(
  rng: np.random.Generator, drawing: Drawing, concept: int, side: float, augment: float
) -> Patch:
  """A drawing as an object.

  Args:
    rng: decides all of it.
    drawing: of the concept.
    concept: its number.
    side: pixels of the longer side of the box around the object.
    augment: 0 keeps it as it was drawn but for light changes; up to 1 for ever stronger ones of
      colour and shape, so that what is learned depends less on the artist.
  """
  shape = _shape(rng, augment)
  corners = (drawing.outline - drawing.center) @ shape.T
  scale = side / np.ptp(corners, axis=0).max()
  shape, corners = shape * scale, corners * scale
  half = np.ceil(np.abs(corners).max(0)).astype(int) + _EDGE
  coarser = np.log2(1 / np.sqrt(abs(np.linalg.det(shape))))
  level = int(np.clip(np.floor(coarser), 0, len(drawing.levels) - 1))
  source = _recolored(rng, drawing.levels[level], concept, augment)
  back = np.linalg.inv(shape)
  origin = drawing.center - back @ half
  coefficients = np.column_stack([back, origin]) / 2**level
  smooth = Image.Resampling.BICUBIC if coarser < 0 else Image.Resampling.BILINEAR
  turned = source.convert("RGBa").transform(
    tuple(2 * half), Image.Transform.AFFINE, tuple(coefficients.ravel()), smooth
  )
  if rng.random() < 0.25 * augment:
    turned = turned.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.2)))
  pixels = np.frombuffer(turned.tobytes(), np.uint8).reshape(turned.height, turned.width, 4)
  return _cropped(pixels)


def _shape(rng: np.random.Generator, augment: float) -> Float[np.ndarray, "2 2"]:
  """Rotation, mirroring, and some shear and stretch; xy columns."""
  spread = rng.choice([12, 35, 180], p=[0.72, 0.22, 0.06])
  angle = np.deg2rad(np.clip(rng.normal(0, spread), -180, 180))
  turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
  stretch = np.exp(rng.uniform(-1, 1) * (0.05 + 0.25 * augment))
  shear = rng.uniform(-1, 1) * 0.25 * augment
  mirror = rng.choice([-1, 1])
  return turn @ np.array([[stretch * mirror, shear], [0, 1 / stretch]])


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
  """Rows of three gains and an offset; hues stay what their names say."""
  if everything()[concept].any_color and rng.random() < 0.6 * augment:
    hue = rng.uniform(-np.pi, np.pi)
  else:
    hue = np.deg2rad(rng.uniform(-1, 1) * (6 + 3 * augment))
  wide = 0.12 + 0.3 * augment
  # Not much paler, or red and green would look brown; not much brighter, as a channel that is cut
  # off at 255 turns orange into yellow.
  saturation = np.exp(rng.uniform(-wide, wide) / 2)
  brightness, contrast = np.exp(rng.uniform(-wide, [wide / 4, wide / 2]))
  # A rotation around the grey axis.
  skew = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)
  turned = np.cos(hue) * np.eye(3) + np.sin(hue) * skew + (1 - np.cos(hue)) / 3
  grey = np.tile(_LUMINANCE, (3, 1))
  gains = contrast * brightness * (saturation * np.eye(3) + (1 - saturation) * grey) @ turned
  offset = 128 * (1 - contrast)
  return tuple(float(one) for one in np.column_stack([gains, np.full(3, offset)]).ravel())


def _outlined(rng: np.random.Generator, drawn: Image.Image, alpha: Image.Image) -> Image.Image:
  """With a rim of one colour, as of a sticker."""
  shade = int(rng.choice([0, 30, 255]))
  rim = Image.new("RGBA", drawn.size, (shade, shade, shade, 255))
  rim.putalpha(alpha.filter(ImageFilter.MaxFilter(3)))
  rim.alpha_composite(drawn)
  return rim


def _cropped(pixels: UInt8[np.ndarray, "h w 4"]) -> Patch:
  """To what is seen at all."""
  seen = pixels[..., 3] > 0
  if seen.any():
    x0, y0, x1, y1 = mask_to_box(seen)
    pixels = pixels[y0:y1, x0:x1]
  return Patch(pixels, pixels[..., 3] >= OPAQUE)
