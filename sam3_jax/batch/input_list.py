"""The inputs of a job: images and their prompts, in a list or in less memory."""

import array
import dataclasses
from collections.abc import Sequence
from typing import overload

from sam3_jax.batch.image_bytes import ImageFile
from sam3_jax.batch.prompt_schema import AnyPrompt
from sam3_jax.batch.record_files.columns import RecordKey
from sam3_jax.utils.identity import FileIdentity


@dataclasses.dataclass(frozen=True, slots=True)
class Input:
  """An image and its prompts.

  Attributes:
    name: used in the results: as listed, or relative to the directory.
    path: the path or URL of the file that contains the image.
    prompts: at least one, without duplicates.
    span: offset and number of bytes in that file; None for the whole file.
    identity: of the file when it was listed; None if it did not exist. With a span: number of bytes
      of the span, modification time or version of the file.
    record: the record of that file that has the image; None if the file or the span is the image.
  """

  name: str
  path: str
  prompts: tuple[AnyPrompt, ...]
  span: tuple[int, int] | None = None
  identity: FileIdentity | None = None
  record: RecordKey | None = None


def image_file(item: Input) -> ImageFile:
  """Where the image of an input is stored."""
  return ImageFile(item.name, item.path, item.span, item.identity, item.record)


class PrefixInputs(Sequence[Input]):
  """The images of a prefix, which have the same prompts, in a fraction of the memory of a list."""

  def __init__(self, root: str, prompts: tuple[AnyPrompt, ...]):
    """Begins with no image.

    Args:
      root: URL of the prefix.
      prompts: of each image.
    """
    self._root, self._prompts = root.rstrip("/"), prompts
    self._text, self._ends = bytearray(), array.array("Q")  # names and versions, one by one
    self._sizes = array.array("Q")

  def append(self, name: str, size: int, version: str) -> None:
    for text in (name, version):
      self._text += text.encode()
      self._ends.append(len(self._text))
    self._sizes.append(size)

  def __len__(self) -> int:
    return len(self._sizes)

  @overload
  def __getitem__(self, index: int) -> Input: ...

  @overload
  def __getitem__(self, index: slice) -> list[Input]: ...

  def __getitem__(self, index: int | slice) -> Input | list[Input]:
    if isinstance(index, slice):
      return [self[i] for i in range(*index.indices(len(self)))]
    if index < 0:
      index += len(self)
    if not 0 <= index < len(self):
      raise IndexError(index)
    start = self._ends[2 * index - 1] if index else 0
    middle, end = self._ends[2 * index : 2 * index + 2]
    name, version = self._text[start:middle].decode(), self._text[middle:end].decode()
    identity = FileIdentity(self._sizes[index], 0, "", version)
    return Input(name, f"{self._root}/{name}", self._prompts, None, identity)
