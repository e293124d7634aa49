"""A seeded small model for tests of training, its checkpoint, and random batches."""

import functools
from pathlib import Path
from typing import Any

import numpy as np

from sam3_jax.checkpoint import bundle
from sam3_jax.config import Config, TextConfig, TrunkConfig
from sam3_jax.model.sam3 import parameter_shapes
from sam3_jax.model.visual import head
from sam3_jax.training.batch import Batch, Targets
from sam3_jax.utils.param_tree import flatten, nest

CONFIG = Config(
  trunk=TrunkConfig(
    width=32, heads=2, mlp_width=64, groups=2, windowed=1, window=2, pretrain_grid=4, drop_path=0.0
  ),
  text=TextConfig(width=16, heads=2, mlp_width=32, layers=2, context=8, vocabulary=49408),
  image_size=32,
  patch=8,
  width=32,
  heads=2,
  mlp_width=64,
  geometry_layers=1,
  fusion_layers=2,
  decoder_layers=2,
  queries=6,
  concept_points=False,
  dropout=0.0,
)


@functools.cache
def parameters() -> dict[str, np.ndarray]:
  """Random parameters by path, from NumPy: compiling `init` takes longer than a test."""
  return random_parameters(parameter_shapes(CONFIG))


@functools.cache
def visual_parameters() -> dict[str, np.ndarray]:
  """Random parameters of the head for visual prompts."""
  return random_parameters({"visual": head.parameter_shapes(CONFIG)})


def random_parameters(shapes: dict[str, Any]) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(0)
  parameters = {}
  for path, leaf in flatten(shapes).items():
    offset = 1.0 if path.endswith("/scale") else 0.0
    fan_in = leaf.shape[-2] if path.endswith("/kernel") else 100
    parameters[path] = (offset + rng.standard_normal(leaf.shape) / fan_in**0.5).astype(np.float32)
  return parameters


def save(path: Path, visual: bool = False) -> Path:
  """Saves a checkpoint of the model, optionally with the head for visual prompts."""
  tokenizer = Path(__file__).parent / "goldens" / "tokenizer.model"
  info = {"name": "toy", "licence": "CC0-1.0", "trained": False}
  params = parameters() | (visual_parameters() if visual else {})
  bundle.save(path, nest(params), CONFIG, tokenizer.read_bytes(), info=info)
  return path


def batch(seed: int, images: int = 4, prompts: int = 2, objects: int = 3) -> Batch:
  """Random images and targets. Only the first prompt of each image has objects, 1 .. `objects`."""
  rng = np.random.default_rng(seed)
  rows = (images, prompts)
  counts = rng.integers(1, objects + 1, images)
  valid = np.zeros((*rows, objects), bool)
  valid[:, 0] = np.arange(objects) < counts[:, None]
  centers, sizes = (
    rng.uniform(0.3, 0.7, (*rows, objects, 2)),
    rng.uniform(0.1, 0.5, (*rows, objects, 2)),
  )
  tokens = np.zeros((*rows, CONFIG.text.context), np.int32)
  tokens[..., :3] = np.stack(
    [np.full(rows, 49406), rng.integers(1, 49000, rows), np.full(rows, 49407)], axis=-1
  )
  side = CONFIG.mask_size
  targets: dict[str, Any] = {
    "boxes": np.concatenate([centers, sizes], axis=-1).astype(np.float32),
    "masks": rng.integers(0, 256, (*rows, objects, side, side)).astype(np.uint8),
    "valid": valid,
  }
  fields: dict[str, Any] = {
    "images": rng.integers(0, 256, (images, 32, 32, 3)).astype(np.uint8),
    "sizes": np.full((images, 2), 32, np.int32),
    "ids": (100 * seed + np.arange(images)).astype(np.int32),
    "tokens": tokens,
    "boxes": np.full((*rows, 1, 4), 0.5, np.float32),
    "positive": np.ones((*rows, 1), bool),
    "box_valid": np.zeros((*rows, 1), bool),
    "prompt_valid": np.ones(rows, bool),
    "targets": Targets(**targets),
  }
  return Batch(**fields)


class RandomBatches:
  """An endless sequence of random batches, with the interface of `data.Batches`."""

  def __init__(self, images: int = 4):
    self.images, self.number = images, 0

  def __next__(self) -> Batch:
    self.number += 1
    return batch(self.number, self.images)

  def get_state(self) -> dict[str, int]:
    return {"number": self.number}

  def set_state(self, state: dict[str, int]) -> None:
    self.number = state["number"]

  def name(self, index: int) -> str:
    return f"{index}.png"
