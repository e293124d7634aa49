"""Random targets for the training of visual prompts."""

import jax
import numpy as np
import training_model
from support import QUICK

from sam3_jax.training import visual
from sam3_jax.training.batch import Targets

SIDE = training_model.CONFIG.mask_size
sample = jax.jit(visual.sample_prompts, static_argnums=(2, 3), compiler_options=QUICK)


def targets(rng, images=3, rows=2, objects=2, scale=1):
  """Random rectangles and their boxes; only the first object of each prompt is valid."""
  boxes = np.zeros((images, rows, objects, 4), np.float32)
  masks = np.zeros((images, rows, objects, SIDE * scale, SIDE * scale), np.uint8)
  for index in np.ndindex(images, rows, objects):
    x0, y0 = rng.integers(0, SIDE - 6, 2)
    w, h = rng.integers(2, 6, 2)
    boxes[index] = np.array([x0 + w / 2, y0 + h / 2, w, h]) / SIDE
    masks[index][scale * y0 : scale * (y0 + h), scale * x0 : scale * (x0 + w)] = 255
  valid = np.zeros((images, rows, objects), bool)
  valid[..., 0] = True
  return Targets(boxes, masks, valid)
