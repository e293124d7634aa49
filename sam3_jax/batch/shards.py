"""Webdataset's tar files: which pictures are where in them, so that they can be read out of order.

Files whose names are the same up to the first dot belong together: `a/0001.jpg`, `a/0001.json`
(https://github.com/webdataset/webdataset).
"""

import tarfile
from collections.abc import Collection, Iterator
from typing import NamedTuple


class Sample(NamedTuple):
  """A picture in a tar file.

  Attributes:
    name: of the file in it.
    span: offset in the tar file, and bytes.
    notes: the .json beside it; empty if there is none.
  """

  name: str
  span: tuple[int, int]
  notes: bytes


def members(path: str, endings: Collection[str]) -> Iterator[Sample]:
  """The pictures of a tar file that is not compressed, in its order.

  Raises:
    ValueError: it is no such file, or only the beginning of one.
  """
  try:
    with tarfile.open(path, "r:") as shard:
      files = [member for member in shard if member.isreg()]
      notes = {_key(one.name): one for one in files if one.name.lower().endswith(".json")}
      for member in files:
        dot = member.name.rfind(".")
        if dot < 0 or member.name[dot:].lower() not in endings:
          continue
        beside = notes.get(_key(member.name))
        file = shard.extractfile(beside) if beside else None
        yield Sample(member.name, (member.offset_data, member.size), file.read() if file else b"")
  except tarfile.TarError as error:
    raise ValueError(f"{path} is no tar file, or only part of one ({error}).") from error


def _key(name: str) -> str:
  folder, slash, base = name.rpartition("/")
  return folder + slash + base.partition(".")[0]
