"""Data types: annotated videos and their objects."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt8

from sam3_jax.inputs.preprocess import read_image
from sam3_jax.outputs.rle import Box, Rle, decode


@dataclasses.dataclass(frozen=True, slots=True)
class VideoObject:
  """An annotated object.

  Attributes:
    id: of its entry in `annotations`, unique in the file.
    phrase: its noun phrase, or the name of its category; "" if it has neither.
    rles: its mask in each frame; None where it is not visible.
    crowd: the masks cover a group of objects.
    category: its `category_id`; None if it has none.
    boxes: its boxes in the file, None where it is not visible; empty if they were not read.
  """

  id: int
  phrase: str
  rles: tuple[Rle | None, ...]
  crowd: bool = False
  category: int | None = None
  boxes: tuple[Box | None, ...] = ()

  @property
  def first(self) -> int:
    """Index of the first frame in which it is visible."""
    return next(t for t, rle in enumerate(self.rles) if rle is not None)


@dataclasses.dataclass(frozen=True, slots=True)
class VideoPair:
  """A pair of a video and a phrase: all objects that match the phrase are annotated, or there are
  none.

  Attributes:
    category: its `category_id`, which annotations and predictions refer to; None if it has none.
    phrase: the noun phrase.
  """

  category: int | None
  phrase: str


@dataclasses.dataclass(frozen=True, slots=True)
class Video:
  """A video and its objects.

  Attributes:
    id: unique in the file.
    name: `video_name` or `name`, or the directory of its first frame.
    file_names: of its frames, relative to the directory of frames.
    width, height: in pixels.
    objects: in the order of the file.
    phrases: every phrase that is known to match all its objects or none.
    pairs: the entries of `video_np_pairs`, in the order of the file; empty without that list.
    occluded: whether something hides a part of an object in any frame; None if the file does not
      tell.
  """

  id: int
  name: str
  file_names: tuple[str, ...]
  width: int
  height: int
  objects: tuple[VideoObject, ...] = ()
  phrases: tuple[str, ...] = ()
  pairs: tuple[VideoPair, ...] = ()
  occluded: bool | None = None

  def __len__(self) -> int:
    return len(self.file_names)

  def mask(self, one: VideoObject, t: int) -> Bool[np.ndarray, "h w"]:
    """The mask of an object in frame `t`; empty where it is not visible."""
    rle = one.rles[t]
    if rle is None:
      return np.zeros((self.height, self.width), bool)
    return decode(rle).astype(bool)

  def frames(self, folder: str | Path) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    """Reads the frames as RGB; `folder` is the directory of all videos' frames.

    Raises:
      FileNotFoundError, ValueError: a frame is missing, damaged, or has another size.
    """
    for name in self.file_names:
      image = read_image(Path(folder) / name)
      if image.shape[:2] != (self.height, self.width):
        raise ValueError(self.size_fault(Path(folder) / name, image.shape[1], image.shape[0]))
      yield image

  @property
  def title(self) -> str:
    """The id and the name, for messages."""
    return f"video {self.id} ({self.name:.60})"

  def size_fault(self, path: Path, width: int, height: int) -> str:
    """What is wrong with a frame of another size."""
    return (
      f"{path} is displayed as {width} x {height}, but {self.title} is {self.width} x "
      f"{self.height} (width x height)"
    )
