"""Distinguishable colors for instances, and text colors that are readable on them.

Colors are chosen in OKLCH (Björn Ottosson 2020, "A perceptual color space for image processing"),
where equal distances look equal.
"""

import functools
import math

import numpy as np

Color = tuple[int, int, int]  # red, green, blue, 0..255


@functools.lru_cache(maxsize=4096)
def color(index: int) -> Color:
  """The color of an instance by its index: hues are a golden angle apart, so neighbors differ."""
  hue = 2 * math.pi * ((0.69 + index * (math.sqrt(5) - 1) / 2) % 1)
  vivid = max(np.arange(0.62, 0.85, 0.01), key=lambda lightness: _chroma(lightness, hue))
  lightness = vivid + (0, 0.05, -0.05)[index % 3]  # similar hues differ in lightness
  rgb = _oklch(lightness, _chroma(lightness, hue), hue)
  red, green, blue = (round(255 * _gamma(c)) for c in rgb)
  return red, green, blue


def ink(color: Color) -> Color:
  """Black or white, whichever is more readable on a color (WCAG's relative luminance)."""
  linear = [((c / 255 + 0.055) / 1.055) ** 2.4 for c in color]
  luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
  return (0, 0, 0) if luminance > 0.18 else (255, 255, 255)


def _chroma(lightness: float, hue: float) -> float:
  """The largest chroma, up to 0.2, within sRGB."""
  steps = np.arange(0.2, 0, -0.005)
  valid = (c for c in steps if all(0 <= v <= 1 for v in _oklch(lightness, c, hue)))
  return float(next(valid, 0))


def _oklch(lightness: float, chroma: float, hue: float) -> tuple[float, float, float]:
  """Converts OKLCH to linear sRGB (Ottosson 2020)."""
  a, b = chroma * math.cos(hue), chroma * math.sin(hue)
  long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
  medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
  short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
  return (
    4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
    -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
    -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
  )


def _gamma(linear: float) -> float:
  """The sRGB transfer function (IEC 61966-2-1)."""
  return 12.92 * linear if linear <= 0.0031308 else 1.055 * linear ** (1 / 2.4) - 0.055
