"""Initial parameters of the head for visual prompts: it attends to the prompt's position at once.

With plain random parameters it takes thousands of steps until a click makes a difference; until
then the masks show every salient object, or nothing. So attention between tokens and image starts
with queries and keys that are positional encodings, and other features are scaled down.
"""

from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from sam3_jax.config import Config
from sam3_jax.model.visual.head import init
from sam3_jax.model.visual.two_way import HEADS
from sam3_jax.utils.param_tree import flatten, nest

ATTENTION_KERNELS = tuple(
  f"decoder/two_way/{name}/{side}/kernel"
  for name in (
    *(f"layer{i}/{attention}" for i in (0, 1) for attention in ("image_attn", "token_attn")),
    "final_attn",
  )
  for side in ("query", "key")
)
# Weights of positional encodings and of random kernels in queries and keys.
POSITION, RANDOM = 2.0, 0.3
# Factors on parameters whose features are as large as the positional encodings, or larger.
SCALED_DOWN = {
  **dict.fromkeys(("prompt/label_embedding", "prompt/not_a_point", "prompt/no_mask"), 0.1),
  **dict.fromkeys(("neck/level2/smooth/kernel", "neck/level2/smooth/bias"), 0.25),
  **dict.fromkeys(("neck/level1/smooth/kernel", "neck/level1/smooth/bias"), 0.5),
}


def new_head(model: Config, parts: dict[str, Any], seed: int) -> dict[str, Any]:
  """Returns a new head, on the host. Its neck is a copy of the detector's, as in Meta's model.

  Args:
    model: sizes.
    parts: the model's parameters, including `neck`; they are not changed.
    seed: of the random parameters.
  """
  head = {**jax.device_get(init(model, jax.random.key(seed))), "neck": parts["neck"]}
  flat = {path: np.asarray(x) for path, x in flatten(head).items()}
  kernel = position_kernel(flat["prompt/frequencies"])
  for path in ATTENTION_KERNELS:
    flat[path] = (POSITION * kernel + RANDOM * flat[path]).astype(np.float32)
  for path, factor in SCALED_DOWN.items():
    flat[path] = flat[path] * np.float32(factor)
  return nest(flat)


def position_kernel(frequencies: Float[np.ndarray, "2 F"]) -> Float[np.ndarray, "D inner"]:
  """A kernel that selects the sines and cosines of the lowest frequencies of a positional encoding.

  Each head gets the same number of frequencies, from low to high. The dot product of two such
  projections is largest for equal positions.
  """
  count = frequencies.shape[1]
  inner = count  # half of the width, like the number of frequencies
  pairs = inner // HEADS // 2
  lowest = np.argsort((frequencies**2).sum(axis=0))[: HEADS * pairs]
  kernel = np.zeros((2 * count, HEADS, inner // HEADS), np.float32)
  for number, frequency in enumerate(lowest):
    pair, head = divmod(number, HEADS)
    kernel[frequency, head, 2 * pair] = kernel[count + frequency, head, 2 * pair + 1] = 1
  return kernel.reshape(2 * count, inner)
