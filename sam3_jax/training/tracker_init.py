"""Initial parameters of a tracker: it attends to the same place and to the same content of earlier
frames at once, and keeps the scale of the coarse map, which the head for visual prompts knows.

With plain random parameters every query reads the average of all memories, and the final norm
scales the map down, so that the frozen head predicts no masks to learn from.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from sam3_jax.config import Config
from sam3_jax.datasets.synthetic import drawings, scenes
from sam3_jax.inference.video.functions import VideoFunctions
from sam3_jax.model.rope import THETA
from sam3_jax.model.video.tracker import init
from sam3_jax.utils.param_tree import flatten, nest

# Queries and keys of the first cross-attention have this constant real part, which rotary positions
# turn into a preference for near cells, and random kernels of this scale.
POSITION, RANDOM = 3.0, 0.3
# Those of the other layers are the image's part of a memory, times this factor. They are in channel
# pairs that turn by less than this angle per cell, so that an object matches wherever it moves.
CONTENT, TURN = 1.5, 0.05
READ = 3.0  # factor on what the cross-attention adds to the coarse map
BLOCKS = 0.1  # factor on the output of the memory encoder's blocks; 1e-6 learns slowly
SCENES = 4  # images by which the size of the coarse map is measured


def new_tracker(model: Config, parts: dict[str, Any], seed: int) -> dict[str, Any]:
  """Returns a new tracker, on the host.

  Args:
    model: sizes, with `video`.
    parts: the model's parameters, including the head for visual prompts; they are not changed.
    seed: of the random parameters.
  """
  tracker = flatten(jax.device_get(init(model, jax.random.key(seed))))
  flat = {path: np.array(x, np.float32) for path, x in tracker.items()}
  cross, scale = "memory_attention/layers/cross_attn", np.float32(_coarse_scale(model, parts))
  for name in ("query", "key"):
    flat[f"{cross}/{name}/kernel"] *= RANDOM
    flat[f"{cross}/{name}/bias"][0, : model.width // 2] = POSITION  # the real parts come first
  flat[f"{cross}/out/kernel"] *= READ
  flat["memory_attention/norm_final/scale"][:] = scale
  flat["memory_encoder/image_project/kernel"] /= scale  # a mask has features of size 1
  flat["memory_encoder/blocks/scale"][:] = BLOCKS
  image, project = (flat[f"memory_encoder/{x}/kernel"][0, 0] for x in ("image_project", "project"))
  channels = slow_channels(model.width)[: project.shape[1]]
  flat[f"{cross}/query/kernel"][1:, :, channels] = (
    CONTENT * scale * (image @ project)[:, : len(channels)]
  )
  flat[f"{cross}/key/kernel"][1:, :, channels] = (
    CONTENT * np.eye(project.shape[1])[:, : len(channels)]
  )
  return nest(flat)


def slow_channels(width: int) -> np.ndarray:
  """The real channels of the pairs that turn slowly, of both axes in turns."""
  frequencies = THETA ** (-np.arange(0, width, 4) / width)
  slow = np.flatnonzero(frequencies < TURN)
  return np.stack([slow, slow + len(frequencies)], axis=1).ravel()


def _coarse_scale(model: Config, parts: dict[str, Any]) -> float:
  """The standard deviation over channels of the coarse map's cells, averaged over a few scenes."""
  generator = np.random.default_rng(0)
  encode = jax.jit(VideoFunctions(model, jnp.float32).encode)
  found: list[Float[np.ndarray, "H W"]] = []
  side = model.image_size
  for _ in range(SCENES):
    size = max(side, scenes.SMALLEST)
    scene = scenes.compose(generator, drawings.TRAINING, (size, size))
    embedding: Any = encode(parts, scene.image[None, :side, :side])
    found.append(np.asarray(embedding.coarse[0]).std(axis=-1))
  return float(np.mean(found))
