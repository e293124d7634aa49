"""Sources of images for training: annotated files, and scenes composed when asked for."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sam3_jax.datasets.annotations import Object, Pair
from sam3_jax.datasets.synthetic import drawings, scenes
from sam3_jax.inputs.preprocess import read_image
from sam3_jax.outputs.rle import bounds, encode
from sam3_jax.training.examples import TrainingImage, usable
from sam3_jax.utils.validation import check_numbers


class PairSource:
  """The images of annotation files, read when asked for.

  Only pairs that may be trained on are kept (see `usable`), and only images that have one.

  Attributes:
    left_out: the number of pairs that may not (crowds, or not exhaustive), for the caller to tell.
  """

  def __init__(self, pairs: Sequence[Pair], images: str | Path):
    """Groups pairs by image, in the order of each image's first pair.

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
    self._images = list(grouped.items())

  def __len__(self) -> int:
    return len(self._images)

  def __getitem__(self, index: int) -> TrainingImage:
    name, pairs = self._images[index]
    return TrainingImage(read_image(self.images / name), pairs)

  def names(self) -> list[str]:
    """The files of all images."""
    return [name for name, _ in self._images]

  def name(self, index: int) -> str:
    """The file of an image, for messages."""
    return self._images[index][0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SceneConfig:
  """Scenes composed on the fly.

  Attributes:
    count: scenes of an epoch.
    seed: another one gives other scenes.
    styles: artists of `drawings.TRAINING`, one of whom draws all objects; empty for all of them.
    size: height and width in pixels; None draws one of `scenes.SIZES`.
    mixed: probability of a scene each of whose objects has an artist of its own.
    augment: in [0, 1], how strongly colours and shapes of the drawings are changed.
    variety: probability of a scene of many things, each of them once.
    absent: phrases that find nothing, for each that finds something.
    usual: probability that a thing is asked for by its usual name, not by a synonym.
  """

  count: int = 100_000
  seed: int = 0
  styles: tuple[str, ...] = drawings.TRAINING
  size: tuple[int, int] | None = None
  mixed: float = 0.0
  augment: float = 0.0
  variety: float = scenes.VARIETY
  absent: float = 1.0
  usual: float = 0.7

  def __post_init__(self):
    check = functools.partial(check_numbers, self, "scenes")
    check(("count",), 1)
    check(("seed", "absent"), 0)
    check(("mixed", "augment", "variety", "usual"), 0, 1)
    if not self.styles:
      object.__setattr__(self, "styles", drawings.TRAINING)
    for style in self.styles:
      if style not in drawings.TRAINING:
        known = ", ".join(drawings.TRAINING)
        raise ValueError(f"scenes.styles may name {known}, the styles of training; got {style!r}.")
    if self.size is not None and min(self.size) < scenes.SMALLEST:
      raise ValueError(
        f"scenes.size, height and width, must be {scenes.SMALLEST} or more; got {list(self.size)}."
      )


class SceneSource:
  """Scenes that are composed when asked for, and never stored: scene i is the same each time."""

  def __init__(self, config: SceneConfig):
    """Says what to compose."""
    self.config = config

  def __len__(self) -> int:
    return self.config.count

  def __getitem__(self, index: int) -> TrainingImage:
    config = self.config
    generator = np.random.default_rng((config.seed, index))
    scene = scenes.compose(
      generator,
      config.styles,
      config.size,
      mixed=config.mixed,
      augment=config.augment,
      variety=config.variety,
    )
    asked = scenes.phrases(generator, scene, absent=config.absent, usual=config.usual)
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
    return TrainingImage(scene.image, pairs)

  def name(self, index: int) -> str:
    """What to compose again, for messages."""
    return f"scene {index} of seed {self.config.seed}"
