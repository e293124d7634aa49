"""Sources of pictures for training: annotated files, and lists that are in memory."""

from collections.abc import Sequence
from pathlib import Path

from sam3_jax.annotations import Pair
from sam3_jax.preprocess import read_image
from sam3_jax.training.examples import Picture, usable


class PairSource:
  """The pictures of annotation files, read when asked for.

  Only pairs that may be trained on are kept (see `usable`), and only pictures that have one.

  Attributes:
    left_out: the number of pairs that may not.
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
