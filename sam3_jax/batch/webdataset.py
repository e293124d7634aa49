"""Lists the images in WebDataset tar files with their offsets, so that any order can be read.

Files of one directory with the same name up to the first dot form a sample; the rest of the name is
the extension: `0001.jpg`, `0001.seg.png`, `0001.json` (https://github.com/webdataset/webdataset).
"""

import os
import posixpath
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from sam3_jax.inputs.image_file import IMAGE_SUFFIXES
from sam3_jax.inputs.image_listing import is_hidden, is_result
from sam3_jax.storage.objects import open_binary
from sam3_jax.storage.urls import redact
from sam3_jax.utils.notes import ListingNotes

MAX_SIDECAR = 2**24  # bytes of a .json file beside an image
_BLOCK = tarfile.BLOCKSIZE
_MAGIC = {
  b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd",
  b"PK": "zip",
}  # fmt: skip


class Sample(NamedTuple):
  """An image in a tar file.

  Attributes:
    name: of the member.
    span: offset and number of bytes in the tar file.
    sidecar: content of the .json file beside it; empty if there is none.
  """

  name: str
  span: tuple[int, int]
  sidecar: bytes


def list_samples(path: str, notes: ListingNotes) -> Iterator[Sample]:
  """The images of an uncompressed tar file, in its order.

  A later member of the same name replaces an earlier one, as in extraction. If a sample has an
  image such as `0001.jpg`, its images with a longer extension, such as `0001.seg.png`, are labels.

  Args:
    path: path or URL of the tar file.
    notes: counts the members that are left out.

  Raises:
    ValueError: the file is not a tar file, is damaged, or lacks the end mark.
    OSError: the file cannot be read.
  """
  with open_binary(path) as file:
    files = _regular(_walk(file, path), notes)
    images = [name for name in files if posixpath.splitext(name)[1].lower() in IMAGE_SUFFIXES]
    plain = {_key(name) for name in images if "." not in _extension(name)}
    prompts = {name[: -len(".json")]: name for name in files if name.lower().endswith(".json")}
    used = set(images)
    for name in images:
      has_dots = "." in _extension(name)
      if has_dots and _key(name) in plain:
        notes.skip("label image", "label images")
        continue
      if has_dots:  # names from cameras and screenshots, which do not follow WebDataset's rule
        what = "as an image, although the name has several dots"
        notes.remark(f"member counts {what}", f"members count {what}", name)
      beside = prompts.get(posixpath.splitext(name)[0], prompts.get(_key(name), ""))
      used.add(beside)
      sidecar = _content(file, path, files[beside]) if beside else b""
      yield Sample(files[name].name, (files[name].offset_data, files[name].size), sidecar)
    for name in files.keys() - used:
      notes.skip_suffix(name)


def _regular(found: list[tarfile.TarInfo], notes: ListingNotes) -> dict[str, tarfile.TarInfo]:
  """The regular files that are not hidden, the last one of each name."""
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
  """All members, after verifying that the archive is complete.

  Python's `tarfile` takes a damaged header, or the end of the file, for the end of the archive.
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
  # `tarfile` raises all of these on malicious headers.
  except (tarfile.TarError, ValueError, OverflowError, RecursionError, MemoryError):
    problem = "a damaged header"
  size = file.seek(0, os.SEEK_END)
  if not found and (problem or not _is_end(file, 0)):
    file.seek(0)
    start = file.read(8)
    kind = next((kind for magic, kind in _MAGIC.items() if start.startswith(magic)), "")
    how = f"but compressed ({kind}); unpack it" if kind else "or its first header is damaged"
    raise ValueError(f"{redact(path)} is not a tar file ({size:,} bytes), {how}.")
  if end > size:
    problem = f"the end of the file, at byte {size:,}, inside {found[-1].name!r:.60}"
  elif problem:
    problem = f"{problem} at byte {end:,}"
  else:
    problem = _end_fault(file, end)
  if problem:
    count = "1 member" if len(found) == 1 else f"{len(found):,} members"
    raise ValueError(
      f"{redact(path)} is damaged or truncated: {count}, then {problem}; copy or create it again."
    )
  return found


def _is_end(file: BinaryIO, offset: int) -> bool:
  file.seek(offset)
  return file.read(2 * _BLOCK) == bytes(2 * _BLOCK)


def _end_fault(file: BinaryIO, end: int) -> str:
  """What is wrong after the last member; empty if the archive ends there."""
  if not _is_end(file, end):
    file.seek(end)
    block = file.read(_BLOCK)
    if not block.strip(b"\0"):
      return f"no end mark (two blocks of zeros) at byte {end:,}"
    what = "a damaged header" if len(block) == _BLOCK else "the end of the file inside a header"
    return f"{what} at byte {end:,}"
  at = end + 2 * _BLOCK
  while chunk := file.read(2**20):
    if chunk.strip(b"\0"):
      at += len(chunk) - len(chunk.lstrip(b"\0"))
      return (
        f"the end mark, but more data follow at byte {at:,} (tar files joined by cat must be split)"
      )
    at += len(chunk)
  return ""


def _content(file: BinaryIO, path: str, member: tarfile.TarInfo) -> bytes:
  if member.size > MAX_SIDECAR:
    raise ValueError(
      f"{redact(path)}: {member.name} has {member.size:,} bytes, too many for prompts."
    )
  file.seek(member.offset_data)
  return file.read(member.size)


def _key(name: str) -> str:
  directory, slash, base = name.rpartition("/")
  return directory + slash + base.partition(".")[0]


def _extension(name: str) -> str:
  return name.rpartition("/")[2].partition(".")[2]
