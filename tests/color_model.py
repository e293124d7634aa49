"""A model that finds the connected regions of a color, so that the exact result is known."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
from scipy import ndimage

from sam3_jax import Concept, Detections
from sam3_jax.inference.tiled import TiledModel

SIDE = 64
COLORS = {"red": 0, "green": 1}


class ColorModel(TiledModel):
  """Finds the regions of the color that a phrase names; their scores are their share of a window.

  Attributes:
    windows: sizes of all windows that were encoded.
    concepts: the prompts of which concepts were made.
  """

  def __init__(self):
    self.config, self.mesh = SimpleNamespace(image_size=SIDE), None
    self.info, self.identity, self.dtype = {"name": "colors"}, "0", np.dtype("float32")
    self.params = {"x": jnp.zeros(1)}
    self.tokenizer = SimpleNamespace(check=list, fault=lambda phrase: "")
    self.windows, self.concepts = [], []

  def encode_text(self, prompts):
    return np.arange(len(prompts))

  def encode_resized(self, pixels, sizes):
    assert pixels.shape[1:] == (SIDE, SIDE, 3)
    self.windows += sizes.tolist()
    return SimpleNamespace(pixels=pixels, sizes=sizes)

  def concept(self, embedding, prompts, image_index):
    colors = []
    for prompt, row in zip(prompts, image_index, strict=True):
      scale = SIDE / np.tile(embedding.sizes[row][::-1], 2)
      x0, y0, x1, y1 = np.rint(prompt.boxes[0] * scale).astype(int)
      colors.append(embedding.pixels[row][y0:y1, x0:x1].reshape(-1, 3).mean(axis=0))
    self.concepts += prompts
    return Concept(jnp.array(colors), jnp.ones(len(colors), bool), prompts[0].text)

  def decode(self, embedding, prompts, image_index, *, text, max_detections, min_score):
    assert len(text) == len(prompts)
    rows = [self._regions(embedding.pixels[i], prompt)
            for i, prompt in zip(image_index, prompts, strict=True)]  # fmt: skip
    most = max(1, *map(len, rows))
    logits = -np.ones((len(rows), most, SIDE, SIDE), np.float32)
    for row, regions in zip(logits, rows, strict=True):
      row[: len(regions)][np.array(regions, bool).reshape(-1, SIDE, SIDE)] = 1
    area = (logits > 0).mean(axis=(2, 3))
    return Detections(
      scores=np.where(area > 0, 0.5 + area / 2, 0).astype(np.float32),
      boxes=np.zeros((len(rows), most, 4), np.float32),
      mask_logits=logits,
      presence_logit=np.zeros(len(rows)),
      semantic_logits=np.zeros((len(rows), SIDE, SIDE)),
      image_index=np.asarray(image_index),
      sizes=np.asarray(embedding.sizes)[image_index],
      ids=np.ones((len(rows), most), int),
    )

  def _regions(self, pixels, prompt):
    if isinstance(prompt, Concept):
      color = int(np.argmax(np.asarray(prompt.tokens).mean(axis=0)))
    else:
      color = COLORS[prompt.text]
    labels, count = ndimage.label(pixels[..., color] > 127)
    return [labels == number for number in range(1, count + 1)]


def scene(size, objects, seed=0, color=0, largest=20):
  """An image with separate ellipses, and their masks."""
  rng = np.random.default_rng(seed)
  image, masks = np.zeros((*size, 3), np.uint8), []
  image[..., 2] = 9
  taken = np.zeros(size, bool)
  y, x = np.indices(size)
  while len(masks) < objects:
    radii = rng.uniform(4, largest / 2, 2)
    center = rng.uniform(0, size)
    mask = ((y - center[0]) / radii[0]) ** 2 + ((x - center[1]) / radii[1]) ** 2 <= 1
    near = ndimage.binary_dilation(mask, iterations=2)
    if mask.sum() > 30 and not (near & taken).any():
      masks.append(mask)
      taken |= mask
      image[mask, color] = 255
  return image, masks
