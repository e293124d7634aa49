"""Makes the video of an input a local file or directory, with the identity of what is read.

The content of a video is read once for its digest, before it is tracked. A remote video is read
into a temporary file. A video that is not the listed one, or that changes while it is tracked, is
not used.
"""

import contextlib
import dataclasses
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from sam3_jax.batch.files import Draft, scratch
from sam3_jax.batch.image_bytes import FileChangedError, NotAFileError
from sam3_jax.batch.input_list import Input
from sam3_jax.inputs.image_listing import is_image
from sam3_jax.storage.faults import ChangedError
from sam3_jax.storage.objects import ObjectPath
from sam3_jax.storage.urls import is_url
from sam3_jax.utils.identity import FileIdentity, digest, file_sha256, identify
from sam3_jax.utils.notes import ListingNotes

PIECE = 2**23  # bytes of a remote video in a request
FOLDER = "videos"  # of `scratch`, with the temporary files


class TemporaryFileError(OSError):
  """The temporary file of a remote video cannot be written."""


@dataclasses.dataclass(frozen=True)
class LocalVideo:
  """A video on this machine.

  Attributes:
    path: a file, or a directory of frames.
    identity: of what was read, with the digest of its content.
  """

  path: Path
  identity: FileIdentity


@contextlib.contextmanager
def local_video(item: Input) -> Iterator[LocalVideo]:
  """Yields the video of an input; a temporary file is removed at the end.

  Raises:
    OSError: it cannot be read, or has changed since it was listed.
    FileChangedError: at the end, it has changed since it was opened.
    TemporaryFileError: there is no room for it.
    NotAFileError: it is a FIFO, a socket or a device.
  """
  if is_url(item.path):
    with _temporary_file(item) as draft:
      identity = _download(item, draft)
      yield LocalVideo(draft.temporary, identity)
    return
  before = identify_video(item.path)
  if before is None:
    raise FileNotFoundError(2, "there is no such video", item.path)
  if item.identity is not None and not item.identity.same_stat(before):
    raise FileChangedError(f"{item.name} has changed since it was listed")
  yield LocalVideo(Path(item.path), _with_content(item, before))
  after = identify_video(item.path)
  if after is None or not after.same_stat(before):
    raise FileChangedError(f"{item.name} changed while it was read")


def read_identity(item: Input) -> FileIdentity:
  """Reads a video for the digest of its present content.

  Raises:
    OSError: it cannot be read.
    NotAFileError: it is a FIFO, a socket or a device.
  """
  if is_url(item.path):
    return _download(item, None)
  found = identify_video(item.path)
  if found is None:
    raise FileNotFoundError(2, "there is no such video", item.path)
  return _with_content(item, found)


def identify_video(path: str | Path) -> FileIdentity | None:
  """The identity of a local video without its content; None if there is no such file.

  That of a directory of frames has the sum of their sizes, the latest of their times, and a digest
  of the names, sizes and times of all frames as its version.
  """
  if not os.path.isdir(path):
    return identify(path)
  found = {frame.name: identify(frame) for frame in frames_of(path)}
  known = {name: one for name, one in found.items() if one is not None}
  version = digest([[name, one.size, one.modified] for name, one in known.items()])[:16]
  size = sum(one.size for one in known.values())
  return FileIdentity(size, max((one.modified for one in known.values()), default=0), "", version)


def frames_of(path: str | Path) -> list[Path]:
  """The images in a directory, by name."""
  with os.scandir(path) as entries:
    names = [entry.name for entry in entries if not entry.is_dir()]
  return [Path(path) / name for name in sorted(names) if is_image(name, ListingNotes())]


def _with_content(item: Input, found: FileIdentity) -> FileIdentity:
  path = Path(item.path)
  if path.is_dir():
    sha256 = digest([[frame.name, file_sha256(frame)] for frame in frames_of(path)])
    return dataclasses.replace(found, sha256=sha256)
  mode = os.stat(path).st_mode
  if not stat.S_ISREG(mode):
    kinds = {stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket"}
    kind = kinds.get(stat.S_IFMT(mode), "device")
    raise NotAFileError(f"{item.name} is a {kind}, not a video", found)
  return dataclasses.replace(found, sha256=file_sha256(path))


@contextlib.contextmanager
def _temporary_file(item: Input) -> Iterator[Draft]:
  name = f"{digest(item.path)[:12]}{Path(item.name).suffix}"
  try:
    draft = Draft(scratch() / FOLDER / name)
  except OSError as error:
    raise TemporaryFileError(str(error)) from error
  with draft:
    yield draft


def _download(item: Input, draft: Draft | None) -> FileIdentity:
  """Reads a remote video, into `draft` if it is given."""
  where, expected, sha256, offset = ObjectPath(item.path), item.identity, hashlib.sha256(), 0
  entry = where.entry()
  if entry is None:
    raise FileNotFoundError(2, "there is no such object", str(where))
  if (
    draft is not None
    and expected
    and (entry.size, entry.version)
    != (
      expected.size,
      expected.version,
    )
  ):
    raise FileChangedError(f"{item.name} has changed since it was listed")
  while offset < entry.size:
    try:
      data = where.read_range(offset, min(offset + PIECE, entry.size), entry.version)
    except ChangedError:
      raise FileChangedError(f"{item.name} has changed since it was listed") from None
    if not data:
      raise FileChangedError(f"{item.name} ended while it was read")
    sha256.update(data)
    offset += len(data)
    if draft is not None:
      _write(draft, data)
  if draft is not None:
    _write(draft, b"", flush=True)
  return FileIdentity(entry.size, 0, sha256.hexdigest(), entry.version)


def _write(draft: Draft, data: bytes, *, flush: bool = False) -> None:
  try:
    draft.write(data)
    if flush:
      draft.flush()
  except OSError as error:
    raise TemporaryFileError(
      f"{error} A remote video is read into a temporary file; TMPDIR names another directory."
    ) from error
