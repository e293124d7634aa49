"""Rows made of an image with rectangles, and invariants of all rows."""

from typing import Any

import numpy as np
from evaluation_data import target

from sam3_jax.datasets.annotations import Object, Pair
from sam3_jax.training.examples import DataConfig, TrainingImage, example

HEIGHT, WIDTH = 36, 48
IMAGE = np.random.default_rng(0).integers(1, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
SIZES: dict[str, Any] = {
  "image_size": 64, "mask_size": 16, "prompts_per_image": 5, "present_prompts": 3,
  "max_objects": 4, "max_exemplars": 3,
}  # fmt: skip
CONFIG = DataConfig(**SIZES)
# Tokens are the characters of a phrase, so that tests can read phrases from a row.
CONTEXT = 24


def tokenize(phrases) -> np.ndarray:
  rows = np.zeros((len(phrases), CONTEXT), np.int32)
  for row, phrase in zip(rows, phrases, strict=True):
    row[: len(phrase)] = [ord(letter) for letter in phrase]
  return rows


def phrases_of(row) -> list[str]:
  return ["".join(map(chr, tokens[tokens > 0])) for tokens in row.tokens]


def box_object(x: int, y: int, w: int, h: int, *, crowd: bool = False) -> Object:
  return target(x, y, w, h, crowd=crowd, size=(HEIGHT, WIDTH))


def pair(phrase: str, *objects: Object, exhaustive: bool = True) -> Pair:
  return Pair(0, "a.png", WIDTH, HEIGHT, phrase, exhaustive, objects)


def row(pairs, seed: int = 0, config: DataConfig = CONFIG, **options):
  if options:
    config = DataConfig(**(vars(config) | options))
  return example(TrainingImage(IMAGE, pairs), 7, config, tokenize, np.random.default_rng(seed))


PAIRS = (
  pair("nothing"),
  pair("cat", box_object(4, 6, 10, 12), box_object(30, 20, 6, 8)),
  pair("no one"),
  pair("dog", box_object(20, 2, 8, 8)),
)


def check_invariants(row, config: DataConfig = CONFIG):
  """Checks what holds for every row, for all random numbers."""
  valid, prompts = row.targets.valid, row.prompt_valid
  present = valid.any(axis=1)
  count = present.sum()
  assert count <= config.present_prompts
  assert present[:count].all()  # phrases with objects come first
  assert (
    prompts == (np.arange(config.prompts_per_image) < prompts.sum())
  ).all()  # and padding last
  assert not (present & ~prompts).any()
  assert not row.targets.masks[~valid].any()
  for boxes in (row.targets.boxes[valid], row.boxes[row.box_valid]):
    low, high = boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2
    assert (low > -1e-6).all()
    assert (high < 1 + 1e-6).all()
    assert (boxes[:, 2:] >= 0).all()
  assert (row.targets.boxes[valid][:, 2:] > 0).all()
  assert not (row.box_valid.any(axis=1) & ~present).any()
  assert not (row.positive & ~row.box_valid).any()
