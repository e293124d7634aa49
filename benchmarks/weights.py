"""Seeded weights by Meta's name and shape, with which the goldens were made.

Each tensor has its own PCG64 stream, seeded with (seed, crc32 of its name). Activations stay of
order one through the whole model, boxes and scores are spread out, and no parameter is 0 or 1, so
that a swapped or missing tensor changes the outputs.
"""

import math
import zlib

import numpy as np

# Scales of the standard normal values; the first row with a word in the name applies.
TABLES = (
  (("query_embed", "presence_token.weight"), 1.0),
  (("token_embedding", "positional_embedding", "pos_embed"), 0.5),
  (("positional_encoding_gaussian_matrix",), 1.0),
  (("label_embed", "cls_embed", "point_embeddings", "not_a_point", "no_mask"), 0.5),
  (("maskmem_tpos_enc", "no_mem", "no_obj"), 0.3),
)
LOUDER = ("prompt_proj", "hs_proj", "mask_embed.layers.2", "hypernetworks")


def weights(name: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
  """Returns the float32 tensor of this name."""
  rng = np.random.Generator(np.random.PCG64([seed, zlib.crc32(name.encode())]))
  x = rng.standard_normal(shape, dtype=np.float32)
  leaf = name.split(".")[-1]
  if leaf == "weight" and len(shape) == 1:  # a norm's scale
    return 1 + 0.2 * x
  if leaf == "gamma":
    return 0.5 + 0.1 * x
  if "bias" in leaf:
    if "obj_score_head" in name and shape == (1,):
      return 2 + 0.1 * x
    return (0.1 if "bbox_embed" in name else 0.05) * x
  if "reference_points" in name:  # spread centers, extents of 12 to 40 %
    x[:, 2:] = -1.2 + 0.5 * x[:, 2:]
    return x
  if "_token" in name and len(shape) == 2 and shape[0] <= 4:
    return x
  for words, scale in TABLES:
    if any(word in name for word in words):
      return scale * x
  return np.float32(_gain(name) / math.sqrt(_fan_in(name, leaf, shape))) * x


def _fan_in(name: str, leaf: str, shape: tuple[int, ...]) -> float:
  if len(shape) < 2:
    return 1 / 0.09  # 0.3 * x
  transposed = "dconv" in name or "output_upscaling" in name  # (in, out, height, width)
  if leaf == "text_projection" or (len(shape) == 4 and transposed):
    return shape[0]
  return math.prod(shape[1:])


def _gain(name: str) -> float:
  if "bbox_embed.layers.2" in name:
    return 0.5
  if ("boxRPB" in name and "layers.1" in name) or any(word in name for word in LOUDER):
    return 2.0
  return 1.0
