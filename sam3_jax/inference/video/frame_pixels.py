"""A frame's pixels at the model's input size."""

from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from sam3_jax.inputs.preprocess import resize

RESAMPLES = ("bilinear", "bicubic")


def model_pixels(image: UInt8[np.ndarray, "h w 3"], side: int, resample: str = "bilinear") -> Any:
  """Resizes a frame.

  Args:
    image: RGB.
    side: of the result in pixels.
    resample: "bilinear" as for still images, uint8; "bicubic" as Meta's code reads a list of PIL
      images, normalized and rounded to float16 at each step, in float32.
  """
  if resample == "bilinear":
    return resize(image, side)
  small = np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC))
  pixels = (small / np.float32(255)).astype(np.float16)
  return ((pixels - np.float16(0.5)) / np.float16(0.5)).astype(np.float32)
