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
from sam3_jax.model.video.tracker import init
from sam3_jax.utils.param_tree import flatten, nest

SCENES = 16  # images by which the coarse map is measured
SHARE = 5, 8  # of the channels of a memory, these are content: what the image shows in a cell
CONTENT = 2.0  # standard deviation of these channels; position codes of size 1 are added to them
MATCH = 10.0  # logit of a cell that attends to another of typical, equal content
POSITION = 1.5  # real part of queries and keys of the first layer, in the other channels
RANDOM = 0.3  # factor on the random kernels of queries and keys
READ = 3.0  # factor on what the cross-attention adds to the coarse map
BLOCKS = 0.1  # factor on the output of the memory encoder's blocks; 1e-6 learns slowly


def new_tracker(model: Config, parts: dict[str, Any], seed: int) -> dict[str, Any]:
  """Returns a new tracker, on the host.

  The first channels of a memory are the principal components of the coarse map's cell. Every
  cross-attention compares them, in the channels that rotary positions turn least, so that an object
  matches wherever it moves. In its other channels, the first layer prefers near cells.

  Args:
    model: sizes, with `video`.
    parts: the model's parameters, including the head for visual prompts; they are not changed.
    seed: of the random parameters.
  """
  tracker = flatten(jax.device_get(init(model, jax.random.key(seed))))
  flat = {path: np.array(x, np.float32) for path, x in tracker.items()}
  cells = _coarse_cells(model, parts)
  mean, scale = cells.mean(axis=0), cells.std(axis=1).mean()
  normalized = (cells - cells.mean(axis=1, keepdims=True)) / cells.std(axis=1, keepdims=True)
  cross, encoder = "memory_attention/layers/cross_attn", "memory_encoder"
  flat["memory_attention/norm_final/scale"][:] = scale
  flat[f"{encoder}/blocks/scale"][:] = BLOCKS
  flat[f"{cross}/out/kernel"] *= READ

  project = flat[f"{encoder}/project/kernel"][0, 0]
  content = np.arange(project.shape[1] * SHARE[0] // SHARE[1])
  components = principal_components(cells - mean, len(content))
  image = flat[f"{encoder}/image_project/kernel"][0, 0]
  image /= scale  # a mask has features of size 1
  image[:, content] = CONTENT * components
  flat[f"{encoder}/image_project/bias"][:] = -mean @ image
  flat[f"{encoder}/mask/project/kernel"][..., content] = 0
  project[:, content] = 0
  project[content, content] = 1
  flat[f"{cross}/value/kernel"][:, content] /= CONTENT

  channels = slow_channels(model.width)[: len(content)]
  factor = np.sqrt(MATCH * np.sqrt(model.width) / len(content))
  for name in ("query", "key"):
    kernel, bias = (flat[f"{cross}/{name}/{x}"] for x in ("kernel", "bias"))
    kernel *= RANDOM
    kernel[:, :, channels] = 0
    bias[0, : model.width // 2] = POSITION  # the real parts come first
    bias[:, channels] = 0
  flat[f"{cross}/key/kernel"][:, content, channels] = factor / CONTENT
  flat[f"{cross}/query/kernel"][:, :, channels] = factor * scale * components
  flat[f"{cross}/query/bias"][:, channels] = -factor * scale * normalized.mean(axis=0) @ components
  return nest(flat)


def principal_components(x: Float[np.ndarray, "N D"], count: int) -> Float[np.ndarray, "D count"]:
  """Projects rows of mean 0 to their main directions, scaled so that a component has size 1 on
  average. The largest keep their lead in part: a standard deviation is replaced by its root."""
  _, sizes, directions = np.linalg.svd(x, full_matrices=False)
  sizes = np.maximum(sizes, 1e-6 * sizes[0]) / np.sqrt(len(x))
  kernel = directions[:count].T / np.sqrt(sizes[:count])
  return kernel / np.sqrt(np.square(x @ kernel).mean())


def slow_channels(width: int) -> np.ndarray:
  """The channels of the pairs of both axes, from those that turn the least per cell."""
  pairs = np.arange(width // 2).reshape(2, -1)[:, ::-1]  # frequencies fall along an axis
  return np.stack([pairs, width // 2 + pairs]).transpose(2, 1, 0).ravel()


def _coarse_cells(model: Config, parts: dict[str, Any]) -> Float[np.ndarray, "N D"]:
  """The cells of the coarse maps of a few scenes."""
  generator = np.random.default_rng(0)
  encode = jax.jit(VideoFunctions(model, jnp.float32).encode)
  found: list[np.ndarray] = []
  side = model.image_size
  for _ in range(SCENES):
    size = max(side, scenes.SMALLEST)
    scene = scenes.compose(generator, drawings.TRAINING, (size, size))
    embedding: Any = encode(parts, scene.image[None, :side, :side])
    found.append(np.asarray(embedding.coarse[0], np.float32).reshape(-1, model.width))
  return np.concatenate(found)
