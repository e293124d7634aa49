"""Sources of pictures for training: annotated files, and scenes composed when asked for.

A plain list of `Picture`s is a source too.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sam3_jax.annotations import Object, Pair
from sam3_jax.preprocess import read_image
from sam3_jax.rle import bounds, encode
from sam3_jax.training import drawings, scenes
from sam3_jax.training.examples import Picture, usable


class PairSource:
  """The pictures of annotation files, read when asked for.

  Only pairs that may be trained on are kept (see `usable`), and only pictures that have one.

  Attributes:
    left_out: the number of pairs that may not (crowds, or not exhaustive), for the caller to tell.
  """

  def __init__(self, pairs: Sequence[Pair], images: str | Path):
    """Groups pairs by picture, in the order of each picture's first pair.

    Args:
      pairs: as `annotations.read_checked` gives them.
      images: the folder that their file names are relative to.

    Raises:
      ValueError: there is nothing to train on.
    """
    self.images = Path(images)
    grouped: dict[str, list[Pair]] = {}
    for pair in filter(usable, pairs):
      grouped.setdefault(pair.file_name, []).append(pair)
    self.left_out = len(pairs) - sum(map(len, grouped.values()))
    if not grouped:
      raise ValueError(
        f"none of the {len(pairs)} pairs can be trained on: each must be exhaustive "
        "(is_instance_exhaustive 1) and without crowds (iscrowd 0)."
      )
    self._pictures = list(grouped.items())

  def __len__(self) -> int:
    return len(self._pictures)

  def __getitem__(self, index: int) -> Picture:
    name, pairs = self._pictures[index]
    return Picture(read_image(self.images / name), pairs)

  def name(self, index: int) -> str:
    """The file of a picture, for messages."""
    return self._pictures[index][0]


class SceneSource:
  """Scenes that are composed when asked for, and never stored: scene i is the same each time."""

  def __init__(
    self,
    count: int,
    seed: int,
    styles: Sequence[str] = drawings.TRAINING,
    *,
    size: tuple[int, int] | None = None,
    mixed: float = 0.0,
    augment: float = 0.0,
    variety: float = scenes.VARIETY,
    absent: float = 1.0,
    usual: float = 0.7,
  ):
    """Says what to compose.

    Args:
      count: scenes an epoch.
      seed: another one gives other scenes.
      styles, size, mixed, augment, variety: as in `scenes.compose`.
      absent, usual: as in `scenes.phrases`.
    """
    if count < 1:
      raise ValueError(f"a source needs at least 1 scene; got count {count}.")
    self.count = count
    self.seed = seed
    self._compose: dict[str, Any] = {
      "styles": tuple(styles),
      "size": size,
      "mixed": mixed,
      "augment": augment,
      "variety": variety,
    }
    self._phrases: dict[str, Any] = {"absent": absent, "usual": usual}

  def __len__(self) -> int:
    return self.count

  def __getitem__(self, index: int) -> Picture:
    generator = np.random.default_rng((self.seed, index))
    scene = scenes.compose(generator, **self._compose)
    asked = scenes.phrases(generator, scene, **self._phrases)
    height, width = scene.image.shape[:2]
    rles = [encode(item.mask) for item in scene.objects]
    objects = [Object(rle=rle, box=bounds(rle)) for rle in rles]
    pairs = [
      Pair(
        id=place,
        file_name=self.name(index),
        width=width,
        height=height,
        phrase=one.text,
        objects=tuple(objects[i] for i in one.objects),
      )
      for place, one in enumerate(asked)
    ]
    return Picture(scene.image, pairs)

  def name(self, index: int) -> str:
    """What to compose again, for messages."""
    return f"scene {index} of seed {self.seed}"
