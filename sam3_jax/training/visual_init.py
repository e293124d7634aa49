"""What a head for visual prompts begins as: it looks where it is asked from the first step on.

From a plainly random head it takes thousands of steps until a click makes a difference: until then
the masks show all that stands out, or nothing. So attention between tokens and image begins with
what both have in common, the codes of their positions; what else they are is made small beside it.
"""

from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from sam3_jax.config import Config
from sam3_jax.model.visual.head import init
from sam3_jax.model.visual.two_way import HEADS
from sam3_jax.utils.param_tree import flatten, nest

LOOKS = tuple(
  f"decoder/two_way/{name}/{side}/kernel"
  for name in (
    *(f"layer{i}/{attention}" for i in (0, 1) for attention in ("image_attn", "token_attn")),
    "final_attn",
  )
  for side in ("query", "key")
)
LOOK = 2.0  # weight of the codes of positions, and of what is random, in queries and keys
RANDOM = 0.3
# Factors on parts that are as loud as the codes of positions, or louder.
QUIETER = {
  **dict.fromkeys(("prompt/label_embedding", "prompt/not_a_point", "prompt/no_mask"), 0.1),
  **dict.fromkeys(("neck/level2/smooth/kernel", "neck/level2/smooth/bias"), 0.25),
  **dict.fromkeys(("neck/level1/smooth/kernel", "neck/level1/smooth/bias"), 0.5),
}


def new_head(model: Config, parts: dict[str, Any], seed: int) -> dict[str, Any]:
  """A head to be trained, on the host; its neck begins as the concepts', which reads the same
  trunk, as Meta's did.

  Args:
    model: sizes.
    parts: the model's parameters, `neck` among them; they stay as they are.
    seed: of what is random.
  """
  head = {**jax.device_get(init(model, jax.random.key(seed))), "neck": parts["neck"]}
  flat = {path: np.asarray(x) for path, x in flatten(head).items()}
  looks = positions(flat["prompt/frequencies"])
  for path in LOOKS:
    flat[path] = (LOOK * looks + RANDOM * flat[path]).astype(np.float32)
  for path, factor in QUIETER.items():
    flat[path] = flat[path] * np.float32(factor)
  return nest(flat)


def positions(frequencies: Float[np.ndarray, "2 F"]) -> Float[np.ndarray, "D inner"]:
  """The kernel that takes from a code of a position the sines and cosines of some frequencies, the
  same number for each head, from low to high: the products of two such are highest where the
  positions are the same."""
  count = frequencies.shape[1]
  inner = count  # half of the width, as the frequencies are
  pairs = inner // HEADS // 2
  lowest = np.argsort((frequencies**2).sum(axis=0))[: HEADS * pairs]
  kernel = np.zeros((2 * count, HEADS, inner // HEADS), np.float32)
  for place, frequency in enumerate(lowest):
    pair, head = divmod(place, HEADS)
    kernel[frequency, head, 2 * pair] = kernel[count + frequency, head, 2 * pair + 1] = 1
  return kernel.reshape(2 * count, inner)
