"""Model sizes and batches for both sides of `train.py`; needs only NumPy."""

from typing import Any

import numpy as np

EXEMPLARS, OBJECTS = 2, 6  # exemplar boxes and objects of a prompt, with padding

# Fields that differ from the released configuration. "tiny" is the golden model of the tests, for
# which tests/goldens has Meta's training step. "small" is larger, so that arithmetic dominates the
# overhead; it is none of the backbones in `config.SIZES`. There is no dropout, so that the losses
# of both sides can be compared too.
SIZES: dict[str, dict[str, Any]] = {
  "tiny": {
    "trunk": {
      "width": 64, "heads": 4, "mlp_width": 296, "groups": 2, "windowed": 1, "window": 4,
      "pretrain_grid": 4, "drop_path": 0.0,
    },
    "text": {"width": 32, "heads": 2, "mlp_width": 128, "layers": 2, "vocabulary": 1024},
    "image_size": 168, "width": 128, "mlp_width": 256, "geometry_layers": 2, "fusion_layers": 2,
    "decoder_layers": 3, "queries": 10, "dropout": 0.0,
  },
  "small": {
    "trunk": {
      "width": 192, "heads": 3, "mlp_width": 888, "groups": 2, "windowed": 2, "window": 8,
      "pretrain_grid": 8, "drop_path": 0.0,
    },
    "text": {"width": 128, "heads": 2, "mlp_width": 512, "layers": 4, "vocabulary": 1024},
    "image_size": 336, "width": 128, "mlp_width": 512, "geometry_layers": 2, "fusion_layers": 3,
    "decoder_layers": 3, "queries": 50, "dropout": 0.0,
  },
}  # fmt: skip


def make_batch(
  config: dict[str, Any], images: int, prompts: int, *, mask_side: int = 0, seed: int = 0
) -> dict[str, np.ndarray]:
  """Makes random images with filled ellipses as targets; the last prompt of each image has none.

  Args:
    config: the model's configuration, as a dictionary.
    images: number of images, B.
    prompts: number of prompts per image, R.
    mask_side: cells per side of the target masks; 0 for the image size, as in Meta's code.
    seed: seed of all random numbers.

  Returns:
    images u8[B, S, S, 3]; tokens i32[B, R, T] (start, words, end, then 0); exemplars
    f32[B, R, N, 4] with given bool[B, R, N], boxes f32[B, R, O, 4] with valid bool[B, R, O] (both
    cxcywh fractions) and masks bool[B, R, O, M, M].
  """
  rng = np.random.default_rng(seed)
  side, text = config["image_size"], config["text"]
  counts = rng.integers(1, OBJECTS + 1, (images, prompts))
  counts[:, -1] = 0
  valid = np.arange(OBJECTS) < counts[..., None]
  boxes = rng.uniform(0.1, 0.4, (images, prompts, OBJECTS, 4)).astype(np.float32)
  boxes[..., :2] += boxes[..., 2:] / 2 + rng.uniform(0, 0.2, (*boxes.shape[:3], 2))
  cells = mask_side or side
  cells = (np.arange(cells, dtype=np.float32) + 0.5) / cells
  cx, cy, w, h = (boxes[..., i, None, None] for i in range(4))
  masks = ((cells - cx) / w) ** 2 + ((cells[:, None] - cy) / h) ** 2 < 0.25
  tokens = np.zeros((images, prompts, text["context"]), np.int32)
  length = min(6, text["context"])
  tokens[..., :length] = rng.integers(1, text["vocabulary"], (images, prompts, length))
  given = np.zeros((images, prompts, EXEMPLARS), bool)
  given[:, 0, 0] = True  # an exemplar box on the first object of the first prompt
  return {
    "images": rng.integers(0, 256, (images, side, side, 3), dtype=np.uint8),
    "tokens": tokens,
    "exemplars": boxes[:, :, :EXEMPLARS],
    "given": given,
    "boxes": boxes,
    "valid": valid,
    "masks": masks & valid[..., None, None],
  }
