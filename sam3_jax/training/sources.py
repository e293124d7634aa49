"""Sources of training images: annotated files, and scenes composed on the fly."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from sam3_jax.datasets.annotations import AbsentPhrases, Object, Pair
from sam3_jax.datasets.synthetic import drawings, scenes
from sam3_jax.inputs.preprocess import read_image
from sam3_jax.outputs.rle import bounds, encode
from sam3_jax.training.examples import TrainingImage, usable
from sam3_jax.utils.validation import check_numbers


class PairSource:
  """The images of annotation files, read on access.

  Contains the images that have a usable pair (see `usable`).

  Attributes:
    images: directory of the images.
    left_out: the number of unusable pairs (crowds, or not exhaustive).
  """

  def __init__(
    self,
    pairs: Sequence[Pair],
    images: str | Path,
    absent: Mapping[str, AbsentPhrases] | None = None,
  ):
    """Groups pairs by image, in the order of each image's first pair.

    Args:
      pairs: as `annotations.read_checked` returns them.
      images: the directory that their file names are relative to.
      absent: what each image does not show, by file name; None for the pairs without objects.

    Raises:
      ValueError: no pair is usable.
    """
    self.images = Path(images)
    grouped: dict[str, list[Pair]] = {}
    for pair in filter(usable, pairs):
      grouped.setdefault(pair.file_name, []).append(pair)
    self.left_out = len(pairs) - sum(map(len, grouped.values()))
    if not grouped:
      raise ValueError(
        f"none of the {len(pairs)} pairs can be used for training: pairs must be exhaustive "
        "(is_instance_exhaustive 1) and without crowds (iscrowd 0)."
      )
    self._images = list(grouped.items())
    self._absent = absent or {}

  def __len__(self) -> int:
    return len(self._images)

  def __getitem__(self, index: int) -> TrainingImage:
    name, pairs = self._images[index]
    return TrainingImage(read_image(self.images / name), pairs, self._absent.get(name))

  def has_absent_phrases(self) -> bool:
    """Whether some image has a phrase that it does not show."""
    return any(
      self._absent[name].listed()
      if name in self._absent
      else not all(pair.objects for pair in pairs)
      for name, pairs in self._images
    )

  def names(self) -> list[str]:
    """The file names of all images."""
    return [name for name, _ in self._images]

  def name(self, index: int) -> str:
    """The file name of an image, for messages."""
    return self._images[index][0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SceneConfig:
  """Scenes composed on the fly."""

  # Scenes per epoch.
  count: int = 100_000
  # Seed of the scenes.
  seed: int = 0
  # Styles of the drawings, from `drawings.TRAINING`; empty for all of them. A scene has one style.
  styles: tuple[str, ...] = drawings.TRAINING
  # Height and width in pixels; None for a random choice from `scenes.SIZES`.
  size: tuple[int, int] | None = None
  # Probability of a scene in which each object has a style of its own.
  mixed_style_probability: float = 0.0
  # Strength of the changes of colors and shapes, in [0, 1].
  augment: float = 0.0
  # Probability of a scene of many different objects, each of which occurs once.
  variety_probability: float = scenes.VARIETY
  # Absent phrases for each phrase with objects, on average.
  absent_per_present: float = 1.0
  # Probability that a phrase uses the usual name of an object and not a synonym.
  usual_name_probability: float = 0.7

  def __post_init__(self):
    check = functools.partial(check_numbers, self, "scenes")
    check(("count",), 1)
    check(("seed", "absent_per_present"), 0)
    check(("mixed_style_probability", "augment"), 0, 1)
    check(("variety_probability", "usual_name_probability"), 0, 1)
    if not self.styles:
      object.__setattr__(self, "styles", drawings.TRAINING)
    for style in self.styles:
      if style not in drawings.TRAINING:
        known = ", ".join(drawings.TRAINING)
        raise ValueError(f"scenes.styles must be of the training styles {known}; got {style!r}.")
    if self.size is not None and min(self.size) < scenes.SMALLEST:
      raise ValueError(
        f"scenes.size (height, width) must be at least {scenes.SMALLEST}; got {list(self.size)}."
      )


class SceneSource:
  """Scenes composed on access and not stored; scene i is the same every time."""

  def __init__(self, config: SceneConfig):
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
      mixed=config.mixed_style_probability,
      augment=config.augment,
      variety=config.variety_probability,
    )
    phrases = scenes.phrases(
      generator, scene, absent=config.absent_per_present, usual=config.usual_name_probability
    )
    height, width = scene.image.shape[:2]
    rles = [encode(item.mask) for item in scene.objects]
    objects = [Object(rle=rle, box=bounds(rle)) for rle in rles]
    pairs = [
      Pair(
        id=number,
        file_name=self.name(index),
        width=width,
        height=height,
        phrase=phrase.text,
        objects=tuple(objects[i] for i in phrase.objects),
      )
      for number, phrase in enumerate(phrases)
    ]
    return TrainingImage(scene.image, pairs)

  def name(self, index: int) -> str:
    """What to compose again, for messages."""
    return f"scene {index} of seed {self.config.seed}"
