"""Data types: pairs of an image and a phrase, and the entries of annotation files."""

import dataclasses
from typing import Any

from sam3_jax.outputs.rle import Box, Rle
from sam3_jax.outputs.segmentations import Segmentation


@dataclasses.dataclass(frozen=True, slots=True)
class Object:
  """An annotated object.

  Attributes:
    rle: its mask as COCO's compressed run lengths.
    box: x, y, width, height in pixels of the image.
    crowd: the mask covers a group of objects (COCO's `iscrowd`).
  """

  rle: Rle
  box: Box
  crowd: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Pair:
  """An image, a phrase, and all objects in the image that match it; without objects, a negative.

  Attributes:
    id: of SA-Co's entry in `images`; with COCO's layout, the index in the list of pairs.
    file_name: of the image, relative to the directory of images.
    width, height: of the image, in pixels.
    phrase: the noun phrase.
    exhaustive: whether every matching object is annotated.
    objects: the matching objects.
    image_id, category_ids: with COCO's layout, the ids of the image and of the categories with this
      name, usually one. COCO results refer to them.
  """

  id: int
  file_name: str
  width: int
  height: int
  phrase: str
  exhaustive: bool = True
  objects: tuple[Object, ...] = ()
  image_id: int | None = None
  category_ids: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class AbsentPhrases:
  """The phrases that an image is known not to show.

  Attributes:
    phrases: of the whole file, in its order.
    shown: those that the image shows, or may show.
    verified: the only ones that are known to be absent (LVIS); None if all others are.
  """

  phrases: tuple[str, ...]
  shown: frozenset[str] = frozenset()
  verified: frozenset[str] | None = None

  def listed(self) -> list[str]:
    """The absent phrases, in the order of the file."""
    return [
      phrase
      for phrase in self.phrases
      if phrase not in self.shown and (self.verified is None or phrase in self.verified)
    ]


@dataclasses.dataclass(slots=True)
class ImageEntry:
  """An entry of `images`: an image, or in SA-Co's layout a pair of an image and a phrase.

  Attributes:
    id: the first id, if the image is listed several times.
    file_name: relative to the directory of images.
    width, height: in pixels.
    phrase: SA-Co's text_input; "" in COCO's layout.
    exhaustive: in SA-Co's layout, whether every instance of the phrase is annotated.
    negative: LVIS's neg_category_ids: categories verified to be absent; None in other datasets.
    unfinished: LVIS's not_exhaustive_category_ids.
  """

  id: int
  file_name: str
  width: int
  height: int
  phrase: str = ""
  exhaustive: bool = True
  negative: set[int] | None = None
  unfinished: set[int] = dataclasses.field(default_factory=set)


@dataclasses.dataclass(slots=True)
class AnnotationEntry:
  """An entry of `annotations`.

  Attributes:
    name: for messages, such as "annotation 7".
    image: the image it belongs to.
    image_id: the id of the image in the entry; differs from the image's if that is listed twice.
    phrase: the phrase it is an instance of.
    crowd: a group of objects (COCO's `iscrowd`).
    scored: whether it has a score: it is a prediction of a model, not an annotator's.
    box: as in the file; None if there is none.
    segmentation: in any form; polygons are packed.
  """

  name: str
  image: ImageEntry
  image_id: int
  phrase: str
  crowd: bool
  scored: bool
  box: Any
  segmentation: Segmentation
