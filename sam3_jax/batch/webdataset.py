"""Webdataset's tar files: which images are where in them, so that they can be read out of order.

Files of one directory whose names are the same up to the first dot are a sample, and the rest is
the extension: `0001.jpg`, `0001.seg.png`, `0001.json` (https://github.com/webdataset/webdataset).
"""

import os
import posixpath
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from sam3_jax.inputs.image_file import IMAGE_SUFFIXES
from sam3_jax.inputs.image_listing import is_hidden, is_result
from sam3_jax.utils.notes import ListingNotes

MAX_PROMPTS = 2**24  # bytes of a .json beside an image
_BLOCK = tarfile.BLOCKSIZE
_MAGIC = {
  b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd",
  b"PK": "zip",
}  # fmt: skip


class Sample(NamedTuple):
  """An image in a tar file.

  Attributes:
    name: of the member.
    span: offset in the tar file, and bytes.
    notes: the .json beside it; empty if there is none.
  """

  name: str
  span: tuple[int, int]
  notes: bytes


def members(path: str, notes: ListingNotes) -> Iterator[Sample]:
  """The images of a whole tar file that is not compressed, in its order.

  A member that comes again later is replaced, as by unpacking. Beside an image such as `0001.jpg`,
  images with an extension of several parts, such as `0001.seg.png`, are labels.

  Args:
    path: of the tar file.
    notes: counts the members that are left out.

  Raises:
    ValueError: it is not a tar file, or damaged, or does not end as a tar file ends.
    OSError: it cannot be read.
  """
  with open(path, "rb") as file:
    files = _regular(_walk(file, path), notes)
    images = [name for name in files if posixpath.splitext(name)[1].lower() in IMAGE_SUFFIXES]
    plain = {_key(name) for name in images if "." not in _extension(name)}
    prompts = {name[: -len(".json")]: name for name in files if name.lower().endswith(".json")}
    used = set(images)
    for name in images:
      several = "." in _extension(name)
      if several and _key(name) in plain:
        notes.skip("label image", "label images")
        continue
      if several:  # as cameras and screenshots name files: not webdataset's rule
        what = "counts as an image, though its name has several dots"
        notes.remark(f"member {what}", f"members {what.replace('counts', 'count')}", name)
      beside = prompts.get(posixpath.splitext(name)[0], prompts.get(_key(name), ""))
      used.add(beside)
      text = _content(file, path, files[beside]) if beside else b""
      yield Sample(files[name].name, (files[name].offset_data, files[name].size), text)
    for name in files.keys() - used:
      notes.skip_suffix(name)


def _regular(found: list[tarfile.TarInfo], notes: ListingNotes) -> dict[str, tarfile.TarInfo]:
  """The last files of each name that are neither hidden nor anything but files."""
  files: dict[str, tarfile.TarInfo] = {}
  for member in found:
    name = member.name
    if "/" in name:  # as in "./a.jpg", which is the same file as "a.jpg"
      name = posixpath.normpath(name)
    if member.isdir() or is_hidden(name, notes) or is_result(name, notes):
      continue
    if member.issym() or member.islnk():
      notes.skip("link", "links")
    elif not member.isreg():
      notes.skip("not a regular file", "not regular files")
    elif member.issparse():
      notes.skip("sparse member", "sparse members")
    else:
      if files.pop(name, None):
        notes.skip("member replaced by a later one", "members replaced by later ones")
      files[name] = member
  return files


def _walk(file: BinaryIO, path: str) -> list[tarfile.TarInfo]:
  """All members, once it is sure that there are no others.

  Python's reader takes a damaged header, or the end of the file, for the end of the archive.
  """
  found: list[tarfile.TarInfo] = []
  end, problem = 0, ""
  try:
    with tarfile.open(fileobj=file, mode="r:", errors="surrogateescape", encoding="utf-8") as shard:
      while member := shard.next():
        found.append(member)
        if member.size < 0 or shard.offset <= end:
          raise tarfile.ReadError("bad size")
        end = shard.offset
  # Python's reader raises all of these on headers that no one wrote in good faith.
  except (tarfile.TarError, ValueError, OverflowError, RecursionError, MemoryError):
    problem = "a damaged header"
  size = os.fstat(file.fileno()).st_size
  if not found and (problem or not _is_end(file, 0)):
    file.seek(0)
    start = file.read(8)
    kind = next((kind for magic, kind in _MAGIC.items() if start.startswith(magic)), "")
    how = f"but compressed ({kind}); unpack it" if kind else "or its first header is damaged"
    raise ValueError(f"{path} is not a tar file ({size:,} bytes), {how}.")
  if end > size:
    problem = f"the end of the file, at byte {size:,}, inside {found[-1].name!r:.60}"
  elif problem:
    problem = f"{problem} at byte {end:,}"
  else:
    problem = _fault_behind(file, end)
  if problem:
    count = "1 member" if len(found) == 1 else f"{len(found):,} members"
    raise ValueError(f"{path} is damaged or cut: {count}, then {problem}; copy or pack it again.")
  return found


def _is_end(file: BinaryIO, offset: int) -> bool:
  file.seek(offset)
  return file.read(2 * _BLOCK) == bytes(2 * _BLOCK)


def _fault_behind(file: BinaryIO, end: int) -> str:
  """What is wrong behind the last member; empty if the archive ends there and nothing follows."""
  if not _is_end(file, end):
    file.seek(end)
    block = file.read(_BLOCK)
    if not block.strip(b"\0"):
      return f"no end mark (two blocks of zeros) at byte {end:,}"
    what = "a damaged header" if len(block) == _BLOCK else "the end of the file inside a header"
    return f"{what} at byte {end:,}"
  at = end + 2 * _BLOCK
  while piece := file.read(2**20):
    if piece.strip(b"\0"):
      at += len(piece) - len(piece.lstrip(b"\0"))
      return (
        f"the end mark, but something follows at byte {at:,} (several tar files put together by "
        "cat must be given one by one)"
      )
    at += len(piece)
  return ""


def _content(file: BinaryIO, path: str, member: tarfile.TarInfo) -> bytes:
  if member.size > MAX_PROMPTS:
    raise ValueError(f"{path}: {member.name} has {member.size:,} bytes, too many for prompts.")
  file.seek(member.offset_data)
  return file.read(member.size)


def _key(name: str) -> str:
  directory, slash, base = name.rpartition("/")
  return directory + slash + base.partition(".")[0]


def _extension(name: str) -> str:
  return name.rpartition("/")[2].partition(".")[2]
